# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""transformers' common suites on DeCo's configuration and models."""

import unittest

import pytest
from deco_model_tester import DecoModelTester, Dinov2GemmaTester, Siglip2Qwen3Tester, VideosTester, ViewsTester
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

    def _video_features_prepare_config_and_inputs(self):
        config, inputs = super()._video_features_prepare_config_and_inputs()
        if inputs["pixel_values_videos"].ndim == 4:  # the images, which become videos of one frame
            inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, None]
        return config, inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_mismatching_num_image_tokens(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        number = self.model_tester.num_image_tokens
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            image_inputs = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
            one_image = {name: value[:1] for name, value in image_inputs.items()}
            with pytest.raises(ValueError, match=f"1 image.* give {number} features .* {3 * number} placeholders"):
                model(**{**inputs, **one_image})
            with pytest.raises(ValueError, match=f"3 image.* give {3 * number} features .* {number} placeholders"):
                model(**image_inputs, input_ids=inputs["input_ids"][:1])


class Siglip2Qwen3Test(DecoModelTest):
    model_tester_class = Siglip2Qwen3Tester


class Dinov2GemmaTest(DecoModelTest):
    model_tester_class = Dinov2GemmaTester


class ViewsTest(DecoModelTest):
    model_tester_class = ViewsTester
    # the vision tower's batch has all views, as in LLaVA-NeXT
    skip_test_image_features_output_shape = skip_test_video_features_output_shape = True

    @pytest.mark.skip(reason="how many views a picture has depends on the values of image_sizes")
    def test_torch_export(self):
        pass


class VideosTest(DecoModelTest):
    model_tester_class = VideosTester
    skip_test_video_features_output_shape = True  # the vision tower's batch has all frames

    def test_mismatching_num_video_tokens(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = DecoForConditionalGeneration(config).eval()
        with pytest.raises(ValueError, match="1 video.* give 13 features .* 39 placeholders"):
            model(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:1]})
