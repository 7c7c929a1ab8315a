# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/chat/completions`: from a request's body to an answer."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

from starlette.requests import Request
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from ..inference.generation import encode, num_positions, sampling
from ..inference.picture_reader import PictureReader, VideoReader
from ..inference.prompt_cache import PromptCache
from ..utils.decoding import ImageError
from ..utils.errors import one_line
from .answer import Answer
from .errors import RequestError, wrong_model
from .limits import Capacity
from .options import ServerOptions
from .responses import ResponseOptions, respond
from .schema import BUDGETS, ChatRequest, check_video, parse_request, wrong_kind, wrong_value

_OF_IMAGES = ("pooled_grid_size", "max_image_tokens", "tiles")
_OF_READING = ("fps", "max_frames", "pooled_video_grid_size", "frames_per_token_grid")


class ChatEndpoint:
    """An ASGI application. When a request ends, for whatever reason, everything that it started is stopped."""

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, name: str, options: ServerOptions, capacity: Capacity
    ):
        self.model = model
        self.processor = processor
        self.name = name
        self.options = options
        self.capacity = capacity
        # some language models have no limit, but prompts need one
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 131_072
        self.prompts = PromptCache(model, options.prompt_cache_bytes)
        self.inference = ThreadPoolExecutor(1, "inference")  # torch.compile's CUDA graphs belong to one thread
        self.texts = ThreadPoolExecutor(2, "texts")
        self.images = ThreadPoolExecutor(2, "images")
        self.reader = PictureReader(
            options.image_limits,
            allow_files=options.allow_files,
            allow_private=options.allow_private,
            max_downloads=options.max_queue + 1,
        )
        self.video_reader = VideoReader(
            options.video_limits,
            allow_files=options.allow_files,
            allow_private=options.allow_private,
            max_downloads=max(1, options.max_video_requests),
        )

    def close(self) -> None:
        """Stop the threads, and the processes that decode images and videos."""
        self.reader.close()
        self.video_reader.close()
        for workers in (self.inference, self.texts, self.images):
            workers.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope, receive, send):
        request = Request(scope, receive)
        # A browser sends JSON to another site only after a preflight request, which this server does not grant. So no
        # web page can use a server on its reader's machine.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "The Content-Type header must be application/json.")
        in_thread = asyncio.get_running_loop().run_in_executor
        message = await receive()
        with ExitStack() as places:
            with self.capacity.memory(len(message["body"])):
                with self.capacity.place("answers"):
                    # nothing here keeps a reference to the body: a request that waits is a few tensors
                    chat = await in_thread(self.texts, self._check, message.pop("body"))
                if chat.videos:
                    places.enter_context(self.capacity.place("videos"))
                if chat.images or chat.videos:
                    with self.capacity.place("images"):
                        inputs = await self._read(chat)
            places.enter_context(self.capacity.place("answers"))
            if not chat.images and not chat.videos:
                inputs = await in_thread(self.texts, self._encode, chat)
            num_prompt_tokens = inputs["input_ids"].shape[-1]
            with _as_request_errors():
                prompt_length = num_positions(self.model, inputs)
            config = self._generation_config(chat, prompt_length)
            seed = self.options.seed if chat.seed is None else chat.seed
            include_usage = chat.stream_options.get("include_usage", False)
            response_options = ResponseOptions(self.name, num_prompt_tokens, chat.stream, include_usage)
            answer = Answer(self.processor.tokenizer, chat.stop)
            self.inference.submit(answer.generate, self.prompts, inputs, config, seed)
            del chat, inputs
            try:
                response = await respond(answer, response_options)
                await response(scope, receive, send)
            finally:
                answer.cancel()

    def _check(self, body: bytes) -> ChatRequest:
        """A request that the model can answer. Prompts and grids are checked before they are made into tokens."""
        chat = parse_request(body)
        if chat.model not in (None, self.name):
            raise wrong_model(chat.model, self.name)
        budgets = self._budgets(chat)
        num_images, limit = len(chat.images), self.options.max_images
        if num_images > limit:
            raise RequestError(400, f"{num_images} images are more than the {limit} allowed in a request.", "messages")
        self._check_videos(chat, budgets)
        kwargs = {name: budgets[name] for name in _OF_IMAGES if name in budgets}
        with _as_request_errors():
            budget = self.processor._get_num_multimodal_tokens(image_sizes=[(1, 1)] * num_images, **kwargs)
        num_tiles, limit = sum(budget["num_image_patches"] or ()), self.options.max_tiles
        if "tiles" in chat.budgets and num_tiles > limit:
            raise RequestError(400, f"{num_tiles} tiles are more than the {limit} allowed in a request.", "tiles")
        num_tokens, num_characters = sum(budget["num_image_tokens"] or ()), sum(map(len, chat.texts))
        if num_tokens > self.context or num_characters > 64 * self.context:
            raise self._too_long(f"{num_tokens} tokens of images and {num_characters} characters of text")
        return chat

    def _budgets(self, chat: ChatRequest) -> dict[str, Any]:
        """The budgets of a request, and the server's for those that it leaves out."""
        budgets, own = chat.budgets, self.options.budgets
        if {"pooled_grid_size", "max_image_tokens"} & budgets.keys():
            own = {name: value for name, value in own.items() if name == "tiles"}
        return {**own, **budgets}

    def _check_videos(self, chat: ChatRequest, budgets: dict[str, Any]) -> None:
        for number, message in enumerate(chat.messages):
            for place, part in enumerate(message["content"]):
                path = f"messages[{number}].content[{place}]"
                if part["type"] == "video" and self.processor.video_token is None:
                    raise wrong_kind(f"{path}.type", "video_url")
                if part["type"] == "video":
                    part["video"] = check_video(part["video"], path)
        if len(chat.videos) > self.options.max_videos:
            too_many = f"{len(chat.videos)} videos are more than the {self.options.max_videos} allowed in a request."
            raise RequestError(400, too_many, "messages")
        if chat.videos and budgets.get("max_frames", 1) > self._max_frames:
            expected = f"an integer from 1 to {self._max_frames}, this server's maximum"
            raise wrong_value("max_frames", budgets["max_frames"], expected)

    @property
    def _max_frames(self) -> int:
        return self.processor.max_frames if self.options.max_frames is None else self.options.max_frames

    def _too_long(self, what: str) -> RequestError:
        message = f"{what} do not fit the model's context of {self.context} tokens."
        return RequestError(400, message, "messages", "context_length_exceeded")

    async def _read(self, chat: ChatRequest) -> dict:
        """The model's inputs of a request with images or videos, which are downloaded and decoded here."""
        budgets, parts = self._budgets(chat), chat.images
        try:
            with _as_request_errors():
                for part in chat.videos:
                    part["video"] = await self.video_reader.read_frames(
                        part["video"],
                        budgets.get("fps", self.processor.fps),
                        budgets.get("max_frames", self._max_frames),
                        partial(
                            self.processor.prepare_video,
                            pooled_video_grid_size=budgets.get("pooled_video_grid_size"),
                            frames_per_token_grid=budgets.get("frames_per_token_grid"),
                        ),
                    )
            async with self.reader.read_all([part["image"] for part in parts]) as images:
                for part, image in zip(parts, images, strict=True):
                    part["image"] = image
                return await asyncio.get_running_loop().run_in_executor(self.images, self._encode, chat)
        except ImageError as error:
            code = "invalid_video" if "video" in str(error)[:10] else "invalid_image"
            raise RequestError(400, one_line(error), "messages", code) from error

    def _encode(self, chat: ChatRequest) -> dict:
        system = self.options.system
        if system is not None and all(message["role"] != "system" for message in chat.messages):
            content = [{"type": "text", "text": system}]
            chat.messages.insert(0, {"role": "system", "content": content})
        budgets = {name: value for name, value in self._budgets(chat).items() if name not in _OF_READING}
        with _as_request_errors():
            grid = budgets.pop("pooled_grid_size", None)
            return encode(self.processor, chat.messages, grid, **budgets).to(self.model.device)

    def _generation_config(self, chat: ChatRequest, prompt_length: int) -> GenerationConfig:
        name = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        asked, room = getattr(chat, name), self.context - prompt_length
        if asked is not None and asked > self.options.max_new_tokens:
            raise wrong_value(
                name, asked, f"an integer from 1 to {self.options.max_new_tokens}, this server's maximum"
            )
        if room < (asked or 1):
            unit = "positions" if self.model.config.image_positions == "patch" else "tokens"
            raise self._too_long(f"{prompt_length} {unit} of the prompt and {asked or 1} of the answer")
        config = deepcopy(self.model.generation_config)
        config.update(num_beams=1, num_return_sequences=1, return_dict_in_generate=False)  # one answer, streamed
        config.max_new_tokens = asked or min(room, self.options.max_new_tokens)
        temperature = self.options.temperature if chat.temperature is None else chat.temperature
        config.update(**sampling(temperature))
        if chat.top_p is not None and temperature is None:
            config.do_sample = config.do_sample or chat.top_p < 1  # greedy decoding would ignore it
        if chat.top_p is not None and config.do_sample:
            config.top_p = chat.top_p
        return config


@contextmanager
def _as_request_errors() -> Iterator[None]:
    """Turn the processor's errors about a grid or messages into `RequestError`s. Those of reading stay."""
    try:
        yield
    except ImageError:
        raise
    except ValueError as error:
        named = [name for name in BUDGETS if name in str(error)]
        parameter = named[-1] if named else ("pooled_grid_size" if "grid" in str(error) else None)
        raise RequestError(400, one_line(error), parameter, "invalid_value") from error
