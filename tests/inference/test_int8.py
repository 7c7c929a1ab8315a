# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""int8 for speed, on a CPU: every linear layer, by an arithmetic that is written down here once more."""

import copy
from collections import Counter

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.cli import app
from modeling_deco.inference import load, quantization, stream
from modeling_deco.inference.quantization import Int8Linear, quantize_to_int8
from modeling_deco.relevance import explain
from modeling_deco.worlds.digits.evaluate import accuracy_by_kind
from modeling_deco.worlds.digits.scenes import render


def linears(model) -> Counter:
    return Counter(type(module) for module in model.modules() if isinstance(module, (nn.Linear, Int8Linear)))


def in_integers(linear, features):
    """Weights of 8 bits, a scale per output; inputs of 7 bits, one scale and zero point; sums in integers."""
    weight, bias = linear.weight.double(), linear.bias.double()
    scales = weight.abs().amax(1) / 127
    weight = torch.round(weight / scales[:, None])
    low, high = min(features.min().item(), 0), max(features.max().item(), 0)
    scale = (high - low) / 127
    zero = round(-low / scale)
    rounded = torch.round(features.double() / scale) + zero
    return (((rounded - zero) @ weight.T) * scale * scales + bias).float()


@pytest.mark.newest
@pytest.mark.parametrize("shape", [(5, 48), (2, 7, 48)])
def test_a_layer_computes_in_integers(shape):
    torch.manual_seed(0)
    linear, features = nn.Linear(48, 24), torch.randn(shape)
    torch.testing.assert_close(Int8Linear(linear)(features), in_integers(linear, features), rtol=1e-3, atol=1e-3)


def test_outputs_of_very_different_size_keep_their_precision():
    torch.manual_seed(0)
    linear = nn.Linear(64, 2, bias=False)
    linear.weight.data *= torch.tensor([[1000.0], [0.001]])
    features = torch.randn(32, 64)
    expected = linear(features)
    error = (Int8Linear(linear)(features) - expected).norm(dim=0) / expected.norm(dim=0)
    assert error.max() < 0.05


def test_an_output_that_is_always_zero_stays_so():
    linear = nn.Linear(8, 2)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    assert Int8Linear(linear)(torch.randn(3, 8)).tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_every_linear_layer_of_all_parts_is_in_int8(vision):
    model = tiny.build_model(vision=vision)
    expected = linears(model)[nn.Linear]
    assert linears(quantize_to_int8(model)) == {Int8Linear: expected}


def test_answers_stay_near():
    torch.manual_seed(0)
    model = tiny.build_model().eval()
    inputs = tiny.build_processor()(images=tiny.picture(0), text="<image> what is this", return_tensors="pt")
    expected = model(**inputs).logits
    found = quantize_to_int8(model)(**inputs).logits
    assert 0 < (found - expected).norm() / expected.norm() < 0.1


def test_a_model_in_training_mode_answers_without_dropout():
    model = tiny.build_model().train()
    quantize_to_int8(model)
    assert [name for name, module in model.named_modules() if module.training] == []


def test_a_pytorch_without_the_kernels_tensors_is_named_with_what_to_install(monkeypatch):
    monkeypatch.delattr(torch, "quantize_per_channel")
    with pytest.raises(ValueError, match=r"which PyTorch 2\.\S+ does not have: pip install"):
        quantize_to_int8(nn.Sequential(nn.Linear(4, 4)))


def test_llava_takes_it_as_well():
    config = LlavaConfig(vision_config=tiny.VISION_CONFIGS["clip"], text_config=tiny.TEXT_CONFIGS["llama"])
    model = LlavaForConditionalGeneration(config)
    assert set(linears(quantize_to_int8(model))) == {Int8Linear}


def test_a_part_can_be_taken_alone():
    model = tiny.build_model()
    quantize_to_int8(model.model.vision_tower)
    assert set(linears(model.model.vision_tower)) == {Int8Linear}
    assert set(linears(model.model.language_model)) == {nn.Linear}


def test_subclasses_of_linear_layers_are_left_alone():
    class Quantized(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Quantized(4, 4))
    assert [type(layer) for layer in quantize_to_int8(model)] == [Int8Linear, Quantized]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_16_bits_answers_in_float32(dtype):
    model = tiny.build_model().to(dtype)
    inputs = tiny.build_processor()(images=tiny.picture(0), text="<image> what is this", return_tensors="pt")
    assert quantize_to_int8(model)(**inputs).logits.dtype == torch.float32


def test_a_copy_answers_alike():
    model = quantize_to_int8(tiny.build_model())
    inputs = tiny.build_processor()(images=tiny.picture(0), text="<image> what is this", return_tensors="pt")
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


def test_such_a_model_is_not_saved_without_its_weights(tmp_path):
    model = quantize_to_int8(tiny.build_model())
    with pytest.raises(RuntimeError, match=r"vision_tower\S* is in int8 and cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("move", [lambda model: model.to(torch.bfloat16), lambda model: model.half()])
def test_such_a_model_is_not_moved_without_its_weights(move):
    model = quantize_to_int8(tiny.build_model())
    with pytest.raises(RuntimeError, match="must stay on the CPU and in float32"):
        move(model)
    model.to("cpu").float()


def test_a_model_on_no_device_is_refused():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="on a CPU or on one CUDA device, not on meta"):
        quantize_to_int8(nn.Sequential(model))


@pytest.fixture(scope="module")
def scene():
    return render("test", index=10, seed=2026, min_digits=4)


def test_relevance_is_refused(scene):
    with pytest.raises(ValueError, match="A model in int8 cannot be differentiated; load it without."):
        explain(*load(str(SHIPPED_CHECKPOINT), in_int8=True), scene.image, "Read the digits.")


def test_deco_ask_answers_in_int8(scene, tmp_path):
    scene.image.save(tmp_path / "digits.png")
    digit = scene.digits[0]
    question = f"What colour is the {digit.value}?"
    result = CliRunner().invoke(app, ["ask", str(tmp_path / "digits.png"), question, "--int8"])
    assert (result.exit_code, result.stdout) == (0, f"{digit.value} {digit.colour}.\n")


def test_what_is_in_4_bits_stays_so():
    pytest.importorskip("bitsandbytes")
    model, _ = load(str(SHIPPED_CHECKPOINT), in_4bit=True, in_int8=True)
    assert {
        type(layer).__name__ for layer in model.model.language_model.modules() if isinstance(layer, nn.Linear)
    } == {"Linear4bit"}
    assert set(linears(model.model.vision_tower)) == {Int8Linear}


@pytest.mark.slow
@pytest.mark.parametrize("grid", [3, 6, 12])
def test_the_digits_checkpoint_loses_at_most_two_points(grid):
    plain = AutoModelForImageTextToText.from_pretrained(SHIPPED_CHECKPOINT)
    models = [plain, quantize_to_int8(copy.deepcopy(plain))]
    processor = AutoProcessor.from_pretrained(SHIPPED_CHECKPOINT)
    before, after = (accuracy_by_kind(model, processor, "test", 500, pooled_grid_size=grid) for model in models)
    for kind in before:
        assert after[kind]["accuracy"] >= before[kind]["accuracy"] - 2


@pytest.fixture
def quantize_tower(monkeypatch):
    """What is done on CUDA, which torchao does on a CPU too; without compiling."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(nn.Module, "compile", lambda module: None)
    return torch.no_grad()(quantization._quantize_tower_on_cuda)


def test_what_is_done_on_cuda_keeps_the_rest_in_bfloat16_and_may_be_done_twice(quantize_tower):
    model = tiny.build_model()
    pixels = tiny.pixels(2)
    expected = torch.cat(model.get_image_features(pixels).pooler_output)
    found = torch.cat(quantize_tower(quantize_tower(model)).get_image_features(pixels.bfloat16()).pooler_output)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_what_is_done_on_cuda_goes_with_4_bits_in_the_language_model(quantize_tower, scene):
    pytest.importorskip("bitsandbytes")
    model, processor = load(str(SHIPPED_CHECKPOINT), in_4bit=True)
    question = [{"type": "image", "image": scene.image}, {"type": "text", "text": "Read the digits."}]
    pieces = stream(quantize_tower(model), processor, [{"role": "user", "content": question}])
    assert "".join(pieces) == " ".join(str(digit.value) for digit in scene.digits) + "."


@pytest.mark.gpu
def test_on_cuda_the_vision_tower_is_in_int8_and_its_features_stay_near():
    pytest.importorskip("torchao")
    model = tiny.build_model().to("cuda", torch.bfloat16)
    pixels = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = torch.cat(model.get_image_features(pixels).pooler_output)
        found = torch.cat(quantize_to_int8(model).get_image_features(pixels).pooler_output)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1
