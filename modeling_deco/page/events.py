# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page's events: check an upload, ask a question, compare budgets, show a word's map."""

import html
import math
from collections.abc import Iterator, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

import gradio as gr
import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..configuration_deco import num_image_tokens
from ..inference.costs import PrefillClock, format_size, kv_cache_bytes, peak_gpu_memory, reset_peak_gpu_memory
from ..inference.errors import is_out_of_memory
from ..inference.generation import encode, stream
from ..inference.prompt_cache import PromptCache
from ..relevance import Relevance, explain
from ..utils.decoding import ImageError
from ..utils.errors import one_line
from .encoded_images import EncodedImages
from .rendering import NO_MAP_YET, answer_html, budget_text, costs_html, draw_map, map_caption
from .uploads import read_upload, read_video_upload, upload_path

MAX_QUESTION_LENGTH = 2000  # characters


@dataclass
class Answer:
    """An answer on the page, and what it was the answer to.

    Attributes:
        path: the image's, in the upload folder.
        side: rows and columns of the image's grid; None for the processor's own grid.
        relevance: the words' relevance, once a word has been clicked.
    """

    path: str
    question: str
    side: int | None
    text: str
    relevance: Relevance | None = None


@dataclass
class Session:
    """The state of a browser tab: its last image, video and question, the answer that it shows, and the rows of its
    table by grid side. An answer about a video has no maps."""

    path: str | None
    question: str
    video: str | None = None
    answer: Answer | None = None
    costs: dict[int | None, dict] = field(default_factory=dict)


class PageEvents:
    """The functions of the page's events for one model. Requests cannot be trusted: each argument may be anything."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, max_new_tokens: int):
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.default_side, self.largest_side = grid_sides(model.config, processor)
        self.prompts = PromptCache(model)
        self.images = EncodedImages(model)
        self.takes_videos = model.config.video_token_id is not None
        self._read_video = lru_cache(4)(lambda path: read_video_upload(path, processor))

    def check(self, upload):
        """Warn about an upload that is not an image, and remove it from the page."""
        try:
            read_upload(upload_path(upload))
        except ImageError as error:
            gr.Warning(html.escape(str(error)))
            return None
        return gr.skip()

    def check_video(self, upload):
        """Read an uploaded video, which is then ready for questions. Warn about a file that is none, and remove it."""
        try:
            self._read_video(upload_path(upload))
        except (ImageError, TypeError) as error:
            gr.Warning(html.escape(str(error)))
            return None
        return gr.skip()

    def ask(self, upload, question, side, session, video=None):
        """Stream an answer, and add its costs to the table.

        Yields:
            The answer, its map, the map's caption, the table, and the session.
        """
        with shown_errors():
            side = self._checked_side(side)
            session, messages = self._begin(upload, question, session, video)
        budget = budget_text(self.processor.pooled_grid_size if side is None else side, self.of_what)
        if session.path is None:
            budget = budget_text(messages[0]["content"][0]["video"].size[2:], "each frame of the video")
        yield answer_html("", budget), None, NO_MAP_YET, gr.skip(), session
        for text, row in self._answer(side, messages, self.prompts):
            if row is None:
                yield answer_html(text, budget), *[gr.skip()] * 4
        has_maps = session.path is not None and session.video is None
        session.answer = Answer(session.path, session.question, side, text) if has_maps else None
        session.costs[side] = row
        shown = answer_html(text or "(no answer)", budget, clickable=bool(text) and has_maps)
        yield shown, *[gr.skip()] * 2, costs_html(session.costs.values()), session

    def compare(self, upload, question, session, video=None):
        """Answer at several budgets, and add a row for each to the table.

        Yields:
            The table and the session.
        """
        with shown_errors():
            session, messages = self._begin(upload, question, session, video)
            if session.path is None:
                raise ValueError("Budgets are compared on an image; each frame of a video has one grid.")
        yield costs_html(session.costs.values()), session
        for side in sorted(self._compared_sides() - session.costs.keys()):
            for _, row in self._answer(side, messages):
                if row is not None:
                    session.costs[side] = row
                yield costs_html(session.costs.values()), session  # gradio stops here if the tab was closed

    def show_word(self, session, event: gr.EventData):
        """Show the map of the word that was clicked.

        Returns:
            The map, its caption, and the session.
        """
        if session is None or session.answer is None:
            raise gr.Error("This session has expired. Ask again.", print_exception=False)
        answer, word = session.answer, getattr(event, "word", None)
        if answer.relevance is None:
            with shown_errors():
                answer.relevance = self._explain(answer)
        if word not in answer.relevance.word_ids:
            raise gr.Error("The answer has no such word.", print_exception=False)
        index = answer.relevance.word_ids.index(word)
        caption = map_caption(answer.relevance, index)
        shown = gr.update(value=draw_map(answer.relevance, index), alt_text=caption)
        return shown, html.escape(caption), session

    @property
    def of_what(self) -> str:
        """What the token budget is for."""
        return "the image" if self.model.config.image_grid_pinpoints is None else "each view of the image"

    def _begin(self, upload, question, session: Session | None, video) -> tuple[Session, list[dict]]:
        """The session, with an empty table if the image, video or question is new, and the model's messages."""
        question = question.strip() if isinstance(question, str) else ""
        if len(question) > MAX_QUESTION_LENGTH:
            message = f"The question has {len(question):,} characters, more than the {MAX_QUESTION_LENGTH:,} allowed."
            raise gr.Error(message, print_exception=False)
        video = video if self.takes_videos else None
        if (upload is None and video is None) or not question:
            missing = "Choose an image" if upload is None and video is None else "Write a question"
            raise gr.Error(f"{missing} first.", title="Not yet", print_exception=False)
        content: list[dict] = []
        path = clip = None
        if upload is not None:
            path = upload_path(upload)
            content.append({"type": "image", "image": read_upload(path)})
        if video is not None:
            clip = upload_path(video)
            content.append({"type": "video", "video": self._read_video(clip)})
        if session is None or (session.path, session.question, session.video) != (path, question, clip):
            session = Session(path, question, clip, None if session is None else session.answer)
        return session, [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]

    def _checked_side(self, side) -> int | None:
        """The side of the requested grid; None if the model has only one grid."""
        if self.largest_side is None:
            return None
        if type(side) is not int or not 1 <= side <= self.largest_side:
            raise ValueError(f"The token budget must be a whole number from 1 to {self.largest_side}.")
        return side

    def _compared_sides(self) -> Set[int | None]:
        if self.largest_side is None:
            return {None}
        return {self.default_side, *(self.largest_side >> power for power in range(4))} - {0}

    def _answer(self, side, messages, prompt_cache=None) -> Iterator[tuple[str, dict | None]]:
        """Generate an answer.

        Yields:
            The answer so far and None, each time that it grows; at the end the whole answer and its row of the table.
        """
        reset_peak_gpu_memory()
        text = ""
        with shown_errors(), self.images.in_use(), PrefillClock(self.model) as prefill:
            inputs = encode(self.processor, messages, side)
            budget = {"max_new_tokens": self.max_new_tokens, "prompt_cache": prompt_cache}
            with closing(stream(self.model, self.processor, inputs, **budget)) as pieces:
                for piece in pieces:
                    text += piece
                    yield text, None
        tokens = torch.tensor([self.processor.image_token_id, self.processor.video_token_id or -1])
        num_tokens = int(torch.isin(inputs["input_ids"], tokens).sum())
        yield text.strip(), self._costs(num_tokens, prefill.seconds) | {"Answer": text.strip()}

    def _costs(self, num_tokens: int, prefill_seconds: float) -> dict:
        """The row of an answer that has just been generated."""
        encoding = sum(self.images.seconds.values())
        milliseconds = 1000 * (encoding + prefill_seconds)
        prefill = f"{milliseconds:.{0 if milliseconds >= 10 else 1}f} ms"
        row = {"Image tokens": num_tokens, "Prefill": f"{prefill} *" if encoding == 0 else prefill}
        dtype = self.model.get_input_embeddings().weight.dtype
        row["KV cache"] = format_size(kv_cache_bytes(self.model.config.get_text_config(), num_tokens, dtype))
        if self.model.device.type == "cuda":
            row["Peak GPU memory"] = format_size(peak_gpu_memory() - self.prompts.num_bytes)  # without other prompts
        return row

    def _explain(self, answer: Answer) -> Relevance:
        image = read_upload(answer.path)
        words = explain(
            self.model, self.processor, image, answer.question, answer=answer.text, pooled_grid_size=answer.side
        ).by_word()
        return replace(words, query_to_patch=torch.empty(0))  # by far the largest part, and not shown


def grid_sides(config, processor) -> tuple[int, int | None]:
    """Sides of two square grids: the largest that is not above the processor's budget, and the largest that the model
    takes. The latter is None if the model takes only one grid."""
    side, largest = math.isqrt(num_image_tokens(processor.pooled_grid_size)), min(config.patch_grid)
    return min(side, largest), largest if config.takes_any_grid and largest > 1 else None


@contextmanager
def shown_errors() -> Iterator[None]:
    """Show errors as one line on the page. Errors that the user did not cause are only logged."""
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        raise gr.Error(html.escape(one_line(error)), print_exception=False) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise gr.Error("Out of memory. Choose a smaller token budget.", print_exception=False) from error
        raise gr.Error("The page failed; its log says why.") from error
