# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""From rows with pictures to rows with a model's answers."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import PurePath
from random import Random
from typing import Any, NamedTuple

import torch
import xxhash
from datasets import Image as ImageFeature

from ...inference.questions import Question, choose_questions
from ..data.images import bytes_of_url, images_of_columns, open_image
from ..data.llava import ROLES
from ..data.rows import read_row
from .engines import Answer, TransformersEngine, VLLMEngine

READERS = 4  # threads that decode the pictures of the next batch while a batch is answered

Parts = list[dict[str, Any]]


class Answered(NamedTuple):
    """What became of a batch of rows.

    Args:
        rows: training data, with `id`, `images` and `messages`.
        faults: a line for each row that cannot be read or asked, or not all of it: its id, and the reason.
        counts: of `questions`, each of which is also among the `answers`, the `empty` answers or the `unanswered`
            questions; and of answers that were `cut` at their maximum length.
        kinds: the number of questions of each kind.
    """

    rows: list[dict[str, Any]]
    faults: list[str]
    counts: Counter[str]
    kinds: Counter[str]


@dataclass
class _Talk:
    """A conversation about images. `waiting` has the image parts that the next question shows, and `kept` the turns
    that have an answer."""

    id: str
    of: int  # the number of its row
    images: list[Any]  # not opened
    questions: list[Parts]
    kinds: list[str]
    waiting: Parts = field(default_factory=list)
    system: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)

    def prompt(self, turn: int) -> list[dict[str, Any]]:
        return [*self.system, *self.kept, {"role": "user", "content": [*self.waiting, *self.questions[turn]]}]

    def add(self, turn: int, answer: str) -> None:
        """Keep a turn, if it has an answer. If not, the next question shows its images."""
        question = [*self.waiting, *self.questions[turn]]
        self.waiting = [part for part in question if part["type"] == "image"]
        if answer:
            self.kept.append({"role": "user", "content": question})
            self.kept.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            self.waiting = []

    def row(self) -> dict[str, Any]:
        messages = [*self.system, *self.kept]
        return {
            "id": self.id,
            "images": [image_reference(image) for image in self.images[: _num_images(messages)]],
            "messages": messages,
        }


class _Request(NamedTuple):
    """A question of a talk, with all that the model reads before it."""

    talk: _Talk
    turn: int
    messages: list[dict[str, Any]]

    @property
    def order(self) -> tuple:
        """What requests are sorted by: neighbours have similar lengths, and answers of similar lengths."""
        texts = [part["text"] for message in self.messages for part in message["content"] if part["type"] == "text"]
        return _num_images(self.messages), self.talk.kinds[self.turn], sum(map(len, texts))

    def with_pictures(self) -> list[dict[str, Any]] | Answer:
        """The messages with their images opened, or an answer that says which cannot be read."""
        try:
            pictures = (open_image(image) for image in self.talk.images)
            return [
                {
                    **message,
                    "content": [
                        {**part, "image": next(pictures)} if part["type"] == "image" else part
                        for part in message["content"]
                    ],
                }
                for message in self.messages
            ]
        except ValueError as error:
            return Answer("", fault=str(error))


def _num_images(messages: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


class Answerer:
    """Asks a model about the pictures of rows, and makes training data of its answers.

    It is called with a list of rows in the layouts of `modeling_deco.training.data`: images in `images` or `image`,
    conversations in `messages` or, as in LLaVA's JSON, `conversations`; an `id`. A row that cannot be read is reported
    and left out. The result depends on the rows, the arguments and the engine alone.

    Args:
        engine: see `modeling_deco.training.answer.engines`.
        questions: what each picture is asked. None means the questions of the rows, whose answers are replaced.
        questions_per_image: the number of questions to each picture, spread over the kinds. Default: one of each kind;
            of questions without kinds, all.
        independent_turns: the questions about a picture are turns of one row, and each is asked alone: train with
            `--independent_turns true`. Otherwise each question of `questions` is a row of its own, and in a
            conversation of a row each question is asked after the earlier ones and the model's own answers to them.
        seed: of the choice of questions, and of sampling.
        report: is called after each batch with its number of questions.
    """

    def __init__(
        self,
        engine: TransformersEngine | VLLMEngine,
        questions: list[Question] | None = None,
        questions_per_image: int | None = None,
        independent_turns: bool = False,
        seed: int = 0,
        report: Callable[[int], object] = lambda num_questions: None,
    ):
        self.report = report
        self.engine, self.questions, self.questions_per_image = engine, questions, questions_per_image
        self.independent_turns, self.seed = independent_turns, seed

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Answered:
        answered, talks = Answered([], [], Counter(), Counter()), []
        faults: dict[int, str] = {}
        for number, row in enumerate(rows):
            try:
                talks += self._talks(number, row)
            except ValueError as error:
                faults[number] = str(error)
        num_turns = max((len(talk.questions) for talk in talks), default=0)
        rounds = [range(num_turns)] if self.independent_turns else [range(turn, turn + 1) for turn in range(num_turns)]
        for turns in rounds:
            requests = [
                _Request(talk, turn, talk.prompt(turn))
                for talk in talks
                for turn in turns
                if turn < len(talk.questions)
            ]
            for request, answer in zip(requests, self._answers(requests), strict=True):
                if answer.fault:
                    faults.setdefault(request.talk.of, answer.fault)
                outcome = "unanswered" if answer.fault else "answers" if answer.text else "empty"
                answered.counts.update({"questions": 1, outcome: 1, "cut": int(answer.is_cut)})
                answered.kinds.update([request.talk.kinds[request.turn]])
                request.talk.add(request.turn, answer.text)
        answered.rows.extend(talk.row() for talk in talks if talk.kept)
        answered.faults.extend(f"{rows[number].get('id')}: {faults[number].rstrip('.')}" for number in sorted(faults))
        return answered

    def _talks(self, of: int, row: Mapping[str, Any]) -> list[_Talk]:
        """What is asked about a row. A ValueError says why it cannot be read."""
        row_id = str(row.get("id"))
        if any("\ud800" <= character <= "\udfff" for character in row_id):
            raise ValueError("its name is not valid Unicode")
        row = _with_messages(row)
        if self.questions is None:
            return [_own_talk(row_id, of, row, self.independent_turns)]
        images = images_of_columns(row) if row.get("messages") is None else read_row(row)["images"]
        if not images:
            raise ValueError("it has no image")
        talks = []
        for number, image in enumerate(images, 1):
            name = row_id if len(images) == 1 else f"{row_id}-{number}"
            chosen = select_questions(self.questions, Random(f"{self.seed} {name}"), self.questions_per_image)
            texts: list[Parts] = [[{"type": "text", "text": question.text}] for question in chosen]
            kinds = [question.kind for question in chosen]
            if self.independent_turns:
                talks.append(_Talk(name, of, [image], texts, kinds, [{"type": "image"}]))
                continue
            for turn, (text, kind) in enumerate(zip(texts, kinds, strict=True), 1):
                talks.append(_Talk(f"{name}-{turn}", of, [image], [text], [kind], [{"type": "image"}]))
        return talks

    def _answers(self, requests: list[_Request]) -> list[Answer]:
        """Answers in the order of the requests, which are asked in batches of similar length."""
        order = sorted(range(len(requests)), key=lambda position: requests[position].order)
        answers: dict[int, Answer] = {}
        for batch in _opened(requests, order, self.engine.batch_size):
            answers |= {position: entry for position, entry in batch.items() if isinstance(entry, Answer)}
            asked = {position: entry for position, entry in batch.items() if not isinstance(entry, Answer)}
            if asked:
                names = [f"{requests[position].talk.id} {requests[position].turn}" for position in asked]
                seed = xxhash.xxh32_intdigest("\n".join([str(self.seed), *names]).encode())
                answers |= zip(asked, self.engine(list(asked.values()), seed), strict=True)
            self.report(len(batch))
        return [answers[position] for position in range(len(requests))]


def _opened(requests: list[_Request], order: list[int], size: int) -> Iterator[dict[int, Any]]:
    """Batches by position, with their pictures opened: those of the next batch while a batch is answered."""
    starts = range(0, len(order), size)
    with ThreadPoolExecutor(READERS) as readers:

        def submit(start: int) -> dict[int, Future]:
            batch = order[start : start + size]
            return {position: readers.submit(requests[position].with_pictures) for position in batch}

        opening = submit(0)
        for start in starts:
            opened = {position: future.result() for position, future in opening.items()}
            opening = submit(start + size)
            yield opened


def _with_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the conversation of LLaVA's JSON as messages."""
    if row.get("messages") is not None or row.get("conversations") is None:
        return {name: value for name, value in row.items() if name != "conversations"}
    try:
        messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    except (KeyError, TypeError):
        raise ValueError("'conversations' is not a list of turns with 'from' (human or gpt) and 'value'") from None
    return {name: value for name, value in row.items() if name != "conversations"} | {"messages": messages}


def _own_talk(row_id: str, of: int, row: Mapping[str, Any], independent_turns: bool) -> _Talk:
    """The questions of a row, without its answers."""
    if row.get("messages") is None:
        raise ValueError("it has no questions")
    read = read_row(row)
    if read["videos"]:
        raise ValueError("it has a video, and questions are asked about images alone")
    messages = read["messages"]
    system = messages[:1] if messages[:1] and messages[0]["role"] == "system" else []
    turns = [message for message in messages[len(system) :] if message["role"] != "assistant"]
    questions = [[dict(part) for part in turn["content"]] for turn in turns]
    if any(turn["role"] != "user" for turn in turns):
        raise ValueError("a conversation has other roles than system, user and assistant")
    if not any(part["type"] == "text" for question in questions for part in question):
        raise ValueError("it has no questions")
    images = [part["type"] == "image" for question in questions for part in question].count(True)
    if images != len(read["images"]):
        raise ValueError("an answer or a system message has an image")
    kinds = [""] * len(questions)
    if not independent_turns:
        return _Talk(row_id, of, read["images"], questions, kinds, system=system)
    shown, *later = [[part for part in question if part["type"] == "image"] for question in questions]
    if any(later):
        raise ValueError("its turns are not independent: all images must be in the first question")
    texts = [[part for part in question if part["type"] == "text"] for question in questions]
    return _Talk(row_id, of, read["images"], texts, kinds, shown, system)


def select_questions(questions: list[Question], random: Random, number: int | None = None) -> list[Question]:
    """Choose what one picture is asked.

    Args:
        number: of questions, or None for those of `choose_questions`. Each kind comes up before one comes up again, in
            another wording. Each question of a text file counts as a kind.
    """
    if number is None:
        return choose_questions(questions, random)
    kinds: dict[str, list[Question]] = {}
    for question in questions:
        kinds.setdefault(question.kind or question.text, []).append(question)
    wordings = [random.sample(kind, len(kind)) for kind in kinds.values()]
    random.shuffle(wordings)
    return [question for together in zip_longest(*wordings) for question in together if question is not None][:number]


def image_reference(image: Any) -> dict[str, Any]:
    """An image as the column `images` stores it: the absolute path of a file, a URL, or bytes."""
    if isinstance(image, str) and image.startswith("data:"):
        image = bytes_of_url(image)
    if isinstance(image, torch.Tensor):
        image = image.numpy()
    if isinstance(image, (bytes, bytearray)):
        return {"bytes": bytes(image), "path": None}
    if isinstance(image, Mapping) and image.get("bytes") is None:
        image = image["path"]
    if isinstance(image, (str, PurePath)):
        return {"bytes": None, "path": str(image) if "://" in str(image) else os.path.abspath(image)}
    return ImageFeature().encode_example(image)
