# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`deco info`: figures that agree with the model itself, from its config alone."""

import json
import re
import shutil

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText, DynamicCache
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT, DecoConfig
from modeling_deco.cli import app
from modeling_deco.inference.costs import describe, describe_config, kv_cache_bytes
from modeling_deco.inference.quantization import nf4_config
from modeling_deco.inference.weights import empty_model
from modeling_deco.modeling_deco import CACHE_NAME


def info(*arguments):
    return CliRunner().invoke(app, ["info", *map(str, arguments)])


def test_parameters_and_weights_are_those_of_the_model(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    about = describe(str(checkpoint))
    assert about["parameters"]["total"] == model.num_parameters()
    assert about["parameters"]["projector"] == model.model.multi_modal_projector.linear_1.weight.numel() * 2 + 64
    assert about["weights"]["float32"] == model.get_memory_footprint(return_buffers=False)
    assert about["weights"]["16bit"] * 2 == about["weights"]["float32"]


def test_tied_embeddings_count_once(tmp_path):
    model = tiny.build_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert (
        describe(str(tmp_path))["parameters"]["total"] == model.num_parameters() < tiny.build_model().num_parameters()
    )


@pytest.mark.parametrize("text", ["llama", "qwen3", "gemma"])
def test_the_cache_is_as_large_as_the_one_that_a_model_fills(text):
    model = tiny.build_model(text=text)
    text_config = model.config.text_config
    cache = DynamicCache(config=text_config)
    model.model.language_model(torch.ones(1, 9, dtype=torch.long), **{CACHE_NAME: cache})
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kv_cache_bytes(text_config, 9, torch.float32) == held


def test_the_cache_has_the_width_of_heads_that_the_config_names():
    text_config = tiny.build_model(text="qwen3").config.text_config
    text_config.update({"num_hidden_layers": 3, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 24})
    assert kv_cache_bytes(text_config, 5, torch.float16) == 2 * 3 * 2 * 24 * 5 * 2


def test_grids_of_an_oblong_tower_go_up_to_its_patch_grid():
    config = tiny.build_config("dinov2", "llama")
    vision_config = {**config.vision_config.to_dict(), "image_size": [16, 40], "patch_size": 4}
    config = DecoConfig(
        vision_config=vision_config, text_config=config.text_config, image_token_id=3, pooled_grid_size=2
    )
    grids = [grid["pooled_grid_size"] for grid in describe_config(config)["grids"]]
    assert grids == [[1, 1], [2, 2], [3, 3], [4, 4], [4, 10]]


def test_4bit_weights_are_as_large_as_those_that_are_loaded():
    loaded = AutoModelForImageTextToText.from_pretrained(
        SHIPPED_CHECKPOINT, dtype=torch.bfloat16, quantization_config=nf4_config()
    )
    states = [weight.quant_state for weight in loaded.parameters() if hasattr(weight, "quant_state")]
    held = sum(parameter.nbytes for parameter in loaded.parameters()) + sum(state.absmax.nbytes for state in states)
    assert len(states) == 28
    assert describe(str(SHIPPED_CHECKPOINT))["weights"]["4bit"] == held


@pytest.mark.parametrize(("image_positions", "taken"), [("patch", 144), ("sequence", 36)])
def test_text_says_flow_positions_parameters_memory_and_licence(image_positions, taken):
    result = info("--image-positions", image_positions)
    assert result.exit_code == 0
    for words in (
        r"12 x 12 patches of 8 pixels -> avg_pool -> 6 x 6 = 36 tokens -> llama, 4 layers",
        rf"positions +{image_positions}: an image takes {taken} of the context",
        r"licence +apache-2\.0",
        r"projector +33,024",
        r"total +1,730,432",
        r"6 x 6 +36 +147 kB +73\.7 kB +7\.07 MB",
        r"12 x 12 +144 ",
    ):
        assert re.search(words, result.stdout), words


def test_views_and_videos_are_described_by_the_largest_image_and_a_frame(tmp_path):
    """The largest image has 2 x 2 tiles: 12 x 12 patches and 12 newlines behind the 6 x 6 of the overview."""
    views = {"image_grid_pinpoints": [[24, 24], [48, 48], [24, 72]], "image_newline": True, "video_token_id": 21}
    tiny.build_model(image_positions="patch", **views).save_pretrained(tmp_path)
    about, text = describe(str(tmp_path)), info(tmp_path).stdout
    assert (about["num_views"], about["num_image_tokens"], about["num_image_positions"]) == (5, 9 + 36 + 6, 192)
    capped = tiny.build_config(**views, vision_aspect_ratio="anyres_max_1")
    assert describe_config(capped)["num_views"] == 5  # though 2 x 2 tiles take no more tokens than one
    assert {tuple(row["pooled_grid_size"]): row["num_image_tokens"] for row in about["grids"]} == {
        (1, 1): 1 + 4 + 2,
        (2, 2): 4 + 16 + 4,
        (3, 3): 9 + 36 + 6,
        (4, 4): 16 + 64 + 8,
        (6, 6): 36 + 144 + 12,
    }
    for words in (
        "image -> up to 5 views -> clip_vision_model, 2 layers: 6 x 6 patches of 4 pixels",
        "-> avg_pool -> 3 x 3 a view, at most 51 tokens -> llama",
        "an image takes at most 192 of the context",
        "videos      6 x 6 = 36 tokens a frame",
        "keys and values of the largest image's tokens",
    ):
        assert words in text, words


def test_json_is_the_description():
    assert json.loads(info("--json").stdout) == describe(str(SHIPPED_CHECKPOINT))


def test_a_projector_with_one_grid_has_one_row(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny.build_model(projector_type="resampler", projector_config=sizes).save_pretrained(tmp_path)
    about = describe(str(tmp_path))
    assert [row["pooled_grid_size"] for row in about["grids"]] == [[3, 3]]
    assert "This projector has only one grid, 3 x 3." in info(tmp_path).stdout


def test_the_size_of_a_7b_model_is_known_without_reading_its_weights(tmp_path):
    """Its file has the head of 14 GB, and a hole where they would be."""
    DecoConfig().save_pretrained(tmp_path)
    head, end = {}, 0
    for key, tensor in empty_model(DecoConfig()).state_dict().items():
        head[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    encoded = json.dumps(head).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(file.tell() + end)
    about = describe(str(tmp_path))
    clip_layer = 4 * (1024 + 1) * 1024 + (1024 + 1) * 4096 + (4096 + 1) * 1024 + 4 * 1024
    assert about["parameters"]["total"] == 7_063_427_072 - clip_layer  # LLaVA-1.5-7B less the layer that is not read
    (row,) = (row for row in about["grids"] if row["num_image_tokens"] == 144)
    assert row["kv_cache"]["16bit"] == 2 * 32 * 4096 * 144 * 2


def test_a_folder_without_a_card_states_no_licence(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED_CHECKPOINT, folder)
    (folder / "README.md").unlink()
    assert re.search(r"licence +not stated", info(folder).stdout)
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert re.search(r"licence +not stated", info(folder).stdout)


@pytest.mark.parametrize("argument", ["no/such/model", "missing-folder"])
def test_a_missing_model_is_one_line(argument):
    result = info(argument)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"deco info: .*{argument}.*\n", result.stderr)


def test_another_model_is_refused_by_name(tmp_path):
    tiny.build_model().config.text_config.save_pretrained(tmp_path)
    result = info(tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is a 'llama' model, not a DeCo. deco convert makes one of a LLaVA" in result.stderr
