# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Convolutional vision towers: the last feature map is the patch grid."""

import pytest
import tiny
import torch
from PIL import Image
from tiny import FEATURE_MAP_CONFIGS, batch, build_config, build_model, pixels, prompt
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, ConvNextImageProcessorPil

from modeling_deco import DecoConfig, DecoForConditionalGeneration, DecoProcessor
from modeling_deco.feature_maps import feature_map
from modeling_deco.worlds.emoji import efficientnet_lite0

NETWORKS = [
    *FEATURE_MAP_CONFIGS.values(),
    # padded on both sides in some blocks, like the published EfficientNet-B1 to B7
    {**FEATURE_MAP_CONFIGS["efficientnet"], "depth_coefficient": 1.4, "depthwise_padding": [2]},
    {**FEATURE_MAP_CONFIGS["efficientnet"], "depthwise_padding": [0]},
    {"model_type": "convnext", "patch_size": 4, "num_stages": 3, "hidden_sizes": [4, 4, 8], "depths": [1, 1, 1]},
    {"model_type": "mobilenet_v1", "depth_multiplier": 0.1},
    {"model_type": "mobilenet_v1", "depth_multiplier": 0.02, "min_depth": 4, "tf_padding": False},
    {"model_type": "mobilenet_v2", "depth_multiplier": 0.1},
    {"model_type": "mobilenet_v2", "depth_multiplier": 0.25, "finegrained_output": False, "output_stride": 16},
    {"model_type": "mobilenet_v2", "depth_multiplier": 1.4, "output_stride": 8, "tf_padding": False},
    {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2]},
    {
        "model_type": "resnet",
        "embedding_size": 4,
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "downsample_in_first_stage": True,
        "layer_type": "basic",
    },
    {"model_type": "regnet", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "groups_width": 4},
    {
        "model_type": "regnet",
        "embedding_size": 4,
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "groups_width": 4,
        "downsample_in_first_stage": False,
        "layer_type": "x",
    },
]
TIMM = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "num_labels": 2, "label_names": ["a", "b"]}


def config_of(vision_config, **kwargs) -> DecoConfig:
    choices = {"image_token_id": tiny.IMAGE_TOKEN_ID, "pooled_grid_size": 1, **kwargs}
    return DecoConfig(vision_config=vision_config, text_config=tiny.TEXT_CONFIGS["llama"], **choices)


# --- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS, ids=lambda fields: fields["model_type"])
def test_the_config_knows_the_feature_map_of_any_picture(network):
    config = config_of({**network, "image_size": 64})
    with torch.device("meta"):
        tower = AutoModel.from_config(config.vision_config)
    stride = config.patch_size
    sizes = [*range(2 * stride, 3 * stride + 2, max(1, stride // 8)), 3 * stride - 1, 3 * stride, 3 * stride + 1]
    for side in sizes:
        found = tower(torch.empty(1, 3, side, 4 * stride, device="meta")).last_hidden_state
        assert tuple(found.shape[1:]) == (config.vision_hidden_size, *config.patch_grid_of(side, 4 * stride)), side


@pytest.mark.parametrize(
    ("padded", "side", "grid"), [([16], 240, 8), ([5, 8, 16], 260, 9), ([5, 18], 300, 10), ([6], 380, 12)]
)
def test_a_published_efficientnet_has_the_patches_of_its_image_size(padded, side, grid):
    # depthwise_padding of google/efficientnet-b1 to b4, whose networks pad as TensorFlow does at their own size
    depth = {240: 1.1, 260: 1.2, 300: 1.4, 380: 1.8}[side]
    fields = {"depthwise_padding": padded, "depth_coefficient": depth, "width_coefficient": 1.0, "hidden_dim": 1280}
    assert config_of({"model_type": "efficientnet", "image_size": side, **fields}).patch_grid == (grid, grid)


@pytest.mark.parametrize("vision", FEATURE_MAP_CONFIGS)
def test_patches_and_image_size_are_those_of_the_vision_config(vision):
    config = build_config(vision)
    assert (config.patch_size, config.patch_grid, config.view_size) == (4, (6, 6), (24, 24))
    assert (config.num_prefix_tokens, config.vision_feature_layer) == (0, -1)
    whole = build_config(vision, vision_feature_layer=-1, vision_feature_select_strategy="full")
    assert whole.to_dict() == config.to_dict()


def test_image_size_may_have_two_sides():
    config = config_of({**FEATURE_MAP_CONFIGS["convnextv2"], "image_size": [24, 40]})
    assert (config.view_size, config.patch_grid) == ((24, 40), (6, 10))


def test_a_tower_without_an_image_size_gets_224_pixels():
    resnet = AutoConfig.for_model(model_type="resnet")
    config = config_of(resnet)
    assert (config.view_size, config.patch_grid, config.vision_hidden_size) == ((224, 224), (7, 7), 2048)
    assert not hasattr(resnet, "image_size")  # the given config is not changed
    assert config_of({"model_type": "resnet", "image_size": 384}).patch_grid == (12, 12)


def test_the_config_survives_being_saved(tmp_path):
    for network in NETWORKS:
        config = config_of({**network, "image_size": 64})
        config.save_pretrained(tmp_path)
        loaded = DecoConfig.from_pretrained(tmp_path)
        assert loaded.to_dict() == config.to_dict()
        assert loaded.feature_map == config.feature_map


def test_the_default_layer_is_the_last_feature_map_and_others_are_refused():
    with pytest.raises(ValueError, match="vision_feature_layer=-2: DeCo reads the last feature map of a convnextv2"):
        build_config("convnextv2", vision_feature_layer=-2)


def test_an_image_smaller_than_the_stride_is_refused():
    with pytest.raises(ValueError, match="image_size: 20 x 20 pixels are less than the stride of convnext, 32 pixels"):
        config_of({"model_type": "convnext", "image_size": 20})
    assert config_of({"model_type": "regnet", "image_size": 20}).patch_grid == (1, 1)  # rounds up


def test_a_grid_larger_than_the_feature_map_is_refused():
    with pytest.raises(ValueError, match="8 x 8 is larger than the 7 x 7 patches"):
        config_of({"model_type": "resnet"}, pooled_grid_size=8)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"hidden_dim": 0}, "vision_config.hidden_size must be an int of 1 to"),
        ({"strides": [1, 4096]}, "vision_config.patch_size must be an int of 1 to 1024, got 8192"),
    ],
)
def test_absurd_feature_maps_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        config_of({**FEATURE_MAP_CONFIGS["efficientnet"], **fields})


@pytest.mark.parametrize("missing", ["hidden_size", "patch_size"])
def test_a_timm_wrapper_must_say_what_its_feature_map_is(missing):
    fields = {"hidden_size": 3072, "patch_size": 64, "image_size": 1024}
    whole = AutoConfig.for_model(**TIMM, **fields)
    config = config_of(whole)
    assert (config.patch_grid, config.vision_hidden_size) == ((16, 16), 3072)
    fields.pop(missing)
    with pytest.raises(ValueError, match=rf"vision_config.{missing} is missing: .*\(fastvit_mci3\)"):
        config_of(AutoConfig.for_model(**TIMM, **fields))


def test_patches_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match=r"vision_config.patch_size must be an int, got \[4, 2\]"):
        config_of({"model_type": "convnext", "patch_size": [4, 2]})


def test_a_timm_wrapper_has_timms_image_size():
    wrapper = AutoConfig.for_model(
        **TIMM, num_features=3072, patch_size=64, pretrained_cfg={"input_size": [3, 256, 320]}
    )
    assert config_of(wrapper).view_size == (256, 320)
    assert feature_map(wrapper).channels == 3072


# --- the model -------------------------------------------------------------------------------------------------------


def hand_written_means(cells: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Means of adaptive windows of a feature map `(channels, height, width)`, one after another, row by row."""
    _, height, width = cells.shape
    means = []
    for row in range(rows):
        for col in range(cols):
            top, bottom = row * height // rows, -(-(row + 1) * height // rows)
            left, right = col * width // cols, -(-(col + 1) * width // cols)
            means.append(cells[:, top:bottom, left:right].flatten(1).mean(1))
    return torch.stack(means)


@pytest.mark.parametrize("vision", FEATURE_MAP_CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(24, 24), (24, 32), (23, 30)])
@torch.no_grad()
def test_tokens_are_projected_means_of_windows_of_the_feature_map(vision, height, width):
    model = build_model(vision, image_positions="patch").model
    images = pixels(2, height, width)
    cells = model.vision_tower(images).last_hidden_state
    for grid in ((3, 3), (2, 5), tuple(cells.shape[-2:])):
        found = model.get_image_features(images, torch.tensor([grid] * 2)).pooler_output
        for index in range(2):
            expected = model.multi_modal_projector.project(hand_written_means(cells[index], *grid))
            assert torch.allclose(found[index], expected, atol=1e-4)


@torch.no_grad()
def test_a_changed_pixel_changes_only_the_cells_that_see_it():
    # without batch statistics, attention and squeeze-and-excitation, a cell of ConvNeXt V2 sees a bounded region:
    # but for the global response normalization, which is switched off here
    model = build_model("convnextv2").model
    for name, parameter in model.vision_tower.named_parameters():
        if "grn" in name:
            parameter.zero_()
    images = pixels(1, 96, 96)
    changed = images.clone()
    changed[0, :, 0:4, 92:96] += 1.0  # one corner, one patch
    grid = torch.tensor([[24, 24]])
    before, after = (model.get_image_features(image, grid).pooler_output[0] for image in (images, changed))
    has_changed = (before != after).any(-1).unflatten(0, (24, 24))
    assert has_changed[0, 23]
    # two blocks of 7 x 7 kernels, at strides of 2 and 4: 3 / 2 and 3 cells
    assert not has_changed[6:].any()
    assert not has_changed[:, :18].any()


@torch.no_grad()
def test_rows_and_columns_of_the_map_are_not_exchanged():
    model = build_model("mobilenet_v2").model
    model.vision_tower.layer = nn.ModuleList()
    model.vision_tower.conv_stem = nn.AvgPool2d(4)
    model.vision_tower.conv_1x1 = nn.Conv2d(3, 128, 1)
    images = torch.zeros(1, 3, 24, 32)
    images[0, :, 4:8, 24:28] = 1.0
    features = model.get_image_features(images, torch.tensor([[6, 8]])).pooler_output[0]
    is_lit = (features != features[0]).any(-1).unflatten(0, (6, 8))
    assert is_lit.nonzero().tolist() == [[1, 6]]


@pytest.mark.parametrize("vision", FEATURE_MAP_CONFIGS)
@torch.no_grad()
def test_answers_with_a_picture_do_not_depend_on_the_batch(vision):
    model = build_model(vision)
    images = pixels(2, seed=3)
    prompts = [prompt("what is", 9, "?"), prompt("the red cat is", 9, "a ?")]
    together = model(**batch(*prompts), pixel_values=images).logits[:, -1]
    for index, ids in enumerate(prompts):
        alone = model(**batch(ids), pixel_values=images[index : index + 1]).logits[0, -1]
        assert torch.allclose(together[index], alone, atol=1e-4)
    changed = model(**batch(*prompts), pixel_values=images.flip(0)).logits[:, -1]
    assert not torch.allclose(together, changed, atol=1e-2)


@torch.no_grad()
def test_a_tower_in_bfloat16_takes_pixels_in_float32():
    model = build_model("efficientnet").to(torch.bfloat16).model
    (features,) = model.get_image_features(pixels(1)).pooler_output
    assert features.dtype == torch.bfloat16
    assert features.isfinite().all()


def test_hidden_states_are_kept_on_request_only():
    model = build_model("convnextv2").model
    assert model.get_image_features(pixels(1)).hidden_states is None
    assert len(model.get_image_features(pixels(1), output_hidden_states=True).hidden_states) == 3


def test_a_config_that_is_wrong_about_the_stride_is_an_error():
    model = build_model("convnextv2").model
    model.vision_tower.encoder.stages[-1].downsampling_layer = nn.ModuleList([nn.Conv2d(16, 32, 1)])
    with pytest.raises(ValueError, match=r"feature map of the shape \(32, 12, 16\) of 24 x 32 pixels.*\(32, 6, 8\)"):
        model.get_image_features(pixels(1, 24, 32))


@pytest.mark.parametrize("vision", FEATURE_MAP_CONFIGS)
@torch.no_grad()
def test_the_graph_is_static(vision):
    model = build_model(vision).model
    compiled = torch.compile(
        lambda images: model.get_image_features(images).pooler_output, backend="eager", fullgraph=True
    )
    images = pixels(2)
    for found, expected in zip(compiled(images), model.get_image_features(images).pooler_output, strict=True):
        assert torch.equal(found, expected)


# --- saving and joining ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", FEATURE_MAP_CONFIGS)
@torch.no_grad()
def test_a_saved_model_answers_the_same(vision, tmp_path):
    model = build_model(vision)
    model.save_pretrained(tmp_path)
    loaded, loading = DecoForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = {**batch(prompt("what is", 9, "?")), "pixel_values": pixels(1)}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    text_model = tiny.randomize(AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny.TEXT_CONFIGS["llama"])))
    text_model.save_pretrained(folder)
    tiny.build_tokenizer(with_image_token=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("vision", FEATURE_MAP_CONFIGS)
def test_a_pretrained_network_is_joined_to_a_language_model(vision, tmp_path, text_folder):
    folder = tmp_path / "tower"
    tower = tiny.randomize(AutoModel.from_config(AutoConfig.for_model(**FEATURE_MAP_CONFIGS[vision])))
    tower.save_pretrained(folder)
    efficientnet_lite0.image_processor(24).save_pretrained(folder)
    model = DecoForConditionalGeneration.from_vision_text_pretrained(folder, text_folder, pooled_grid_size=[2, 3])
    processor = DecoProcessor.from_vision_text_pretrained(
        folder, text_folder, pooled_grid_size=[2, 3], chat_template=tiny.CHAT_TEMPLATE
    )
    assert (processor.patch_size, processor.patch_padding) == (model.config.patch_size, model.config.patch_padding)
    joined = model.model.vision_tower.state_dict()
    for name, tensor in tower.state_dict().items():
        assert torch.equal(joined[name], tensor), name
    inputs = processor(images=[tiny.picture(0), tiny.picture(1)], text=["<image> what ?"] * 2, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * 6
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_the_head_of_a_classifier_is_left_behind(tmp_path, text_folder):
    from transformers import ConvNextV2ForImageClassification

    folder = tmp_path / "tower"
    classifier = ConvNextV2ForImageClassification(AutoConfig.for_model(**FEATURE_MAP_CONFIGS["convnextv2"]))
    classifier.save_pretrained(folder)
    model = DecoForConditionalGeneration.from_vision_text_pretrained(folder, text_folder, pooled_grid_size=3)
    for name, tensor in classifier.convnextv2.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor), name


# --- the processor ---------------------------------------------------------------------------------------------------


def build_processor(config, image_processor, **kwargs) -> DecoProcessor:
    from modeling_deco.processing_deco import arguments_of_config

    return DecoProcessor(image_processor, tiny.build_tokenizer(), **{**arguments_of_config(config), **kwargs})


@pytest.mark.parametrize("side", [32, 40, 63, 64])
@torch.no_grad()
def test_the_processor_counts_the_patches_that_the_network_makes(side):
    """At 40 pixels, a stride of 32 and a network that rounds up, there are two rows."""
    vision_config = {"model_type": "mobilenet_v1", "depth_multiplier": 0.1, "image_size": side}
    config = config_of(vision_config, image_positions="patch")
    model = tiny.randomize(DecoForConditionalGeneration(config))
    processor = build_processor(config, efficientnet_lite0.image_processor(side))
    inputs = processor(images=tiny.picture(0), text="<image>", max_image_tokens=100, return_tensors="pt")
    expected = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state.shape[-2:]
    assert inputs["pooled_grid_sizes"].tolist() == [list(expected)]
    assert model(**inputs).logits.isfinite().all()
    too_large = expected[0] + 1
    with pytest.raises(ValueError, match=f"larger than the {expected[0]} x {expected[1]} patches of image 1"):
        processor(images=tiny.picture(0), text="<image>", pooled_grid_size=too_large, return_tensors="pt")


@torch.no_grad()
def test_tiles_of_a_network_that_rounds_up_are_stitched():
    vision_config = {"model_type": "mobilenet_v1", "depth_multiplier": 0.1, "image_size": 40}
    config = config_of(vision_config, image_positions="patch")
    model = tiny.randomize(DecoForConditionalGeneration(config))
    processor = build_processor(config, efficientnet_lite0.image_processor(40))
    inputs = processor(images=tiny.picture(0), text="<image>", tiles=4, pooled_grid_size=4, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 4, 3, 40, 40)
    (found,) = model.model.get_image_features(
        inputs["pixel_values"], inputs["pooled_grid_sizes"], image_sizes=inputs["image_sizes"]
    ).pooler_output
    maps = model.model.vision_tower(inputs["pixel_values"][0]).last_hidden_state  # (4, channels, 2, 2)
    rows = [torch.cat([maps[0], maps[1]], dim=-1), torch.cat([maps[2], maps[3]], dim=-1)]
    cells = torch.cat(rows, dim=-2).flatten(1).T
    assert torch.allclose(found, model.model.multi_modal_projector.project(cells), atol=1e-5)


@pytest.mark.parametrize("vision", FEATURE_MAP_CONFIGS)
@torch.no_grad()
def test_views_and_videos_go_through_a_convolutional_tower(vision):
    fields = {"image_grid_pinpoints": tiny.PINPOINTS, "image_newline": True, "video_token_id": tiny.VIDEO_TOKEN_ID}
    model = build_model(vision, image_positions="patch", **fields)
    processor = tiny.build_family_processor(model.config)
    frames = [tiny.picture(seed, 40, 50) for seed in range(4)]
    inputs = processor(
        images=tiny.picture(0, 48, 48), videos=[frames], text="<image> what <video> ?", return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 5, 3, 24, 24)
    found = model(**inputs)
    overview, whole = found.image_outputs.pooler_output[0].split([3 * 3, 6 * 7])
    whole = whole.unflatten(0, (6, 7))[:, :-1].flatten(0, 1)  # without newlines
    maps = model.model.vision_tower(inputs["pixel_values"][0]).last_hidden_state
    rows = [torch.cat([maps[1], maps[2]], dim=-1), torch.cat([maps[3], maps[4]], dim=-1)]
    for tokens, cells, side in ((overview, maps[0], 3), (whole, torch.cat(rows, dim=-2), 6)):
        expected = model.model.multi_modal_projector.project(hand_written_means(cells, side, side))
        assert torch.allclose(tokens, expected, atol=1e-4)
    (video,) = found.video_outputs.pooler_output
    frame_cells = model.model.vision_tower(inputs["pixel_values_videos"][0]).last_hidden_state
    assert torch.allclose(
        video, model.model.multi_modal_projector.project(frame_cells.flatten(2).mT).flatten(0, 1), atol=1e-4
    )
    assert found.logits.isfinite().all()


@torch.no_grad()
def test_the_processors_inputs_for_vllm_have_the_tokens_of_the_model():
    vision_config = {"model_type": "mobilenet_v1", "depth_multiplier": 0.1, "image_size": 40}
    config = config_of(vision_config, image_positions="patch", pooled_grid_size=2)
    model = tiny.randomize(DecoForConditionalGeneration(config))
    processor = build_processor(config, efficientnet_lite0.image_processor(40))
    inputs = processor(
        images=[tiny.picture(0)], text="<image> what", return_tensors="pt", return_text_replacement_offsets=True
    )
    assert inputs["image_grid_thw"].tolist() == [[40, 40, 2, 2]]
    views = {"views": inputs["views"], "image_grid_thw": inputs["image_grid_thw"]}
    (features,) = model.model.get_image_features(None, **views, return_dict=True).pooler_output
    assert len(features) == 4
    positions, delta = model.model.get_rope_index(inputs["input_ids"], inputs["image_grid_thw"])
    plain = processor(images=[tiny.picture(0)], text="<image> what", return_tensors="pt")
    expected, expected_delta = model.model.get_rope_index(plain["input_ids"], pixel_values=plain["pixel_values"])
    assert torch.equal(positions, expected)
    assert torch.equal(delta, expected_delta)


def test_the_image_processors_of_these_networks_are_used_as_they_are(tmp_path):
    config = config_of({**FEATURE_MAP_CONFIGS["convnextv2"], "image_size": 32}, pooled_grid_size=4)
    own = ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875)
    processor = build_processor(config, own)
    picture = Image.new("RGB", (60, 40), "red")
    inputs = processor(images=picture, text="<image>", return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], torch.as_tensor(own(picture, return_tensors="pt")["pixel_values"]))
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert (inputs["input_ids"] == tiny.IMAGE_TOKEN_ID).sum() == 16
    assert processor._get_num_multimodal_tokens(image_sizes=[(40, 60)]).num_image_tokens == [16]
