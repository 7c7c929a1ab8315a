# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""transformers' common suite on DeCo's processor, with a tokenizer and an image processor built here."""

import unittest

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast
from transformers_tests.test_processing_common import ProcessorTesterMixin

from modeling_deco import DecoProcessor

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class DecoProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = DecoProcessor

    @classmethod
    def _setup_tokenizer(cls):
        special_tokens = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
        tokens = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            extra_special_tokens={"image_token": "<image>"},
        )

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})

    @staticmethod
    def prepare_processor_dict():
        return {"pooled_grid_size": 2, "chat_template": CHAT_TEMPLATE}
