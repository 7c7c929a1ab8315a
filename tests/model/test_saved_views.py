# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A model with views, a newline and videos: saved, pickled, in int8, spread over devices.

test_auto_classes.py loads it without the package, and test_quantization.py in 4 bits.
"""

import copy
import pickle

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText

from modeling_deco import DecoForConditionalGeneration
from modeling_deco.inference.quantization import quantize_to_int8

PICTURE, FRAMES = tiny.picture(0, 40, 110), [tiny.picture(seed) for seed in range(3)]
TEXT = "<image> what is <video> this ?"


@pytest.fixture(scope="module")
def model():
    return tiny.build_family("llava_onevision")


@pytest.fixture(scope="module")
def inputs(model):
    processor = tiny.build_family_processor(model.config)
    return processor(images=[PICTURE], videos=[FRAMES], text=TEXT, return_tensors="pt")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    model.save_pretrained(folder)
    tiny.build_family_processor(model.config).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_newline_is_saved_and_loaded(dtype, model, folder, inputs, tmp_path):
    loaded, report = DecoForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.model.image_newline.dtype == dtype
    assert torch.equal(loaded.model.image_newline, model.model.image_newline.to(dtype))
    loaded.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.model.image_newline.dtype == dtype
    assert torch.equal(logits(again, inputs), logits(loaded, inputs))
    assert (logits(loaded, inputs) - logits(model, inputs)).abs().max() < (1e-6 if dtype == torch.float32 else 1)


def test_a_model_with_views_is_pickled_and_copied(model, inputs):
    expected = logits(model, inputs)
    uncalled = tiny.build_family("llava_onevision")  # transformers' hooks of the first call cannot be pickled
    for other in (pickle.loads(pickle.dumps(uncalled)), copy.deepcopy(model)):
        assert torch.equal(logits(other, inputs), expected)
    processor = pickle.loads(pickle.dumps(tiny.build_family_processor(model.config)))
    again = processor(images=[PICTURE], videos=[FRAMES], text=TEXT, return_tensors="pt")
    assert torch.equal(again["pixel_values"], inputs["pixel_values"])
    assert torch.equal(again["pixel_values_videos"], inputs["pixel_values_videos"])


def test_int8_leaves_the_newline(model, inputs):
    quantized = copy.deepcopy(model)
    quantize_to_int8(quantized)
    assert torch.equal(quantized.model.image_newline, model.model.image_newline)
    expected, found = logits(model, inputs), logits(quantized, inputs)
    assert found.isfinite().all()
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("device_map", ["auto", "sequential"])
def test_a_model_with_views_is_spread_over_devices(device_map, model, folder, inputs, tmp_path):
    pytest.importorskip("accelerate")
    size = sum(parameter.nbytes for parameter in model.parameters())
    spread = AutoModelForImageTextToText.from_pretrained(
        folder, device_map=device_map, max_memory={"cpu": size // 2}, offload_folder=tmp_path
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(logits(spread, inputs), logits(model, inputs))
    arguments = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(spread.generate(**inputs, **arguments), model.generate(**inputs, **arguments))


def test_the_layers_that_are_not_split_are_those_of_the_model(model):
    plain = DecoForConditionalGeneration(tiny.build_config("siglip", "qwen2"))
    assert model._no_split_modules == plain._no_split_modules
    assert model._no_split_modules <= {type(module).__name__ for module in model.modules()}
