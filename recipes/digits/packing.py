"""All questions about a picture in one sequence, each seeing only the picture and itself.

A picture's tokens are encoded once for its questions. Positions of every question go on from the picture's, and the
attention mask keeps questions apart, so that logits equal those of one sample per question (a test compares them); the
work is a third. As turns of one conversation, by contrast, earlier answers would give later ones away.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modeling_deco import DecoProcessor, num_image_tokens

IGNORE_INDEX = -100


@dataclass
class PackedQuestionsCollator:
    """Collates examples `{"index", "images": [image], "messages": [...]}` for `SFTTrainer`.

    The messages are TRL's, user and assistant in turn, but each pair is taken as a conversation of its own. Labels are
    the assistant's tokens, as the chat template's `{% generation %}` marks them. All pictures of a batch get one grid,
    drawn by the index of the first; the first batches get the processor's own, since looking digits up is learned
    sooner where a token always stands for the same place.

    Attributes:
        processor: of the model that is trained.
        grid_weights: how often each grid (its side) is drawn; they sum to 1.
        first_elastic_index: pictures before this index are pooled to the processor's grid.
        seed: for the draws.
    """

    processor: DecoProcessor
    grid_weights: dict[int, float]
    first_elastic_index: int = 0
    seed: int = 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `position_ids` `(pictures, sequence)`, `attention_mask` `(pictures, 1, sequence,
        sequence)` true where a token may look, `pixel_values`, and `pooled_grid_sizes` `(pictures, 2)`."""
        side = self._side(examples[0]["index"])
        rows = [self._pack(example["messages"], num_image_tokens(side)) for example in examples]
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": _padded(rows, "input_ids", length, self.processor.tokenizer.pad_token_id),
            "labels": _padded(rows, "labels", length, IGNORE_INDEX),
            "position_ids": _padded(rows, "position_ids", length, 0),
        }
        owners = _padded(rows, "owners", length, -1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same_question = owners[:, :, None] == owners[:, None, :]
        batch["attention_mask"] = ((same_question | (owners == 0)[:, None, :]) & causal)[:, None]
        images = self.processor.image_processor([example["images"][0] for example in examples], return_tensors="pt")
        batch["pixel_values"] = images["pixel_values"]
        batch["pooled_grid_sizes"] = torch.tensor([[side, side]] * len(examples))
        return batch

    def _side(self, index: int) -> int:
        if index < self.first_elastic_index:
            return self.processor.pooled_grid_size
        rng = np.random.default_rng([self.seed, index])
        return int(rng.choice(list(self.grid_weights), p=list(self.grid_weights.values())))

    def _pack(self, messages: list[dict], num_placeholders: int) -> dict[str, list[int]]:
        """One picture's sequence: the prompt up to its image (owner 0), then each question (owners 1, 2, ...)."""
        conversations = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": user["content"]}]}, assistant]
            for user, assistant in zip(messages[::2], messages[1::2], strict=True)
        ]
        encoded = self.processor.tokenizer.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        start = encoded["input_ids"][0].index(self.processor.image_token_id)
        picture = encoded["input_ids"][0][:start] + [self.processor.image_token_id] * num_placeholders
        row = {
            "input_ids": list(picture),
            "labels": [IGNORE_INDEX] * len(picture),
            "position_ids": list(range(len(picture))),
            "owners": [0] * len(picture),
        }
        samples = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        for owner, (ids, is_answer) in enumerate(samples, start=1):
            ids, is_answer = ids[start + 1 :], is_answer[start + 1 :]
            row["input_ids"] += ids
            row["labels"] += [token if counts else IGNORE_INDEX for token, counts in zip(ids, is_answer, strict=True)]
            row["position_ids"] += range(len(picture), len(picture) + len(ids))
            row["owners"] += [owner] * len(ids)
        return row


def _padded(rows: list[dict[str, list[int]]], name: str, length: int, value: int) -> torch.Tensor:
    return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
