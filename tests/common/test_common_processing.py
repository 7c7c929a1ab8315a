# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""transformers' common suite on DeCo's processor, with a tokenizer and an image processor built here."""

import unittest

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaNextImageProcessorPil, PreTrainedTokenizerFast
from transformers_tests.test_processing_common import ProcessorTesterMixin

from modeling_deco import DecoProcessor

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<' + part['type'] + '>\n' }}{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class DecoProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = DecoProcessor

    @classmethod
    def _setup_tokenizer(cls):
        special_tokens = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>"]
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
            extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        )

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})

    def _without_videos(self, test):
        """Run a test of the suite that passes videos to a video processor only, but always writes their token."""
        self.video_token = ""
        test()

    def test_processor_with_multiple_inputs(self):
        self._without_videos(super().test_processor_with_multiple_inputs)

    def test_replacement_offsets(self):
        self._without_videos(super().test_replacement_offsets)

    @staticmethod
    def prepare_processor_dict():
        return {"pooled_grid_size": 2, "patch_size": 2, "chat_template": CHAT_TEMPLATE}


class ViewsProcessorTest(DecoProcessorTest):
    """Pictures of an overview and tiles."""

    @classmethod
    def _setup_image_processor(cls):
        size = {"height": 8, "width": 8}
        return LlavaNextImageProcessorPil(size=size, crop_size=size, image_grid_pinpoints=[[8, 8], [8, 16], [16, 8]])

    @pytest.mark.skip(reason="without its arguments, the processor cannot count tokens of views")
    def test_tokenizer_decode_defaults(self):
        pass

    @staticmethod
    def prepare_processor_dict():
        settings = {"image_overview": True, "image_newline": True, "vision_aspect_ratio": "anyres"}
        return {**DecoProcessorTest.prepare_processor_dict(), "view_settings": settings}
