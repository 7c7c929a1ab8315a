# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the digits world: one token per word, number or punctuation mark, and a chat template.

A conversation becomes `<bos><user><image>Is there a 7?<assistant>7 yes.<eos>`. The template marks the answer and its
`<eos>` with `{% generation %}`, so an assistant-only loss trains exactly the tokens that the model generates.
"""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .questions import BOX_UNIT
from .scenes import COLOURS, IMAGE_SIZE

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>")
WORDS = (
    *(str(number) for number in range(IMAGE_SIZE // BOX_UNIT + 1)),
    *COLOURS,
    *("yes", "no", "is", "there", "a", "how", "many", "digit", "digits", "are", "what", "colour", "the", "read"),
    *("left", "of", "above", "where", ".", "?"),
)

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{ content | trim }}
{%- else -%}
{%- for part in content -%}
{{ '<' + part['type'] + '>' if part['type'] in ('image', 'video') else (part['text'] | trim) }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<assistant>' -}}
{%- generation -%}
{{- render(message['content']) + eos_token -}}
{%- endgeneration -%}
{%- else -%}
{{- '<user>' + render(message['content']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<assistant>' -}}
{%- endif -%}
"""


def build_tokenizer(video_words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 58 tokens: the words of the questions and answers, in lower case.

    Args:
        video_words: the words of questions about clips. With them there are also `<video>` and these words, behind
            the 58 tokens.
    """
    words = SPECIAL_TOKENS + WORDS + (("<video>", *video_words) if video_words else ())
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    # used only because it puts no space before a full stop or a question mark
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "user_token": "<user>",
            "assistant_token": "<assistant>",
            **({"video_token": "<video>"} if video_words else {}),
        },
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
