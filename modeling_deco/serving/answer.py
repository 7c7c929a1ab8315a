# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""One answer, from the thread that generates it to the event loop that sends it."""

import asyncio

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import BaseStreamer

from ..inference.generation import RefuseNaN
from ..inference.prompt_cache import PromptCache


class _Ended(Exception):
    """Ends `generate` when the streamer raises it. Stopping criteria run before the streamer gets the token."""


class Answer(BaseStreamer):
    """An answer that is being generated: a streamer that puts pieces of text into the queue `pieces`.

    After the last piece comes None, or the exception that ended the answer. The object is created in the event loop.

    transformers' `TextStreamer` before 5.24 loses the space after a line break and holds back text without spaces.
    """

    def __init__(self, tokenizer, stop: list[str]):
        self.pieces: asyncio.Queue = asyncio.Queue()
        self.tokenizer = tokenizer
        self.stop = stop
        self.finish_reason = "length"
        self.num_tokens = 0
        self.is_cancelled = False
        self._loop = asyncio.get_running_loop()
        self._is_prompt = True
        self._token_ids: list[int] = []  # the last tokens; the text of the first `_num_sent` of them has been sent
        self._num_sent = 0
        self._held = ""  # the end of the text so far, if it may be the beginning of a stop string

    def cancel(self) -> None:
        """End the generation at its next token, or before it starts."""
        self.is_cancelled = True

    def generate(self, prompts: PromptCache, inputs: dict, config: GenerationConfig, seed: int | None) -> None:
        """Generate the answer. Runs in the inference thread."""
        try:
            if self.is_cancelled:  # `generate` would run the vision tower before it calls the streamer
                raise _Ended
            # A request with a seed must not determine the samples of later requests.
            torch.manual_seed(torch.seed() if seed is None else seed)
            (sequence,) = prompts.generate(
                **inputs,
                generation_config=config,
                streamer=self,
                logits_processor=LogitsProcessorList([RefuseNaN()]),
                tokenizer=self.tokenizer,  # for the `stop_strings` of a checkpoint's generation config
            )
            eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            if self.num_tokens < config.max_new_tokens or sequence[-1].item() in eos:
                self.finish_reason = "stop"
            self._add(self._next_text(at_end=True))
            self._push(self._held)
        except _Ended:
            pass
        except Exception as error:
            self._push(error)
            return
        self._push(None)

    def put(self, value: torch.Tensor) -> None:
        """Take the next token from `generate`, whose first call has the prompt."""
        if self.is_cancelled:
            raise _Ended
        if self._is_prompt:
            self._is_prompt = False
            return
        for token_id in value.tolist():
            self.num_tokens += 1
            self._token_ids.append(token_id)
            self._add(self._next_text())

    def end(self) -> None:
        """Does nothing: `generate` ends the answer, and knows the reason."""

    def _next_text(self, at_end: bool = False) -> str:
        """The text of the tokens that have not been sent, or nothing if the last character is incomplete. Tokens are
        decoded together with the ones before them, because these decide about spaces."""
        text = self.tokenizer.decode(self._token_ids, skip_special_tokens=True)
        sent = self.tokenizer.decode(self._token_ids[: self._num_sent], skip_special_tokens=True)
        if len(text) <= len(sent) or (text.endswith("\ufffd") and not at_end):
            return ""
        self._token_ids = self._token_ids[self._num_sent :]
        self._num_sent = len(self._token_ids)
        return text[len(sent) :]

    def _add(self, text: str) -> None:
        text = self._held + text
        ends = [text.index(stop) for stop in self.stop if stop in text]
        if ends:
            self.finish_reason = "stop"
            self._push(text[: min(ends)])
            raise _Ended
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        self._push(text[: len(text) - held])

    def _push(self, item: str | Exception | None) -> None:
        if item != "":
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, item)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)
