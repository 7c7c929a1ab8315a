# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Chat templates that show images, and mark for training what the assistant writes.

`CHAT_TEMPLATES` has them by name. `adapt_chat_template` finds the one of a language model whose own template knows
text alone.

This file is part of the code that a checkpoint carries for `trust_remote_code=True`.
"""

import json

from transformers.utils.chat_template_utils import render_jinja_template  # private, seen in transformers 5.19 to 5.24

IMAGE_TOKEN = "<image>"  # noqa: S105

# A message's content is a string or parts. Images stand where their parts stand; a line break follows those that come
# before all text, as in LLaVA's data.
_TEXT = """\
{%- macro text(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- set seen = namespace(text=false) -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}
{{- '<image>' + ('' if seen.text else '\\n') -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}{%- set seen.text = true -%}
{%- else -%}
{{- raise_exception('Only text and images can be shown, got ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# Formats in which every role's message has the same form.
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


# Formats that have no system message: it begins the first message of the user.
_SYSTEM_IN_FIRST = """\
{%- set first = namespace(text='') -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set first.text = text(messages[0]['content']) + '\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
"""

# What LLaVA's stage 1 has (llava/conversation.py, conv_llava_plain): an image, its caption, a line break.
PLAIN_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- if message['role'] == 'assistant' -%}
{% generation %}{%- for part in parts -%}{{- part['text'] -}}{%- endfor -%}{{- '\\n' -}}{% endgeneration %}
{%- else -%}
{%- for part in parts if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""

# LLaVA-1.5's `vicuna_v1` (haotian-liu/LLaVA, llava/conversation.py, conv_vicuna_v1), in which it was trained. Without
# "<s>", which the tokenizer adds: processors tokenize what they render with special tokens. The space before an answer
# is the answer's, since Llama's tokens begin with their space. Images come first, as in LLaVA-1.5's data.
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
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
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

# Mistral's, as Mistral-7B-Instruct-v0.3 has it; a system message stays with the first question, so that what was said
# never changes when the conversation goes on.
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
    """A template with a system message for conversations that have none."""
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

# Where a tokenizer has no template: the first format whose tokens are all in the vocabulary is its format.
_MARKS = {
    "llama3": ("<|start_header_id|>", "<|eot_id|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "mistral": ("[INST]", "[/INST]"),
}

# Goes in front of a template that takes strings alone: it joins the parts of each message into a string.
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
    """Messages and the start of an answer in a template's format; None where it fails. It runs in Jinja's sandbox."""
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
    """Whether a template writes `<image>`, once for one image, beside the text."""
    rendered = render(template, PROBE_CONVERSATION, **special_tokens) or ""
    return rendered.count(IMAGE_TOKEN) == 1 and all(
        words in rendered for words in ("What is this?", "A cat.", "Sure?")
    )


def adapt_chat_template(template: str | None, vocabulary, render=render, **special_tokens) -> str | None:
    """Make a language model's chat template show images.

    The format of `CHAT_TEMPLATES` is recognized by what the template makes of text, a default system message included,
    or, without a template, by the vocabulary. Any other template that renders text is kept, with `<image>` written
    into its messages; it has no marks for training.

    Args:
        template: the model's own, for text; None where it has none.
        vocabulary: the tokenizer's tokens.
        render: what renders untrusted templates in place of `render`.
        special_tokens: of the tokenizer, by name, as templates have them: `bos_token`, `eos_token`.

    Returns:
        The template, or None where nothing is recognized.
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
    """A template for messages of parts, from one that takes strings alone."""
    return _PARTS_TO_TEXT + template


def _with_systems_of(candidate: str, rendered: str, **special_tokens) -> str | None:
    """The candidate, with the default system message of what another template rendered of `_TURNS`; None where they
    are not of one format."""
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
    """A template by its name in `CHAT_TEMPLATES`, or a Jinja file.

    Raises:
        ValueError: there is neither.
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
