# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The projectors that DeCo is compared with: alone, and in models."""

import inspect

import pytest
import torch
from tiny import PATCH_GRID, VISION_CONFIGS, batch, build_config, build_model, pixels, prompt
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from modeling_deco import (
    AvgPoolProjector,
    CAbstractorProjector,
    DAbstractorProjector,
    DecoConfig,
    DecoForConditionalGeneration,
    DecoModel,
    MlpProjector,
    QFormerProjector,
    ResamplerProjector,
)
from modeling_deco.projectors import GridPositions

ATTENTION_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {
    "mlp": None,
    "avg_pool": None,
    "qformer": ATTENTION_SIZES,
    "resampler": ATTENTION_SIZES,
    "c_abstractor": {"hidden_size": 32, "num_hidden_layers": 2},
    "d_abstractor": ATTENTION_SIZES,
}
CLASSES = {
    "mlp": MlpProjector,
    "avg_pool": AvgPoolProjector,
    "qformer": QFormerProjector,
    "resampler": ResamplerProjector,
    "c_abstractor": CAbstractorProjector,
    "d_abstractor": DAbstractorProjector,
}
COMPRESSORS = [name for name in SIZES if name != "mlp"]
COMPRESSIVE = COMPRESSORS[1:]
FIXED = ["qformer", "resampler", "d_abstractor"]


def grid_of(projector_type):
    return list(PATCH_GRID) if projector_type == "mlp" else [2, 3]


def projector_config(projector_type, **kwargs):
    fields = {
        "projector_type": projector_type,
        "projector_config": SIZES[projector_type],
        "pooled_grid_size": grid_of(projector_type),
    }
    return build_config(**{**fields, **kwargs})


def fresh_model(projector_type, seed=0, **kwargs):
    torch.manual_seed(seed)
    return DecoForConditionalGeneration(projector_config(projector_type, **kwargs)).eval()


def random_model(projector_type):
    """Its logits depend on all of its inputs."""
    fields = {"projector_config": SIZES[projector_type], "pooled_grid_size": grid_of(projector_type)}
    return build_model(projector_type=projector_type, **fields)


def inputs_of(projector_type, num_images=2):
    rows, cols = grid_of(projector_type)
    return {**batch(*[prompt("what", rows * cols, "?")] * num_images), "pixel_values": pixels(num_images)}


def build_alone(projector_type, patch_grid=(4, 6), grid=(2, 3)):
    torch.manual_seed(0)
    arguments = [] if projector_type == "mlp" else [grid]
    if projector_type.endswith("abstractor"):
        arguments.append(patch_grid)
    return CLASSES[projector_type](8, 12, *arguments, **(SIZES[projector_type] or {})).eval()


# --- in models -------------------------------------------------------------------------------------------------------


@pytest.mark.newest
@pytest.mark.parametrize("projector_type", SIZES)
def test_models_are_saved_and_loaded_by_every_class(projector_type, tmp_path):
    model, inputs = fresh_model(projector_type), inputs_of(projector_type)
    model.save_pretrained(tmp_path)
    logits = model(**inputs).logits
    for kwargs in ({}, {"trust_remote_code": True}):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **kwargs)
        assert loaded.config.projector_config == model.config.projector_config
        torch.testing.assert_close(loaded(**inputs).logits, logits, rtol=0, atol=1e-5)  # convolutions round by address
    assert type(AutoModel.from_pretrained(tmp_path)) is DecoModel


@pytest.mark.parametrize("vision", VISION_CONFIGS)
@pytest.mark.parametrize("projector_type", SIZES)
def test_every_projector_stands_on_every_vision_tower(projector_type, vision):
    model = build_model(
        vision, projector_type=projector_type, projector_config=SIZES[projector_type], pooled_grid_size=6
    )
    logits = model(**batch(prompt("what", 36, "?")), pixel_values=pixels(1)).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("projector_type", SIZES)
def test_every_parameter_of_a_fresh_projector_learns(projector_type):
    model, inputs = fresh_model(projector_type), inputs_of(projector_type)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("bias"):  # a key has no use for its
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("projector_type", COMPRESSORS)
def test_fresh_tokens_of_an_image_differ(projector_type):
    """Latents that begin equal would stay equal but for the language model's positions."""
    model, inputs = fresh_model(projector_type), inputs_of(projector_type)
    tokens = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    distances = torch.cdist(tokens, tokens) + torch.eye(len(tokens))
    assert distances.min() > 1e-4


@pytest.mark.parametrize("projector_type", COMPRESSORS)
def test_tokens_depend_on_the_picture(projector_type):
    model = fresh_model(projector_type)
    one, other = model.get_image_features(pixels(2)).pooler_output
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("projector_type", SIZES)
def test_images_do_not_see_each_other(projector_type):
    model = random_model(projector_type)
    together = model.get_image_features(pixels(3)).pooler_output
    for index in range(3):
        (alone,) = model.get_image_features(pixels(3)[index : index + 1]).pooler_output
        torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projector_type", SIZES)
def test_generation_equals_greedy_decoding_without_a_cache(projector_type):
    model = random_model(projector_type)
    inputs = inputs_of(projector_type, num_images=1)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    ids = inputs["input_ids"]
    for _ in range(4):
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("projector_type", SIZES)
def test_bfloat16_is_near_float32(projector_type):
    model = random_model(projector_type)
    expected = torch.cat(model.get_image_features(pixels(2)).pooler_output)
    tokens = torch.cat(model.bfloat16().get_image_features(pixels(2).bfloat16()).pooler_output)
    assert tokens.dtype == torch.bfloat16
    assert F.cosine_similarity(tokens.float(), expected).min() > 0.95


@pytest.mark.parametrize("projector_type", SIZES)
def test_gradient_checkpointing_changes_no_gradient(projector_type):
    model, inputs = fresh_model(projector_type), inputs_of(projector_type)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_joined_backbones_get_the_initialization_of_transformers_parts(tmp_path):
    config = projector_config("d_abstractor")
    AutoModel.from_config(config.vision_config).save_pretrained(tmp_path / "vision")
    AutoModelForCausalLM.from_config(config.text_config).save_pretrained(tmp_path / "text")
    torch.manual_seed(0)
    model = DecoForConditionalGeneration.from_vision_text_pretrained(
        tmp_path / "vision",
        tmp_path / "text",
        image_token_id=config.image_token_id,
        pooled_grid_size=[2, 3],
        projector_type="d_abstractor",
        projector_config=ATTENTION_SIZES,
    )
    attention = model.model.multi_modal_projector.decoder.layers[0].encoder_attn
    assert attention.sampling_offsets.weight.abs().max() == 0  # Deformable DETR's, points around the reference
    assert attention.sampling_offsets.bias.abs().max() == 4
    points = model.model.multi_modal_projector.reference_points[0]
    torch.testing.assert_close(points[0], torch.tensor([0.5 / 6, 0.5 / 6]))
    assert model(**inputs_of("d_abstractor")).logits.isfinite().all()


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector_type", ["avg_pool", "c_abstractor"])
def test_what_pools_takes_any_grid_per_call(projector_type):
    model = fresh_model(projector_type)
    features = model.get_image_features(pixels(2), pooled_grid_sizes=torch.tensor([[6, 6], [1, 4]]))
    assert [len(tokens) for tokens in features.pooler_output] == [36, 4]


@pytest.mark.parametrize("projector_type", FIXED)
def test_learned_queries_refuse_another_grid(projector_type):
    model = fresh_model(projector_type)
    same = model.get_image_features(pixels(1), pooled_grid_sizes=torch.tensor([[2, 3]])).pooler_output[0]
    assert torch.equal(same, model.get_image_features(pixels(1)).pooler_output[0])
    with pytest.raises(ValueError, match="learned queries for 2 x 3 tokens and cannot make 3 x 2"):
        model.get_image_features(pixels(1), pooled_grid_sizes=torch.tensor([[3, 2]]))


def test_the_mlp_refuses_to_compress():
    model = fresh_model("mlp")
    with pytest.raises(ValueError, match="does not compress: 6 x 6 patches become as many tokens, not 3 x 3"):
        model.get_image_features(pixels(1), pooled_grid_sizes=torch.tensor([[3, 3]]))
    with pytest.raises(ValueError, match=r"pooled_grid_size must be the patch grid \[6, 6\], got 3"):
        build_config(projector_type="mlp", pooled_grid_size=3)


def test_the_mlp_is_average_pooling_at_the_patch_grid():
    pooled = fresh_model("avg_pool", pooled_grid_size=6)
    model = fresh_model("mlp", seed=1)
    model.load_state_dict(pooled.state_dict())
    assert torch.equal(model(**inputs_of("mlp")).logits, pooled(**inputs_of("mlp")).logits)


@pytest.mark.parametrize("projector_type", ["c_abstractor", "d_abstractor", "qformer", "resampler", "avg_pool"])
def test_pictures_of_another_size(projector_type):
    model = fresh_model(projector_type)
    features = model.get_image_features(pixels(2, height=32, width=40)).pooler_output  # 8 x 10 patches
    assert [tokens.shape for tokens in features] == [(6, 32), (6, 32)]


@pytest.mark.parametrize("projector_type", ["c_abstractor", "d_abstractor"])
def test_a_grid_larger_than_the_patches_is_refused(projector_type):
    model = fresh_model(projector_type, pooled_grid_size=6)
    with pytest.raises(ValueError, match="6 x 6 is larger than the 4 x 6 patches of the image"):
        model.get_image_features(pixels(1, height=16))


# --- configuration ---------------------------------------------------------------------------------------------------


def test_sizes_are_the_fields_standard_unless_given():
    config = DecoConfig(projector_type="qformer")
    assert config.projector_sizes == {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = DecoConfig(projector_type="qformer", projector_config={"num_hidden_layers": 6})
    assert config.projector_config == {"num_hidden_layers": 6}
    assert config.projector_sizes == {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12}
    assert DecoConfig().projector_sizes == {}


@pytest.mark.parametrize("projector_type", COMPRESSIVE)
def test_sizes_are_the_same_alone_and_in_a_model(projector_type):
    parameters = inspect.signature(CLASSES[projector_type]).parameters
    sizes = DecoConfig(projector_type=projector_type).projector_sizes
    assert sizes == {name: parameters[name].default for name in sizes}


def test_another_type_when_a_folder_is_loaded(tmp_path):
    fresh_model("avg_pool").save_pretrained(tmp_path)
    config = DecoConfig.from_pretrained(tmp_path, projector_type="resampler")
    assert config.projector_sizes["hidden_size"] == 1024
    fresh_model("qformer").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="projector_type='avg_pool' can have no fields, got 'hidden_size'"):
        DecoForConditionalGeneration.from_pretrained(tmp_path, projector_type="avg_pool")


@pytest.mark.parametrize("projector_type", COMPRESSIVE)
def test_device_maps_do_not_cut_a_projector_in_two(projector_type):
    accelerate = pytest.importorskip("accelerate")
    model = fresh_model(projector_type)
    sizes = accelerate.utils.compute_module_sizes(model)
    limit = sizes["model.vision_tower"] + sizes["model.multi_modal_projector"] // 2
    device_map = accelerate.infer_auto_device_map(
        model, {0: limit, "cpu": "1GB"}, no_split_module_classes=model._no_split_modules
    )
    assert {name for name in device_map if "multi_modal_projector" in name} <= {"model.multi_modal_projector"}
    assert len(set(device_map.values())) == 2


def test_convolutions_begin_as_in_pytorch():
    projector = fresh_model("c_abstractor").model.multi_modal_projector
    depthwise = projector.before[0].layer[1].convolution.weight
    assert depthwise.abs().max() <= 1 / 3  # uniform within 1 / sqrt(3 * 3)
    assert depthwise.std() > 0.15


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projector_type": "perceiver"}, "projector_type must be one of mlp, avg_pool, qformer, .* got 'perceiver'"),
        ({"projector_config": {"hidden_size": 8}}, "'avg_pool' can have no fields, got 'hidden_size'"),
        ({"projector_type": "qformer", "projector_config": {"depth": 8}}, "num_attention_heads, got 'depth'"),
        ({"projector_type": "qformer", "projector_config": {"hidden_size": 0}}, "positive int, got 0"),
        ({"projector_type": "qformer", "projector_config": {"hidden_size": "8"}}, "positive int, got '8'"),
        ({"projector_type": "resampler", "projector_config": {"hidden_size": 30}}, "30 is not a multiple of .*=16"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(Exception, match=message):  # a ValueError, wrapped by some versions of transformers
        build_config(**fields)


@pytest.mark.parametrize(
    ("projector_type", "millions"),
    [
        ("mlp", 21.0),
        ("avg_pool", 21.0),
        ("qformer", 104.9),
        ("resampler", 106.1),
        ("c_abstractor", 37.4),
        ("d_abstractor", 95.4),
    ],
)
def test_parameters_at_the_papers_sizes(projector_type, millions):
    """CLIP-L/336 to a 7B model at 144 tokens; the table of docs/projectors.md."""
    with torch.device("meta"):
        grid = 24 if projector_type == "mlp" else 12
        model = DecoModel(DecoConfig(projector_type=projector_type, pooled_grid_size=grid))
    count = sum(parameter.numel() for parameter in model.multi_modal_projector.parameters())
    assert round(count / 1e6, 1) == millions


# --- alone, against code of another kind -----------------------------------------------------------------------------


def channel_norm(feature_map, norm):
    centered = feature_map - feature_map.mean(1, keepdim=True)
    scaled = centered / (centered.pow(2).mean(1, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def regnet_block(block, feature_map):
    """timm's RegNet bottleneck with LayerNorm2d, as Honeybee builds it."""
    first, second, squeeze, third = block.layer
    hidden = F.silu(channel_norm(F.conv2d(feature_map, first.convolution.weight), first.normalization))
    depthwise = F.conv2d(hidden, second.convolution.weight, padding=1, groups=hidden.shape[1])
    hidden = F.silu(channel_norm(depthwise, second.normalization))
    reduce, _, expand, _ = squeeze.attention
    gate = torch.sigmoid(expand(F.silu(reduce(hidden.mean((2, 3), keepdim=True)))))
    hidden = channel_norm(F.conv2d(hidden * gate, third.convolution.weight), third.normalization)
    if not isinstance(block.shortcut, nn.Identity):
        shortcut = block.shortcut
        feature_map = channel_norm(F.conv2d(feature_map, shortcut.convolution.weight), shortcut.normalization)
    return F.silu(hidden + feature_map)


def test_the_c_abstractor_is_honeybees():
    projector = build_alone("c_abstractor").double()
    patches = torch.randn(2, 24, 8, dtype=torch.float64)
    feature_map = patches.transpose(1, 2).reshape(2, 8, 4, 6) + projector.positions.weight
    for block in projector.before:
        feature_map = regnet_block(block, feature_map)
    feature_map = torch.stack(  # windows of 2 x 2
        [
            feature_map[:, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].mean((2, 3))
            for row in (0, 1)
            for col in (0, 1, 2)
        ],
        dim=2,
    ).reshape(2, 32, 2, 3)
    for block in projector.after:
        feature_map = regnet_block(block, feature_map)
    tokens = feature_map.flatten(2).transpose(1, 2)
    expected = projector.readout.linear_2(F.silu(projector.readout.linear_1(tokens)))
    torch.testing.assert_close(projector(patches, (4, 6)), expected)


def test_queries_of_the_d_abstractor_look_at_their_place():
    """On a grid that is not square, where rows and columns would be told apart if they were exchanged."""
    projector = build_alone("d_abstractor", patch_grid=(8, 24), grid=(2, 6))
    for layer in projector.decoder.layers:  # one point at the reference, where it begins with rays around it
        layer.encoder_attn.sampling_offsets.bias.data.zero_()
    patches = torch.randn(1, 8 * 24, 8, requires_grad=True)
    tokens = projector(patches, (8, 24))[0]
    centers = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(24.0), indexing="ij"), dim=-1).flatten(0, 1)
    for query in range(12):
        (gradient,) = torch.autograd.grad(tokens[query].sum(), patches, retain_graph=True)
        most = gradient[0].abs().sum(-1).argmax()
        row, col = query // 6, query % 6
        expected = torch.tensor([row * 7.0, col * 23 / 5])  # from the first patch to the last
        assert (centers[most] - expected).abs().max() <= 1


@pytest.mark.parametrize("projector_type", COMPRESSIVE)
def test_alone_they_need_no_model(projector_type):
    projector = build_alone(projector_type)
    assert projector(torch.randn(3, 24, 8), (4, 6)).shape == (3, 6, 12)


@pytest.mark.parametrize("projector_type", SIZES)
def test_patches_that_do_not_fill_the_grid_are_refused(projector_type):
    with pytest.raises(ValueError, match="24 patch features do not fill a grid of 5 x 6 = 30 patches"):
        build_alone(projector_type)(torch.randn(3, 24, 8), (5, 6))


@pytest.mark.parametrize("projector_type", SIZES)
def test_grids_may_be_lists(projector_type):
    grid = [4, 6] if projector_type == "mlp" else [2, 3]
    assert build_alone(projector_type)(torch.randn(3, 24, 8), [4, 6], grid).shape == (3, grid[0] * grid[1], 12)


@pytest.mark.parametrize("projector_type", ["c_abstractor", "d_abstractor", "mlp"])
def test_a_patch_grid_that_is_not_square_must_be_said(projector_type):
    with pytest.raises(ValueError, match="24 patches are not square"):
        build_alone(projector_type)(torch.randn(3, 24, 8))


def cubic(distance: float) -> float:
    """Keys' kernel (1981), with a = -0.75 as in PyTorch and OpenCV."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def test_learned_positions_are_interpolated_bicubically():
    positions = GridPositions(1, (8, 8))
    with torch.no_grad():
        positions.weight.zero_()
        positions.weight[0, 0, 4, 3] = 1.0  # what is read around it is the kernel itself
    found = positions(torch.zeros(1, 1, 16, 16))[0, 0]
    for row, col in ((8, 6), (9, 7), (7, 5), (10, 4), (11, 8)):
        source_row, source_col = (row + 0.5) / 2 - 0.5, (col + 0.5) / 2 - 0.5
        expected = cubic(source_row - 4) * cubic(source_col - 3)
        assert found[row, col].item() == pytest.approx(expected, abs=1e-6)
