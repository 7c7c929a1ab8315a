# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Chat templates that show images and videos, and mark the assistant's words for training.

`CHAT_TEMPLATES` has them by name. `adapt_chat_template` finds the template for a language model whose own template
takes only text. `complete_chat_template` adds videos and marks to a template that shows images.

This file is saved with every checkpoint for `trust_remote_code=True`.
"""

import json
import re

from transformers.utils.chat_template_utils import render_jinja_template  # private, seen in transformers 5.19 to 5.24

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"

# A message's content is a string or a list of parts. Images and videos keep their position among the parts. A line
# break follows those that come before all text, as in LLaVA's data.
_TEXT = """\
{%- macro text(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- set seen = namespace(text=false) -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}
{{- '<image>' + ('' if seen.text else '\\n') -}}
{%- elif part['type'] == 'video' -%}
{{- '<video>' + ('' if seen.text else '\\n') -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}{%- set seen.text = true -%}
{%- else -%}
{{- raise_exception('Only text, images and videos can be shown, got ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# Formats in which the messages of all roles have the same form.
_UNIFORM = (
    _TEXT
    + """\
{{- START -}}
{%- for message in messages -%}
{{- HEADER -}}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{- CONTENT + END -}}{% endgeneration %}
{%- else -%}
{{- CONTENT + END -}}
{%- endif -%}
{{- AFTER -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{%- set message = {'role': 'assistant'} -%}{{- HEADER -}}{%- endif -%}
"""
)


def _uniform(header: str, end: str, after: str = "''", start: str = "''", content: str = "text(message['content'])"):
    parts = {"HEADER": header, "END": end, "AFTER": after, "START": start, "CONTENT": content}
    template = _UNIFORM
    for name, expression in parts.items():
        template = template.replace(name, expression)
    return template


# Formats without system messages: the system message is put in front of the user's first message.
_SYSTEM_IN_FIRST = """\
{%- set first = namespace(text='') -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set first.text = text(messages[0]['content']) + '\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
"""

# The format of LLaVA's stage 1 (llava/conversation.py, conv_llava_plain): an image or a video, its caption, a line
# break.
PLAIN_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- if message['role'] == 'assistant' -%}
{% generation %}{%- for part in parts -%}{{- part['text'] -}}{%- endfor -%}{{- '\\n' -}}{% endgeneration %}
{%- else -%}
{%- for part in parts -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- elif part['type'] == 'video' -%}{{- '<video>' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""

# `vicuna_v1`, LLaVA-1.5's training format (haotian-liu/LLaVA, llava/conversation.py, conv_vicuna_v1). It has no "<s>":
# processors tokenize rendered text with special tokens, so the tokenizer adds it. The space before an answer belongs
# to the answer, since Llama's tokens begin with their space. Images and videos come first, as in LLaVA-1.5's data.
VICUNA_SYSTEM = """\
{{- "A chat between a curious user and an artificial intelligence assistant. " -}}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
"""
VICUNA_CHAT_TEMPLATE = (
    """\
{%- macro text(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
{{- text(messages[0]['content']) + ' ' -}}
{%- set messages = messages[1:] -%}
{%- else -%}
"""
    + VICUNA_SYSTEM
    + """\
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' -}}
{%- if message['content'] is not string -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endif -%}
{%- if part['type'] == 'video' -%}{{- '<video>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- text(message['content']) + ' ' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{% generation %}{{- ' ' + text(message['content']) + eos_token -}}{% endgeneration %}
{%- else -%}
{{- raise_exception("Only user and assistant may speak after the system message, got " + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
)

# The format of Mistral-7B-Instruct-v0.3. A system message stays with the first question, so that the start of a
# conversation does not change when the conversation continues.
_MISTRAL = (
    _TEXT
    + _SYSTEM_IN_FIRST
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] ' + first.text + text(message['content']) + '[/INST]' -}}{%- set first.text = '' -%}
{%- elif message['role'] == 'assistant' -%}
{% generation %}{{- ' ' + text(message['content']) + eos_token -}}{% endgeneration %}
{%- else -%}
{{- raise_exception("Only user and assistant may speak after the system message, got " + message['role']) -}}
{%- endif -%}
{%- endfor -%}
"""
)

_GEMMA = (
    _TEXT
    + _SYSTEM_IN_FIRST
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<start_of_turn>user\\n' + first.text + text(message['content']) | trim + '<end_of_turn>\\n' -}}
{%- set first.text = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- '<start_of_turn>model\\n' -}}
{% generation %}{{- text(message['content']) | trim + '<end_of_turn>' -}}{% endgeneration %}
{{- '\\n' -}}
{%- else -%}
{{- raise_exception("Only user and assistant may speak after the system message, got " + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
)

_CHATML = _uniform("'<|im_start|>' + message['role'] + '\\n'", "'<|im_end|>'", after="'\\n'")


def _with_system(template: str, system: str) -> str:
    """A template that adds a system message to conversations without one."""
    message = '[{"role": "system", "content": ' + json.dumps(system) + "}]"
    return (
        f"{{%- if messages[0]['role'] != 'system' -%}}{{%- set messages = {message} + messages -%}}{{%- endif -%}}\n"
        + template
    )


CHAT_TEMPLATES = {
    "plain": PLAIN_CHAT_TEMPLATE,
    "vicuna": VICUNA_CHAT_TEMPLATE,
    "chatml": _CHATML,
    "llama3": _uniform(
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'",
        "'<|eot_id|>'",
        start="bos_token",
        content="text(message['content']) | trim",
    ),
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "phi3": _uniform("'<|' + message['role'] + '|>\\n'", "'<|end|>'", after="'\\n'"),
    "phi4": _uniform("'<|im_start|>' + message['role'] + '<|im_sep|>'", "'<|im_end|>'"),
    "phi4-mini": _uniform("'<|' + message['role'] + '|>'", "'<|end|>'"),
    "qwen2": _with_system(_CHATML, "You are a helpful assistant."),
    "qwen2.5": _with_system(_CHATML, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _CHATML,  # without its thinking
}

# If a tokenizer has no template, its format is the first one here whose tokens are all in the vocabulary.
_MARKS = {
    "llama3": ("<|start_header_id|>", "<|eot_id|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "mistral": ("[INST]", "[/INST]"),
}

# Comes before a template that takes only strings: it joins the parts of each message into a string.
_PARTS_TO_TEXT = (
    _TEXT
    + """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is defined and message['content'] is not none and message['content'] is not string -%}
{%- set message = dict(message, content=text(message['content'])) -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
)

# Comes before a template that shows images and no videos: a video becomes text, on a line of its own.
_VIDEOS_TO_TEXT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is iterable and message['content'] is not string -%}
{%- set kept = namespace(parts=[], videos='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}
{%- set kept.videos = kept.videos + '<video>\\n' -%}
{%- elif part['type'] == 'text' -%}
{%- set kept.parts = kept.parts + [dict(part, text=kept.videos + part['text'])] -%}{%- set kept.videos = '' -%}
{%- else -%}
{%- set kept.parts = kept.parts + [part] -%}
{%- endif -%}
{%- endfor -%}
{%- if kept.videos -%}{%- set kept.parts = kept.parts + [{'type': 'text', 'text': kept.videos}] -%}{%- endif -%}
{%- set message = dict(message, content=kept.parts) -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

# Renders a conversation by another template, SOURCE, and marks each answer with its end. An answer begins where the
# prompt for it ends; if the prompt is not the start of the rendered answer, it begins with its text.
_MARKED = """\
{% macro source(messages, add_generation_prompt) %}SOURCE{% endmacro %}
{%- set shown = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set before = source(messages[:loop.index0], true) -%}
{%- set after = source(messages[:loop.index], false) -%}
{%- if not after.startswith(before) -%}
{%- set mark = 'ANSWER' if message['content'] is string else [{'type': 'text', 'text': 'ANSWER'}] -%}
{%- set marked = source(messages[:loop.index0] + [dict(message, content=mark)], false) -%}
{%- set before = marked.rpartition('ANSWER')[0] -%}
{%- endif -%}
{{- before[shown.text | length:] -}}
{% generation %}{{- after[before | length:].rstrip() -}}{% endgeneration %}
{%- set shown.text = after.rstrip() -%}
{%- endif -%}
{%- endfor -%}
{{- source(messages, add_generation_prompt)[shown.text | length:] -}}
"""

_SYSTEM = {"role": "system", "content": "Be short."}
_TURNS = [
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
]
PROBE_CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
]


def render(template: str, messages: list[dict], **special_tokens) -> str | None:
    """Render messages and the start of an answer in Jinja's sandbox; None if the template fails."""
    try:
        rendered, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **special_tokens
        )
    except MemoryError:
        raise
    except Exception:  # whatever a template does wrong
        return None
    return rendered[0]


def shows_images(template: str, render=render, **special_tokens) -> bool:
    """Whether a template writes `<image>` once for one image, and keeps the text."""
    rendered = render(template, PROBE_CONVERSATION, **special_tokens) or ""
    return rendered.count(IMAGE_TOKEN) == 1 and all(
        words in rendered for words in ("What is this?", "A cat.", "Sure?")
    )


def complete_chat_template(template: str, **special_tokens) -> str:
    """A template that shows images, with what it lacks: videos, and marks around each answer and its end.

    What is rendered stays the same. A template is returned as it is if it lacks nothing, or if its answers cannot be
    found in what it renders.

    Args:
        special_tokens: the tokenizer's special tokens by name, as templates use them: `bos_token`, `eos_token`.
    """
    with_video = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is this?"}]}]
    if VIDEO_TOKEN not in (render(template, with_video, **special_tokens) or ""):
        shown = render(_VIDEOS_TO_TEXT + template, with_video, **special_tokens) or ""
        if shown.count(VIDEO_TOKEN) == 1 and "What is this?" in shown:
            template = _VIDEOS_TO_TEXT + template
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
    marked = _MARKED.replace("SOURCE", source.removesuffix("\n"))
    answers = _answers(marked, **special_tokens)
    is_same = all(
        render(marked, PROBE_CONVERSATION[:length], **special_tokens)
        == render(template, PROBE_CONVERSATION[:length], **special_tokens)
        for length in (1, 3)
    )
    is_found = len(answers) == 2 and "A cat." in answers[0] and "Yes." in answers[1]
    return marked if is_same and is_found and answers != _answers(template, **special_tokens) else template


def _answers(template: str, **special_tokens) -> list[str]:
    """What a template marks in a conversation with two answers."""
    conversation = [*PROBE_CONVERSATION, {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]
    if "generation" not in template:
        return []
    try:
        (text,), (marks,) = render_jinja_template(
            [conversation], chat_template=template, return_assistant_tokens_mask=True, **special_tokens
        )
    except MemoryError:
        raise
    except Exception:  # whatever a template does wrong
        return []
    return [text[start:end] for start, end in marks]


def adapt_chat_template(template: str | None, vocabulary, render=render, **special_tokens) -> str | None:
    """Adapt a language model's chat template to show images.

    The result is the template of `CHAT_TEMPLATES` that renders text as the model's own template does, including its
    default system message. Without a template, the vocabulary decides. Any other template that renders text is kept,
    and `<image>` is written into its messages; it does not mark the assistant's words for training.

    Args:
        template: the model's own template for text, or None.
        vocabulary: the tokenizer's tokens.
        render: a function that renders untrusted templates, with the signature of `render` here.
        special_tokens: the tokenizer's special tokens by name, as templates use them: `bos_token`, `eos_token`.

    Returns:
        The template, or None if no format is recognized.
    """
    if not template:
        names = (name for name, marks in _MARKS.items() if all(mark in vocabulary for mark in marks))
        return next((CHAT_TEMPLATES[name] for name in names), None)
    if shows_images(template, render, **special_tokens):
        return template
    plain = render(template, _TURNS, **special_tokens)
    if plain is None or any(message["content"] not in plain for message in _TURNS):
        return None
    for candidate in dict.fromkeys(CHAT_TEMPLATES.values()):
        adapted = _with_systems_of(candidate, plain, **special_tokens)
        if adapted is not None and all(
            render(template, messages, **special_tokens) in (None, render(adapted, messages, **special_tokens))
            for messages in (_TURNS[:1], [_SYSTEM, *_TURNS[:1]])
        ):
            return adapted
    wrapped = parts_to_text(template)
    return wrapped if shows_images(wrapped, render, **special_tokens) else None


def parts_to_text(template: str) -> str:
    """Make a template that takes messages of parts from one that takes only strings."""
    return _PARTS_TO_TEXT + template


def _with_systems_of(candidate: str, rendered: str, **special_tokens) -> str | None:
    """The candidate with the default system message found in `rendered`, another template's text of `_TURNS`. None if
    their formats differ."""
    if render(candidate, _TURNS, **special_tokens) == rendered:
        return candidate
    mark = "\x00system\x00"
    marked = render(candidate, [{"role": "system", "content": mark}, *_TURNS], **special_tokens) or ""
    before, found, after = marked.partition(mark)
    if not found or not (rendered.startswith(before) and rendered.endswith(after)):
        return None
    system = rendered[len(before) : len(rendered) - len(after)]
    return _with_system(candidate, system)


def read_chat_template(name_or_path: str) -> str:
    """Read a template by its name in `CHAT_TEMPLATES` or from a Jinja file.

    Raises:
        ValueError: there is no such name or file.
    """
    if name_or_path in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name_or_path]
    try:
        with open(name_or_path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        raise ValueError(
            f"The chat template {name_or_path!r} is neither the path of a Jinja file nor one of "
            f"{', '.join(CHAT_TEMPLATES)}."
        ) from None
