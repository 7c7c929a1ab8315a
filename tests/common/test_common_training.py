# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""transformers' suites for training, tensor parallelism and FSDP on DeCo."""

import math
import unittest
from types import SimpleNamespace

import pytest
import torch
from deco_model_tester import DecoModelTester, ViewsTester
from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers_tests.distributed_testing_utils import _start_rank_processes
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from modeling_deco import DecoForConditionalGeneration, DecoModel
from modeling_deco.modeling_deco import CACHE_NAME
from modeling_deco.views import num_map_tokens

pytestmark = pytest.mark.enable_socket  # processes communicate on localhost


class DecoWithImagesForConditionalGeneration(DecoForConditionalGeneration):
    """Puts an image before each text, in training and in generation, because the suites use text alone.

    The vision tower is frozen, as in LLaVA's training: its last norm is not used, but the checkpoint of an optimizer
    must have a state for each trained parameter.
    """

    def __init__(self, config):
        super().__init__(config)
        self.register_forward_pre_hook(_put_an_image_first, with_kwargs=True)

    @classmethod
    def from_config(cls, config):
        return cls(config)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        model = super().from_pretrained(*args, **kwargs)
        model.model.vision_tower.requires_grad_(False)
        return model


def _put_an_image_first(model, args, kwargs):
    input_ids = args[0] if args else kwargs["input_ids"]
    cache = kwargs.get(CACHE_NAME)
    if cache is not None and cache.get_seq_length() > 0:  # decoding: the image was in the prompt
        return args, kwargs
    config = model.config
    size = config.vision_config.image_size
    shape, image_sizes = (3, size, size), None
    if config.image_grid_pinpoints is not None:  # an overview and two tiles
        shape, image_sizes = (3, *shape), torch.tensor([[size, 2 * size]] * len(input_ids))
    pixel_values = torch.linspace(-1, 1, math.prod(shape), dtype=model.dtype).view(1, *shape)
    image_inputs = {"pixel_values": pixel_values.repeat(len(input_ids), *[1] * len(shape)), "image_sizes": image_sizes}
    num_tokens = num_map_tokens(model.model.image_maps(image_sizes=image_sizes)[0])
    input_ids = input_ids.masked_fill(input_ids == config.image_token_id, config.text_config.eos_token_id)
    input_ids[:, :num_tokens] = config.image_token_id
    return (), {**kwargs, "input_ids": input_ids, **image_inputs}


class OfText:
    """In the form in which the suites expect models of text."""

    causal_lm_class = DecoWithImagesForConditionalGeneration

    def get_config(self):
        config = super().get_config()
        config.vocab_size = self.vocab_size  # where these suites look for it
        return config


class TextModelTester(OfText, DecoModelTester):
    pass


class ViewsTextModelTester(OfText, ViewsTester):
    pass


class SetUp:
    all_model_classes = (DecoModel, DecoForConditionalGeneration)
    model_tester_class = TextModelTester
    model_tester = None

    def setUp(self):
        self.model_tester = self.model_tester_class(self)


class DecoOfAnyTokens(DecoForConditionalGeneration):
    """Can generate the image token, which is among the random tokens of the suite's text."""

    def _with_image_token(self, tokens):
        return tokens


class DecoTrainingTest(SetUp, TrainingTesterMixin, unittest.TestCase):
    def _get_trainable_model_class(self):
        return DecoOfAnyTokens  # the suite generates from a prompt of one token, which is too short for an image


@pytest.mark.usefixtures("every_model_type")
class DecoTensorParallelTest(SetUp, TensorParallelTesterMixin, unittest.TestCase):
    def _has_tp_plan(self):  # transformers 5.19 looks for the plan in the whole config, which has none
        return self.model_tester.get_config().text_config.base_model_tp_plan is not None


@pytest.mark.usefixtures("every_model_type")
class DecoFSDPTest(SetUp, FSDPTesterMixin, unittest.TestCase):
    def _get_tiny_config(self):
        config = self.model_tester.get_config()
        config.vocab_size = config.text_config.vocab_size = (
            100  # divisible by the number of ranks, or tied weights differ
        )
        return type(config), config.to_diff_dict()

    def _skip_if_insufficient_devices(self, *args):
        """Ranks on the CPU can share a core."""

    def _run_fsdp2_distributed_test(self, test_name, test_impl, *args, **kwargs):
        super()._run_fsdp2_distributed_test(test_name, _run_on_deco, test_impl, *args, **kwargs)


def only(*names):
    """Leave out the other tests of a class, each of which starts processes."""

    def decorate(test_case):
        for name in dir(test_case):
            if name.startswith("test_") and name not in names:
                setattr(test_case, name, None)
        return test_case

    return decorate


@only("test_training_overfit")
class ViewsTrainingTest(DecoTrainingTest):
    model_tester_class = ViewsTextModelTester


@only("test_tp_forward_0")  # its prompts for generation are too short for an image
class ViewsTensorParallelTest(DecoTensorParallelTest):
    model_tester_class = ViewsTextModelTester


@only("test_fsdp2_plan_vs_ddp_0_untied", "test_fsdp2_save_load")
class ViewsFSDPTest(DecoFSDPTest):
    model_tester_class = ViewsTextModelTester


def _run_on_deco(rank, config_class, config_dict, test_impl, *args, **kwargs):
    """Run a test of the suite in the process of a rank, with DeCo instead of `AutoModelForCausalLM`."""
    test_fsdp_mixin.AutoModelForCausalLM = DecoWithImagesForConditionalGeneration
    test_impl(rank, config_class, config_dict, *args, **kwargs)


@pytest.fixture
def every_model_type(monkeypatch):
    """Let the suites start processes for every model type, not only for their selection."""
    monkeypatch.setattr(test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES", None)
    monkeypatch.setattr(test_fsdp_mixin, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES", None)
    monkeypatch.setattr(test_fsdp_mixin, "AutoModelForCausalLM", DecoWithImagesForConditionalGeneration)
    for suite in (
        test_tensor_parallel_mixin,
        test_fsdp_mixin,
    ):  # the suites of transformers 5.19 start the processes themselves
        monkeypatch.setattr(suite, "mp", SimpleNamespace(spawn=_start_rank_processes), raising=False)
