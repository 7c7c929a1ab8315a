# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page of `deco page` and of a Hub Space: a picture, a question, a token budget, and what each word rests on.

Nothing is asked of other hosts, neither by the server nor by the browser, once the model is loaded.
"""

import asyncio
import hmac
import html
import io
import ipaddress
import logging
import math
import os
import re
import secrets
import sys
import tempfile
import webbrowser
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .. import SHIPPED_CHECKPOINT
from ..configuration_deco import num_image_tokens, parse_grid
from ..inference.costs import PrefillClock, now, peak_gpu_memory, reset_peak_gpu_memory
from ..inference.generation import encode, load, stream
from ..inference.images import UNTRUSTED_LIMITS, ImageError, PictureReader
from ..inference.info import format_size, kv_cache_bytes
from ..inference.loading import is_out_of_memory
from ..inference.prompt_cache import PromptCache
from ..relevance.explain import Relevance, describe_peak, draw_heat_map, explain
from ..serving.app import Server
from ..serving.sockets import bind
from ..utils.errors import one_line

try:
    import gradio as gr
    from fastapi import FastAPI
    from gradio.networking import setup_tunnel  # private, seen in gradio 6.31
    from gradio.utils import get_upload_folder  # private, seen in gradio 6.31
    from matplotlib.figure import Figure
    from starlette.datastructures import Headers
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import PlainTextResponse
except ImportError as error:
    raise ImportError(f"The page needs {error.name}: pip install 'modeling-deco[page]'") from None

# Rendered by worlds/digits/world.py from held-out scans, with questions in the shipped checkpoint's vocabulary.
SHIPPED_EXAMPLES = [
    ("1.png", "What colour is the 2?"),
    ("2.png", "Read the digits."),
    ("3.png", "Where is the 6?"),
    ("4.png", "Is the 6 left of the 1?"),
]
SHIPPED_ABOUT = "It knows handwritten digits and nothing else: how many, which, what colour, where."

CSS = """
#picture img, #map img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
#examples .container { width: 4.5rem; height: 4.5rem; }
"""

_ANSWER_CSS = """
p { margin: 1em 0 0; min-height: 1.6em; font-size: 1.6em; line-height: 1.6; }
p { white-space: pre-wrap; overflow-wrap: anywhere; }
button { padding: 0 0.1em; border: none; border-bottom: 2px dotted; background: none; color: inherit; font: inherit; }
button:hover { cursor: pointer; background: var(--color-accent-soft); }
button[aria-pressed=true] { border-color: transparent; background: var(--color-accent); color: white; }
"""

_COSTS_CSS = """
table, p { width: 100%; margin: 1.5em 0 0; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4em 0.8em 0.4em 0; text-align: left; vertical-align: top; }
td { border-top: 1px solid var(--border-color-primary); }
td:last-child { overflow-wrap: anywhere; }
"""

# Which word is pressed is told here and not by the server, whose new HTML would take the keyboard's focus away.
_ANSWER_JS = """
element.addEventListener('click', (event) => {
    const word = event.target.closest('button');
    if (!word) return;
    element.querySelectorAll('button').forEach((one) => one.setAttribute('aria-pressed', one === word));
    trigger('click', {word: Number(word.dataset.word)});
});
"""

_MAX_QUESTION_LENGTH = 2000  # characters

_NO_FILE = "The image cannot be read: it was not uploaded, or too long ago."

_CAPTION = "Click a word of the answer to see what it rests on."

# The slider's line of text, as the slider moves; `_budget` writes the same where the page begins.
_BUDGET_JS = "(n) => ({__type__: 'update', info: `${n} x ${n} = ${n * n} tokens for the picture`})"


@dataclass
class _Answer:
    """An answer on the page, and where it came from.

    Attributes:
        path: of the picture, in the folder for uploads.
        side: of its grid; None for the processor's own.
        relevance: of the words, once one has been clicked.
    """

    path: str
    question: str
    side: int | None
    text: str
    relevance: Relevance | None = None


@dataclass
class _Session:
    """What a browser's tab has asked last, the rows of its table by grid side, and the answer that it shows."""

    path: str
    question: str
    answer: _Answer | None = None
    costs: dict[int | None, dict] = field(default_factory=dict)


def build_page(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    name: str = "DeCo",
    about: str = "",
    examples: list[tuple[str, str]] | None = None,
    max_new_tokens: int = 128,
) -> gr.Blocks:
    """The page for one model, without its style, which `launch` adds (`CSS`).

    One request runs at a time, in the order in which they came; what a browser tab has asked is known to it alone.

    Args:
        model: a `DecoForConditionalGeneration`.
        processor: its `DecoProcessor`, with a chat template.
        name: the model's, in the title.
        about: a sentence on it, in Markdown.
        examples: paths of pictures, each with a question.
        max_new_tokens: longest answer, in tokens.
    """
    default_side, largest_side = _sides(model.config, processor)
    dtype = model.get_input_embeddings().weight.dtype
    prompts, pictures = PromptCache(model), _EncodedPictures(model)

    def check(upload):
        """Tell of a file that is no picture when it comes, and take it off the page."""
        try:
            _read(_path(upload))
        except ImageError as error:
            gr.Warning(html.escape(str(error)))
            return None
        return gr.skip()

    def ask(upload, question, side, session):
        with _shown_errors():
            side = _check_side(side, largest_side)
            session, messages = _begin(upload, question, session)
        budget = _budget(grid(side))
        yield _answer_html("", budget), None, _CAPTION, gr.skip(), session
        for text, row in answer_at(side, messages, prompts):
            if row is None:
                yield _answer_html(text, budget), *[gr.skip()] * 4
        session.answer = _Answer(session.path, session.question, side, text)
        session.costs[side] = row
        shown = _answer_html(text or "(no answer)", budget, clickable=bool(text))
        yield shown, *[gr.skip()] * 2, _costs_html(session.costs.values()), session

    def compare(upload, question, session):
        with _shown_errors():
            session, messages = _begin(upload, question, session)
        sides = {default_side, *(largest_side >> power for power in range(4))} - {0} if largest_side else {None}
        yield _costs_html(session.costs.values()), session
        for side in sorted(sides - session.costs.keys()):
            for _, row in answer_at(side, messages):
                if row is not None:
                    session.costs[side] = row
                yield _costs_html(session.costs.values()), session  # where a closed tab stops the generation

    def show_word(session, event: gr.EventData):
        if session is None or session.answer is None:
            raise gr.Error("This page was left for too long; ask again.", print_exception=False)
        answer, word = session.answer, getattr(event, "word", None)
        if answer.relevance is None:
            with _shown_errors():
                answer.relevance = _explain(model, processor, answer)
        if word not in answer.relevance.word_ids:
            raise gr.Error("The answer has no such word.", print_exception=False)
        index = answer.relevance.word_ids.index(word)
        word, peak = answer.relevance.tokens[index], describe_peak(answer.relevance, index)
        caption = f"“{word}” rests on the bright patches ({peak})."
        return gr.update(value=_draw(answer.relevance, index), alt_text=caption), html.escape(caption), session

    def grid(side):
        return processor.pooled_grid_size if side is None else side

    def answer_at(side, messages, prompt_cache=None):
        """The answer so far, each time that it grows, and None; at last with its row of the table, whose figures are
        those of this very run."""
        reset_peak_gpu_memory()
        text = ""
        with _shown_errors(), pictures.in_use(), PrefillClock(model) as prefill:
            inputs = encode(processor, messages, side)
            pieces = stream(model, processor, inputs, max_new_tokens=max_new_tokens, prompt_cache=prompt_cache)
            with closing(pieces):
                for piece in pieces:
                    text += piece
                    yield text, None
        tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
        milliseconds = 1000 * (pictures.seconds + prefill.seconds)
        row = {"Tokens": tokens, "Prefill": f"{milliseconds:.{0 if milliseconds >= 10 else 1}f} ms"}
        if pictures.seconds == 0:
            row["Prefill"] += " *"
        row["KV cache"] = format_size(kv_cache_bytes(model.config.get_text_config(), tokens, dtype))
        if model.device.type == "cuda":
            row["Peak GPU memory"] = format_size(peak_gpu_memory() - prompts.num_bytes)  # of this question alone
        yield text.strip(), row | {"Answer": text.strip()}

    with gr.Blocks(title=f"DeCo: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        session = gr.State(None, time_to_live=3600)
        gr.Markdown(f"# {name}\n{about}")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=320, elem_id="picture")
                placeholder = examples[0][1] if examples else "What is in the picture?"
                question = gr.Textbox(label="Question", placeholder=placeholder, max_length=_MAX_QUESTION_LENGTH)
                if examples:
                    rows = [list(example) for example in examples]
                    gr.Examples(
                        rows, [picture, question], cache_examples=False, visible_columns=[0], elem_id="examples"
                    )
                side = gr.Slider(
                    1,
                    largest_side or default_side + 1,  # gradio wants it above the minimum
                    default_side,
                    step=1,
                    precision=0,
                    label="Token budget",
                    info=_budget(default_side),
                    elem_id="budget",
                    visible=largest_side is not None,
                )
                button = gr.Button("Ask", variant="primary")
            with gr.Column():
                answer = gr.HTML(
                    _answer_html("", "It appears here, word by word."),
                    label="Answer",
                    show_label=True,
                    container=True,
                    css_template=_ANSWER_CSS,
                    js_on_load=_ANSWER_JS,
                    elem_id="answer",
                )
                word_map = gr.Image(
                    label="What a word rests on",
                    show_label=False,
                    format="png",
                    height=320,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="map",
                )
                caption = gr.HTML(_CAPTION, js_on_load=None, elem_id="caption")
                costs = gr.HTML(
                    _costs_html([]),
                    label="What each budget costs",
                    show_label=True,
                    container=True,
                    css_template=_COSTS_CSS,
                    apply_default_css=False,
                    js_on_load=None,
                    elem_id="costs",
                )
                comparison = gr.Button("Compare budgets", visible=largest_side is not None)

        side.change(None, side, side, js=_BUDGET_JS)
        # gradio does not preprocess, since it would open the picture itself, and fail in its own words
        raw = {"preprocess": False, "api_visibility": "private"}
        picture.upload(check, picture, picture, **raw, show_progress="hidden")
        one_at_a_time = raw | {"concurrency_id": "model", "concurrency_limit": 1}
        gr.on(
            [button.click, question.submit],
            ask,
            [picture, question, side, session],
            [answer, word_map, caption, costs, session],
            show_progress_on=answer,
            **one_at_a_time,
        )
        comparison.click(
            compare,
            [picture, question, session],
            [costs, session],
            show_progress_on=[costs, comparison],
            **one_at_a_time,
        )
        answer.click(show_word, session, [word_map, caption, session], show_progress_on=word_map, **one_at_a_time)
    return page


def launch(
    model: str = str(SHIPPED_CHECKPOINT),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    password: str | None = None,
    share: bool = False,
    open_browser: bool = False,
    max_new_tokens: int = 128,
    **load_arguments,
) -> None:
    """Load a model and serve its page, until interrupted.

    Args:
        model: folder or Hub id.
        host: `"0.0.0.0"` to be reached from other machines.
        port: default: the first that is free from 7860 on; 0 is any that is free.
        password: what users must enter, under any user name.
        share: also ask gradio.live for a public address, through which everything goes.
        open_browser: show the page here.
        max_new_tokens: longest answer, in tokens.
        load_arguments: of `modeling_deco.inference.load`.

    Raises:
        ValueError: host and port cannot be listened on, or the password is empty.
        OSError, ValueError, ImportError: see `load`.
    """
    if password == "":
        raise ValueError("The password is empty.")
    with _bind(host.strip("[]"), port) as listener, tempfile.TemporaryDirectory(prefix="deco-page-") as uploads:
        loaded, processor = load(model, **load_arguments)
        _warm_up(loaded, processor)
        is_shipped = Path(model).exists() and Path(model).samefile(SHIPPED_CHECKPOINT)
        about = f"{loaded.num_parameters() / 1e6:.1f} M parameters. "
        os.environ["GRADIO_TEMP_DIR"] = uploads  # of this page alone, and gone with it
        page = build_page(
            loaded,
            processor,
            name=Path(model).resolve().name,
            about=about + (SHIPPED_ABOUT if is_shipped else ""),
            examples=[(str(SHIPPED_CHECKPOINT / "examples" / file), text) for file, text in SHIPPED_EXAMPLES]
            if is_shipped
            else None,
            max_new_tokens=max_new_tokens,
        )
        address, port = listener.getsockname()[:2]
        is_local = ipaddress.ip_address(address.partition("%")[0]).is_loopback and not share
        if not is_local and password is None:
            sys.stderr.write("There is no password: whoever reaches the page can use it. DECO_PASSWORD sets one.\n")
        hosts = [host.strip("[]"), "localhost", "127.0.0.1", "::1", "[::1]"] if is_local else None
        app = build_app(page, password, hosts)
        host = f"[{address}]" if ":" in address else address
        announcement = f"Running on local URL:  http://{host}:{port}"
        if share:
            public_url = setup_tunnel(address, port, secrets.token_urlsafe(32), None, None)
            announcement += f"\nRunning on public URL: {public_url}"
        server = _Server(app, announcement=announcement)
        server.shown_url = f"http://{host}:{port}" if open_browser else None
        with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has shut down
            server.run([listener])


def build_app(page: gr.Blocks, password: str | None = None, hosts: list[str] | None = None) -> FastAPI:
    """The ASGI application of a page, with limits on requests.

    Args:
        password: what users must enter, under any user name.
        hosts: what a request's `Host` header may say. A page for one machine alone must say it, or a web page whose
            name resolves to that machine can use it (DNS rebinding). Default: anything.
    """

    def is_right(user_name, given):
        return hmac.compare_digest(given.encode(errors="replace"), password.encode())

    # private, seen in gradio 6.31
    page.state_session_capacity = 1000  # of which the oldest goes when one more comes
    page.has_launched = True  # or requests may name files of this machine
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page.queue(max_size=64, api_open=False),
        "/",
        auth=None if password is None else is_right,
        auth_message="Any user name, and the password of this page.",
        show_error=False,
        max_file_size=UNTRUSTED_LIMITS.max_bytes,
        theme=_theme(),
        css=CSS,
        footer_links=["gradio", "settings"],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
    )
    app.add_middleware(_Gate, uploads=Path(get_upload_folder()))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    return app


def _warm_up(model, processor) -> None:
    """Generate one token: the first answer takes longer, and a model that cannot answer fails now."""
    content = [{"type": "image", "image": Image.new("RGB", (64, 64))}, {"type": "text", "text": "?"}]
    for _ in stream(model, processor, [{"role": "user", "content": content}], max_new_tokens=1):
        pass


def _bind(host: str, port: int | None):
    """The socket of that port, by default of the first that is free from 7860 on."""
    if port is not None:
        return bind(host, port)
    bind(host, 0).close()  # the address is this machine's, or this says why not
    for port in range(7860, 7960):
        with suppress(ValueError):
            return bind(host, port)
    return bind(host, 0)


# What the browser asks a page for; gradio's server has much more, for pages of other kinds and for programs.
_ROUTES = {
    "GET": re.compile(
        r"/|/(assets|static|svelte)/.*|/config/?|/theme\.css|/(favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?)"
        r"|/gradio_api/(file=.*|heartbeat/\w+|queue/data|upload_progress|startup-events|login_check/?|user/?|info/?)"
    ),
    "POST": re.compile(r"/login/?|/gradio_api/(upload|queue/join|run/predict|cancel|reset)/?"),
}
_MAX_BODY = 2**20  # bytes of a request that is no upload
_MAX_UPLOADS = 2**30  # bytes of all uploads that are kept
_BODY_TIMEOUT = 60.0  # seconds


class _Gate:
    """ASGI middleware: routes that the page needs, requests from the page itself, of so many bytes, in so much time,
    and uploads that do not fill the disk."""

    def __init__(self, app, uploads: Path):
        self.app = app
        self.uploads = uploads
        self.examples = set(uploads.rglob("*"))
        self.num_bytes_arriving = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            status, message = refusal
            await PlainTextResponse(message, status)(scope, receive, send)
            return
        num_bytes = int(Headers(scope=scope).get("content-length", 0))
        if scope["path"].startswith("/gradio_api/upload"):
            await asyncio.to_thread(self._make_room, num_bytes)
        self.num_bytes_arriving += num_bytes
        deadline = asyncio.get_running_loop().time() + _BODY_TIMEOUT
        has_arrived = False

        async def receive_in_time():
            nonlocal has_arrived
            if has_arrived:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                return {"type": "http.disconnect"}
            has_arrived = not message.get("more_body", False)
            return message

        connection = scope["state"].get("connection")  # None under another server
        try:
            with nullcontext() if connection is None else connection.request():
                await self.app(scope, receive_in_time, send)
        except ClientDisconnect:  # in the middle of its request
            pass
        finally:
            self.num_bytes_arriving -= num_bytes

    def _refusal(self, scope) -> tuple[int, str] | None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in _ROUTES or not _ROUTES[method].fullmatch(scope["path"]):
            return 404, "There is no such page."
        if method == "GET":
            return None
        headers = Headers(scope=scope)
        origin = headers.get("origin")  # which browsers send, and web pages cannot change
        if origin is not None and urlsplit(origin).netloc not in (
            headers.get("host"),
            headers.get("x-forwarded-host"),
        ):
            return 403, "Another site's page cannot use this one."
        if not re.fullmatch(r"[0-9]{1,15}", headers.get("content-length", "")):
            return 411, "A request must say its length."
        is_upload = scope["path"].startswith("/gradio_api/upload")
        # an upload has headers and boundaries beside its file
        max_bytes = UNTRUSTED_LIMITS.max_bytes + 2**16 if is_upload else _MAX_BODY
        num_bytes = int(headers["content-length"])
        if num_bytes > max_bytes:
            return 413, f"The request has {num_bytes:,} bytes, more than the maximum of {max_bytes:,}."
        if self.num_bytes_arriving + num_bytes > _MAX_UPLOADS:
            return 503, "Too much is arriving; try again."
        return None

    def _make_room(self, num_bytes: int) -> None:
        """Delete the oldest uploads where there would be too many."""
        files = []
        for path in self.uploads.rglob("*"):
            with suppress(OSError):  # gone by now
                if path not in self.examples and path.is_file():
                    stat = path.stat()
                    files.append((stat.st_mtime, max(stat.st_size, 2**16), path))  # a file takes more than its bytes
        room = _MAX_UPLOADS - sum(size for _, size, _ in files) - num_bytes
        for _, size, path in sorted(files):
            if room >= 0:
                break
            path.unlink(missing_ok=True)
            room += size


class _Server(Server):
    shown_url: str | None = None

    async def startup(self, sockets=None):
        logging.getLogger("uvicorn.access").disabled = True  # a page is a hundred requests
        await super().startup(sockets)
        if self.shown_url is not None:
            webbrowser.open(self.shown_url)


def _theme() -> gr.themes.Base:
    # served by this server; of gradio 6.31's other fonts, also the default one, the semibold has no letters
    font = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))
    return gr.themes.Default(primary_hue="indigo", font=[font, "sans-serif"])


# --- parts -----------------------------------------------------------------------------------------------------------


def _sides(config, processor) -> tuple[int, int | None]:
    """Sides of the square grid nearest below the processor's and of the largest; None where there is no choice."""
    side, largest = math.isqrt(num_image_tokens(processor.pooled_grid_size)), min(config.patch_grid)
    return min(side, largest), largest if config.takes_any_grid and largest > 1 else None


def _budget(pooled_grid_size) -> str:
    rows, cols = parse_grid(pooled_grid_size)
    return f"{rows} x {cols} = {rows * cols} tokens for the picture"


def _path(upload):
    # a request that no browser made may hold anything
    return upload.get("path") if isinstance(upload, dict) else None


@cache
def _reader() -> PictureReader:
    return PictureReader()  # whose processes end with this one


def _read(path: str) -> Image.Image:
    try:
        # gradio checks where a path leads only if the request says that it is one
        file = Path(path).resolve()
        file.relative_to(Path(get_upload_folder()).resolve())
        encoded = file.read_bytes()
    except (TypeError, ValueError, OSError):  # no text, elsewhere, gone: errors that name folders of this machine
        raise ImageError(_NO_FILE) from None
    return _reader().read_sync(encoded)


def _check_side(side, largest: int | None) -> int | None:
    """The side of the grid that is asked for; None where there is no choice. A request may hold anything."""
    if largest is None:
        return None
    if type(side) is not int or not 1 <= side <= largest:
        raise ValueError(f"The token budget must be a whole number from 1 to {largest}.")
    return side


@contextmanager
def _shown_errors():
    """Errors become one line on the page. Those that are not the user's are in the log alone, which says where."""
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        raise gr.Error(html.escape(one_line(error)), print_exception=False) from error
    except Exception as error:
        if is_out_of_memory(error):
            message = "There is not enough memory for this; a smaller token budget needs less."
            raise gr.Error(message, print_exception=False) from error
        raise gr.Error("The page failed; its log says why.") from error


def _begin(upload: dict | None, question: str, session: _Session | None) -> tuple[_Session, list[dict]]:
    """The session as it goes on, with an empty table for another picture or question, and the model's messages."""
    question = question.strip() if isinstance(question, str) else ""
    if len(question) > _MAX_QUESTION_LENGTH:
        message = f"The question has {len(question):,} characters, more than the {_MAX_QUESTION_LENGTH:,} allowed."
        raise gr.Error(message, print_exception=False)
    if upload is None or not question:
        missing = "Choose a picture" if upload is None else "Write a question"
        raise gr.Error(f"{missing} first.", title="Not yet", print_exception=False)
    path = _path(upload)
    content = [{"type": "image", "image": _read(path)}, {"type": "text", "text": question}]
    if session is None or (session.path, session.question) != (path, question):
        session = _Session(path, question, session and session.answer)
    return session, [{"role": "user", "content": content}]


def _explain(model, processor, answer: _Answer) -> Relevance:
    image = _read(answer.path)
    words = explain(
        model, processor, image, answer.question, answer=answer.text, pooled_grid_size=answer.side
    ).by_word()
    return replace(words, query_to_patch=torch.empty(0))  # by far the largest part, which is not drawn


def _answer_html(text: str, note: str, clickable: bool = False) -> str:
    """The answer, with a button for each word that holds a letter or digit: these have maps."""
    parts, words = re.split(r"(\s+)", text), count()
    for index, part in enumerate(parts):
        parts[index] = html.escape(part)
        if part.strip():
            word = next(words)
            if clickable and any(character.isalnum() for character in part):
                parts[index] = f'<button type="button" data-word="{word}" aria-pressed="false">{parts[index]}</button>'
    return f'<p aria-live="polite">{"".join(parts)}</p><small>{note}</small>'


def _costs_html(rows: Iterable[dict]) -> str:
    """A table, with a row for each budget."""
    rows = sorted(rows, key=lambda row: row["Tokens"])
    if not rows:
        return "<p>A row for each budget that you ask at.</p>"
    lines = ["".join(f"<th scope='col'>{name}</th>" for name in rows[0])]
    lines += ["".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) for row in rows]
    table = f"<table aria-label='What each budget costs'>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    is_partial = any(row["Prefill"].endswith("*") for row in rows)
    return table + (
        "<small>* of the question alone: the picture was in the prompt cache</small>" if is_partial else ""
    )


def _draw(words: Relevance, index: int) -> Image.Image:
    height, width = words.image.shape[:2]
    figure = Figure(figsize=(4.8, 4.8 * height / width), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_heat_map(axes, words, index)
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)


@dataclass(frozen=True, eq=False)
class _EncodedPicture:
    """What the vision tower made of a picture, on the CPU."""

    inputs: list[torch.Tensor | None]  # the picture as the tower got it
    patch_features: torch.Tensor  # (1, num_patches, vision_hidden_size)
    patch_grid: tuple[int, int]
    seconds: float


class _EncodedPictures:
    """The pictures that were asked about lately: each is encoded once, whatever is asked, and at all budgets.

    Attributes:
        seconds: from the pixels to the picture's tokens, in the last answer; those of the vision tower are from when
            it ran. 0 where the tokens were in the prompt cache.
    """

    def __init__(self, model: PreTrainedModel, max_pictures: int = 8):
        self.model = model.model
        self.encode = self.model.get_image_features
        self.max_pictures = max_pictures
        self.kept: list[_EncodedPicture] = []  # the last is the latest
        self.seconds = 0.0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """`generate` asks the model's `get_image_features`, in whose place ours stands meanwhile."""
        self.seconds = 0.0
        self.model.get_image_features = self.get_image_features
        try:
            yield
        finally:
            del self.model.get_image_features  # of this instance; its class has its own

    def get_image_features(
        self, pixel_values, pooled_grid_sizes=None, pixel_attention_mask=None, spatial_shapes=None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """`DecoModel.get_image_features`, of one picture."""
        inputs = [pixel_values, pixel_attention_mask, spatial_shapes]
        start = now(pixel_values)
        picture = next((kept for kept in self.kept if all(map(_is_same, kept.inputs, inputs))), None)
        if picture is None:
            calls = []
            hook = self.model.multi_modal_projector.register_forward_pre_hook(
                lambda projector, args: calls.append((now(args[0]), *args))
            )
            try:
                features = self.encode(
                    pixel_values, pooled_grid_sizes, pixel_attention_mask, spatial_shapes, return_dict=True
                ).pooler_output
            finally:
                hook.remove()
            ((end, patch_features, patch_grid, _),) = calls
            kept = [None if part is None else part.cpu() for part in inputs]
            picture = _EncodedPicture(kept, patch_features.cpu(), patch_grid, end - start)
        else:
            self.kept.remove(picture)
            start -= picture.seconds
            patch_features = picture.patch_features.to(pixel_values.device)
            features = self.model.project_features(patch_features, [picture.patch_grid], pooled_grid_sizes)
        self.seconds = now(features[0]) - start
        self.kept = [*self.kept, picture][-self.max_pictures :]
        return BaseModelOutputWithPooling(pooler_output=features)


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other.cpu())


__all__ = ["build_app", "build_page", "launch"]
