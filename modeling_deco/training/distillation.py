# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Distillation without a second model: the full grid, read by the model without its adapter, is the teacher of the
model with the adapter at smaller grids.

Teacher and student read the same texts, and their images with different numbers of tokens. So the tokens of their
answers are matched by their order, and only the hidden states before these tokens reach `lm_head`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # private, seen in trl 1.16

from ..modeling_deco import DecoForConditionalGeneration, _finish_logits
from ..utils.errors import first_names
from .collator import IGNORE_INDEX
from .newline import NEWLINE
from .parts import part_of

# PEFT's initializations that subtract the new adapter from the weights, or quantize them
_CHANGES_WEIGHTS = ("pissa", "corda", "olora", "loftq", "lora_ga")


def check_teacher(model: PreTrainedModel, freeze: list[str]) -> None:
    """Check that the model without its adapter is, during all of the training, the model as it was before.

    Args:
        model: as it is trained, with PEFT's wrapper.
        freeze: the parts that the run does not train.

    Raises:
        ValueError: it is not, or the projector has no full grid. The message says what to change.
    """
    if not is_peft_model(model):
        raise ValueError(
            "--distill logits learns from the model without its adapter, but this run has no adapter and trains the "
            "model in place. Use recipes/configs/tune_without_labels.yaml, or set --use_peft true and "
            "--lora_modules_to_save multi_modal_projector."
        )
    deco, peft_config = model.get_base_model(), model.active_peft_config
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ValueError(
            f"--distill logits needs adapters in the layers of the model, such as LoRA's, and those of "
            f"{peft_config.peft_type.value} put new tokens beside those of the text."
        )
    initialization = str(getattr(peft_config, "init_lora_weights", None))
    if initialization.startswith(_CHANGES_WEIGHTS):
        raise ValueError(
            f"--distill logits learns from the model without its adapter, but init_lora_weights={initialization!r} "
            f"changes the weights below the adapter; use the default."
        )
    projector_type = deco.config.projector_type
    if not deco.config.takes_any_grid:
        raise ValueError(
            f"--distill logits learns from the full grid, but projector_type={projector_type!r} has one grid; "
            f"avg_pool and c_abstractor take any."
        )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with model.disable_adapter():  # PEFT then freezes what belongs to the adapter
        in_place = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    in_place = [name for name in in_place if name.split(".")[-1] != NEWLINE]  # see `first_newline`
    if in_place:
        raise ValueError(
            f"--distill logits learns from the model without its adapter, but this run trains weights in place "
            f"({first_names(in_place)}). Train them by an adapter, name their modules in --lora_modules_to_save, or "
            f"freeze them."
        )
    parts = {part_of(name) for name in trained}
    if "multi_modal_projector" not in parts and "multi_modal_projector" not in freeze:
        raise ValueError(
            "--distill logits: nothing trains the projector. Set --lora_modules_to_save multi_modal_projector, or add "
            "multi_modal_projector to --freeze if you want it so."
        )
    if any(parameter.requires_grad for parameter in deco.get_output_embeddings().parameters()):
        raise ValueError(
            "--distill logits needs one lm_head for teacher and student; remove it from --lora_modules_to_save."
        )


@contextmanager
def as_teacher(model: PreTrainedModel) -> Iterator[None]:
    """Inside this context, a model with PEFT's wrapper is the model before training: without its adapter, without
    gradients and without dropout."""
    was_training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        for parameter in trained:  # PEFT has frozen them, and FSDP2 keeps what it sees in its first call
            parameter.requires_grad_(True)
        yield
    model.train(was_training)


def return_answer_states(model: DecoForConditionalGeneration) -> None:
    """Let `model(..., labels=labels, answer_states=True)` return, in place of logits, the hidden states before the
    tokens that are learned: `(num_learned_tokens, text_hidden_size)`, row by row.

    The head is not part of this call, so nothing of the size of the vocabulary exists at other tokens.
    """
    forward_with_head = model.forward

    @functools.wraps(forward_with_head)
    def forward(*args, answer_states: bool = False, **kwargs):
        if not answer_states:
            return forward_with_head(*args, **kwargs)
        is_learned = kwargs.pop("labels")[:, 1:] != IGNORE_INDEX
        states = model.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
        return states[is_learned.to(states.device)]

    model.forward = forward


class Encoding:
    """The outputs of a vision tower, in the order of its calls."""

    def __init__(self):
        self.outputs: list[Any] = []
        self.place = 0

    def rewind(self) -> None:
        """Let the next call get the first output again."""
        self.place = 0


@contextmanager
def one_encoding(vision_tower: nn.Module) -> Iterator[Encoding]:
    """Inside this context, a vision tower runs only until the encoding is rewound. Later calls, which must be about
    the same images and frames in the same order, get the same outputs."""
    encode, is_hooked = vision_tower.forward, "forward" in vars(vision_tower)
    encoding = Encoding()

    @functools.wraps(encode)
    def forward(*args, **kwargs):
        if encoding.place == len(encoding.outputs):
            encoding.outputs.append(encode(*args, **kwargs))
        encoding.place += 1
        return encoding.outputs[encoding.place - 1]

    vision_tower.forward = forward
    try:
        yield encoding
    finally:
        if is_hooked:  # by accelerate, for a model on several devices
            vision_tower.forward = encode
        else:
            del vision_tower.forward  # of this instance; the class keeps its own


def kl_divergence(
    student: torch.Tensor, teacher: torch.Tensor, model: DecoForConditionalGeneration
) -> torch.FloatTensor:
    """The Kullback-Leibler divergence of the student's next tokens from the teacher's, summed over positions.

    Args:
        student: hidden states `(num_positions, text_hidden_size)`.
        teacher: hidden states of the same shape.
        model: whose `lm_head` makes logits of both, in tiles.
    """
    head = model.get_output_embeddings()
    weight, bias = _whole(head.weight), None if head.bias is None else _whole(head.bias)
    factor, cap = _factor_and_cap(model.config.text_config)
    states = student.to(weight.device), teacher.to(weight.device)
    divergence, _ = ChunkedDivergenceFunction.apply(
        states[0], weight, bias, states[1], weight, bias, 0.0, 1.0, factor, cap, factor, cap
    )
    return divergence.sum()


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter of which FSDP2 may have split the values over processes."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _factor_and_cap(text_config) -> tuple[float, float | None]:
    """The factor that `_finish_logits` applies to logits, and its cap, if it has one."""
    small, large = _finish_logits(torch.tensor([1e-6, torch.inf], dtype=torch.float64), text_config).tolist()
    return small / 1e-6, large if large < torch.inf else None
