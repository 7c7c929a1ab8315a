# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""transformers' common suites on DeCo's configuration and models."""

import unittest

import pytest
from deco_model_tester import DecoModelTester, Dinov2GemmaTester, Siglip2Qwen3Tester
from transformers_tests import test_modeling_common
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from modeling_deco import DecoConfig, DecoForConditionalGeneration, DecoModel


@pytest.fixture(autouse=True, scope="module")
def deco_in_the_name_tables():
    """Add DeCo to the tables in which the suite looks up models with labels and base models."""
    with pytest.MonkeyPatch.context() as patch:
        for table, name in (
            ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "DecoForConditionalGeneration"),
            ("MODEL_MAPPING_NAMES", "DecoModel"),
        ):
            patch.setattr(test_modeling_common, table, {**getattr(test_modeling_common, table), "deco": name})
        yield


class DecoModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    model_tester_class = DecoModelTester
    all_model_classes = (DecoModel, DecoForConditionalGeneration)
    test_all_params_have_gradient = False  # the last norm of the vision tower is not used, as in LLaVA
    _is_composite = True

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self,
            config_class=DecoConfig,
            has_text_modality=False,
            common_properties=["image_token_id", "image_token_index", "pooled_grid_size", "num_image_tokens"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_mismatching_num_image_tokens(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            with pytest.raises(ValueError, match="1 image.* give 4 features .* 12 placeholders"):
                model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
            with pytest.raises(ValueError, match="3 image.* give 12 features .* 4 placeholders"):
                model(input_ids=inputs["input_ids"][:1], pixel_values=inputs["pixel_values"])


class Siglip2Qwen3Test(DecoModelTest):
    model_tester_class = Siglip2Qwen3Tester


class Dinov2GemmaTest(DecoModelTest):
    model_tester_class = Dinov2GemmaTester
