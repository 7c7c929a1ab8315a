# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What could go wrong in silence: bytes that change on the way, files that contradict each other, destinations that
come to be meanwhile, and folders that only look like a checkpoint."""

import json
import shutil
import zipfile
from collections import namedtuple

import hostile
import llava_sources
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from modeling_deco.conversion import InputError, convert, export, pickles, tensors, weights, writing


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A llava-hf folder in one safetensors file, and the DeCo folder that is made of it; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    llava_sources.write_hf_saved(folder / "llava")
    convert(folder / "llava", folder / "deco")
    return folder


@pytest.fixture
def llava(saved, tmp_path):
    return shutil.copytree(saved / "llava", tmp_path / "llava")


@pytest.fixture
def deco(saved, tmp_path):
    return shutil.copytree(saved / "deco", tmp_path / "deco")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, **changes):
    stored = load_file(path)
    stored.update(changes)
    save_file({name: value for name, value in stored.items() if value is not None}, path, metadata={"format": "pt"})


# --- verification ----------------------------------------------------------------------------------------------------


def test_a_byte_that_changes_on_the_way_to_the_disk_is_found(llava, tmp_path, monkeypatch):
    write = writing._write

    def write_wrong(file, data):
        data = bytearray(data)
        if b"__metadata__" not in data and len(data) > 1000:
            data[5] ^= 1
        write(file, data)

    monkeypatch.setattr(writing, "_write", write_wrong)
    with pytest.raises(InputError, match="was read back with other bytes than were written"):
        convert(llava, tmp_path / "deco")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava"]


def test_a_sum_that_comes_out_different_the_second_time_is_found(tmp_path, monkeypatch):
    source = llava_sources.write("LoRA, safetensors", tmp_path / "source")
    read_bytes, calls = tensors.MergedLora.read_bytes, []

    def unsteady(self):
        calls.append(self.key)
        for piece in read_bytes(self):
            piece = bytearray(piece)
            piece[0] ^= calls.count(self.key) > 1
            yield memoryview(piece)

    monkeypatch.setattr(tensors.MergedLora, "read_bytes", unsteady)
    with pytest.raises(InputError, match="was computed twice with different results"):
        convert(source.folder, tmp_path / "deco", **source.arguments)


def test_one_value_among_others_that_float16_does_not_hold_is_refused(llava, tmp_path):
    bias = torch.zeros(40)
    bias[17] = -65520.0  # the smallest that is rounded to infinity
    edit_tensors(llava / "model.safetensors", **{"multi_modal_projector.linear_1.bias": bias})
    with pytest.raises(InputError, match=r"linear_1.bias' does not fit torch.float16"):
        convert(llava, tmp_path / "deco", dtype="float16")
    bias[17] = -65519.0
    edit_tensors(llava / "model.safetensors", **{"multi_modal_projector.linear_1.bias": bias})
    convert(llava, tmp_path / "deco", dtype="float16")
    converted = load_file(tmp_path / "deco" / "model.safetensors")["model.multi_modal_projector.linear_1.bias"]
    assert converted[17] == -65504


def test_a_sum_with_lora_that_float16_does_not_hold_is_refused(tmp_path):
    weights_of = {"w": torch.zeros(2, 2), "a": torch.full((1, 2), 300.0), "b": torch.tensor([[0.0], [300.0]])}
    save_file(weights_of, tmp_path / "a.safetensors")
    stored = weights.read_weight_file(tmp_path / "a.safetensors")
    merged = tensors.MergedLora(stored["w"], stored["a"], stored["b"], scale=1.0, dtype=torch.float16)
    with pytest.raises(InputError, match=r"A value of 'w' does not fit torch.float16"):
        list(merged.read_bytes())


def test_a_matrix_with_lora_that_is_summed_in_pieces_is_the_whole_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_PIECE_BYTES", 2 * 4 * 3)  # two rows of three
    w, a, b = torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 2)
    save_file({"w": w, "a": a, "b": b}, tmp_path / "a.safetensors")
    stored = weights.read_weight_file(tmp_path / "a.safetensors")
    merged = tensors.MergedLora(stored["w"], stored["a"], stored["b"], scale=0.5, dtype=torch.float32)
    written = torch.frombuffer(bytearray(b"".join(map(bytes, merged.read_bytes()))), dtype=torch.float32).view(5, 3)
    torch.testing.assert_close(written, w + 0.5 * b @ a)
    torch.testing.assert_close(merged.read(1, 4), written[1:4])


def test_a_matrix_with_lora_gets_rows_for_new_tokens(tmp_path):
    w, a, b = torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 2)
    save_file({"w": w, "a": a, "b": b}, tmp_path / "a.safetensors")
    stored = weights.read_weight_file(tmp_path / "a.safetensors")
    merged = tensors.MergedLora(stored["w"], stored["a"], stored["b"], scale=0.5, dtype=torch.float32)
    extended = tensors.Extended(merged, num_rows=7)
    assert extended.how == "merged with LoRA, and 2 rows added"
    written = torch.frombuffer(bytearray(b"".join(map(bytes, extended.read_bytes()))), dtype=torch.float32).view(7, 3)
    torch.testing.assert_close(written[:5], w + 0.5 * b @ a)
    torch.testing.assert_close(written[5:], written[:5].mean(0).expand(2, 3), atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_weights_that_are_no_numbers_are_counted_and_named(dtype, llava, tmp_path, caplog):
    bias = torch.zeros(40)
    bias[3], bias[39] = float("nan"), float("-inf")
    edit_tensors(llava / "model.safetensors", **{"multi_modal_projector.linear_1.bias": bias})
    report = convert(llava, tmp_path / "deco", dtype=dtype)
    name = "model.multi_modal_projector.linear_1.bias"
    assert report["nonfinite"] == {name: 2}
    message = next(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert f"2 weights of 1 tensors are NaN or infinite as in the source: {name}." in message


def test_new_rows_have_a_hundred_thousandth_of_the_variance_of_the_old_ones(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = 5 + 100 * torch.randn(2000, 64, generator=generator)
    save_file({"rows": rows}, tmp_path / "a.safetensors")
    extended = tensors.Extended(weights.read_weight_file(tmp_path / "a.safetensors")["rows"], 2000 + 500)
    data = b"".join(map(bytes, extended.read_bytes()))
    new = torch.frombuffer(bytearray(data), dtype=torch.float32).view(2500, 64)[2000:]
    assert torch.allclose(new.mean(0), rows.mean(0), atol=0.1)
    assert new.std(0).mean().item() == pytest.approx(100 * 1e-5**0.5, rel=0.03)  # 0.316


# --- fields of the original's config ---------------------------------------------------------------------------------


def test_new_tokens_have_the_ids_that_the_original_gives_them(tmp_path):
    place = hostile.Place(tmp_path, "original")
    num_pieces = json.loads((place.source / "config.json").read_text())["vocab_size"]
    edit_json(place.source / "config.json", mm_use_im_start_end=True, mm_use_im_patch_token=True)
    convert(place.source, place.destination, **place.options)
    tokenizer = AutoTokenizer.from_pretrained(place.destination, trust_remote_code=False)
    names = ["<im_patch>", "<im_start>", "<im_end>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(names) == [num_pieces + index for index in range(4)]


@pytest.mark.parametrize("layer", [None, -1])
def test_without_a_layer_the_last_but_one_is_read_as_in_llava(layer, tmp_path):
    place = hostile.Place(tmp_path, "original")
    content = json.loads((place.source / "config.json").read_text())
    del content["mm_vision_select_layer"]
    if layer is not None:
        content["mm_vision_select_layer"] = layer
    (place.source / "config.json").write_text(json.dumps(content))
    convert(place.source, place.destination, **place.options)
    config = json.loads((place.destination / "config.json").read_text())
    num_layers = tiny.VISION_CONFIGS["clip"]["num_hidden_layers"]
    assert config["vision_config"]["num_hidden_layers"] == (num_layers if layer == -1 else num_layers - 1)


def test_a_pickle_whose_data_is_shorter_than_it_says_is_refused(tmp_path):
    torch.save({"a": torch.arange(100.0)}, tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as whole, zipfile.ZipFile(tmp_path / "short.bin", "w") as short:
        for info in whole.infolist():
            data = whole.read(info)
            short.writestr(info.filename, data[:200] if info.filename.endswith("/data/0") else data)
    with pytest.raises(InputError, match=r"short\.bin"):
        weights.read_weight_file(tmp_path / "short.bin")


def test_several_shards_are_written_and_loaded(llava, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 50_000)
    report = convert(llava, tmp_path / "deco", check_logits=True)
    assert len(list((tmp_path / "deco").glob("model-*-of-*.safetensors"))) == len(report["written"]) > 2
    assert report["parity"]["max_abs_difference"] == 0
    assert any("logits of LLaVA and DeCo in float32 differ by at most 0" in text for text in caplog.messages)


def test_a_torch_that_does_not_say_where_tensors_lie_gives_the_same(tmp_path, monkeypatch):
    source = llava_sources.write("LoRA, .bin", tmp_path / "source")
    reports = [convert(source.folder, tmp_path / "now", **source.arguments)]
    monkeypatch.setattr(pickles, "_storage_offset", lambda tensor: None)  # as before torch 2.10
    reports.append(convert(source.folder, tmp_path / "then", **source.arguments))
    assert reports[0]["tensors"] == reports[1]["tensors"]


def test_a_negated_view_keeps_its_sign(tmp_path):
    torch.save({"a": torch._neg_view(torch.tensor([1.0, -2.0]))}, tmp_path / "a.bin")
    stored = weights.read_weight_file(tmp_path / "a.bin")["a"]
    assert stored.read().tolist() == [-1.0, 2.0]
    assert b"".join(map(bytes, stored.read_bytes())) == torch.tensor([-1.0, 2.0]).numpy().tobytes()


# --- files that contradict each other --------------------------------------------------------------------------------


def test_the_one_file_goes_before_stale_shards_as_in_transformers(llava, tmp_path):
    stale = {name: value + 1 for name, value in load_file(llava / "model.safetensors").items()}
    save_file(stale, llava / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")}
    (llava / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert(llava, tmp_path / "deco", check_logits=True)["parity"]["max_abs_difference"] == 0


def test_a_head_that_differs_from_the_embeddings_stays_though_the_config_ties_them(llava, tmp_path):
    edit_json(llava / "config.json", tie_word_embeddings=True)
    convert(llava, tmp_path / "deco")
    head = load_file(llava / "model.safetensors")["language_model.lm_head.weight"]
    converted = AutoModelForImageTextToText.from_pretrained(tmp_path / "deco")
    assert torch.equal(converted.lm_head.weight[: len(head)], head)


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_rounded_copy_of_a_frozen_tower_gives_way_to_the_tower_itself(is_trained, tmp_path):
    llava = llava_sources.OriginalLlava()
    rounded = {name: value.to(torch.bfloat16) for name, value in llava.tensors().items()}
    config = {"unfreeze_mm_vision_tower": is_trained}
    llava_sources.write_original(tmp_path / "source", (llava, rounded), tower_inside=True, config=config)
    llava_sources.write_clip(tmp_path / "tower", llava.tower)
    report = convert(tmp_path / "source", tmp_path / "deco", vision_tower=tmp_path / "tower")
    stored = load_file(tmp_path / "deco" / "model.safetensors")["model.vision_tower.embeddings.patch_embedding.weight"]
    key = "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"
    assert stored.dtype == (torch.bfloat16 if is_trained else torch.float32)
    assert (key in report["dropped"]) == (not is_trained)


def test_a_tower_inside_does_where_the_named_one_has_no_weights(tmp_path):
    llava = llava_sources.OriginalLlava()
    llava_sources.write_original(tmp_path / "source", llava, tower_inside=True)
    llava_sources.write_clip(tmp_path / "tower", llava.tower)
    for path in (tmp_path / "tower").glob("*.bin"):
        path.unlink()
    convert(tmp_path / "source", tmp_path / "deco", vision_tower=tmp_path / "tower")
    assert (tmp_path / "deco" / "model.safetensors").exists()


def test_several_chat_templates_become_one(llava, tmp_path):
    for path in llava.glob("chat_template*"):
        path.unlink()
    default = "{% for m in messages %}<|{{ m['role'] }}|><image>{% endfor %}"
    templates = [{"name": "default", "template": default}, {"name": "tool_use", "template": "tools"}]
    edit_json(llava / "tokenizer_config.json", chat_template=templates)
    convert(llava, tmp_path / "deco")
    assert (tmp_path / "deco" / "chat_template.jinja").read_text() == default


# --- destinations ----------------------------------------------------------------------------------------------------


def test_what_comes_to_be_at_the_destination_meanwhile_stays(llava, tmp_path, monkeypatch):
    open_source = convert.__globals__["open_source"]

    def open_and_make(*arguments):
        (tmp_path / "deco").mkdir()
        (tmp_path / "deco" / "mine.txt").write_text("mine")
        return open_source(*arguments)

    check_destination = convert.__globals__["check_destination"]
    calls = []

    def check_once(*arguments):  # so that only the check before the rename is left
        calls.append(arguments)
        if len(calls) == 1:
            check_destination(*arguments)

    monkeypatch.setitem(convert.__globals__, "open_source", open_and_make)
    monkeypatch.setitem(convert.__globals__, "check_destination", check_once)
    with pytest.raises(InputError, match="is not empty"):
        convert(llava, tmp_path / "deco")
    assert (tmp_path / "deco" / "mine.txt").read_text() == "mine"


def test_a_folder_whose_config_is_of_no_model_is_not_overwritten(llava, tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "config.json").write_text('{"name": "my web app"}')
    with pytest.raises(InputError, match="is not overwritten: it has no config.json of a model"):
        convert(llava, tmp_path / "app", overwrite=True)
    assert (tmp_path / "app" / "config.json").exists()


def test_what_a_killed_run_left_counts_as_free(llava, tmp_path, monkeypatch):
    left_over = tmp_path / ".deco.incomplete" / "new"
    left_over.mkdir(parents=True)
    with open(left_over / "model.safetensors", "wb") as file:
        file.truncate(100 << 20)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=1 << 20))
    convert(llava, tmp_path / "deco")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deco", "llava"]


def test_a_licence_that_is_a_link_is_not_copied(llava, tmp_path):
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (llava / "LICENSE").symlink_to(tmp_path / "secret")
    (llava / "NOTICE").write_text("by its makers")
    convert(llava, tmp_path / "deco")
    assert not (tmp_path / "deco" / "LICENSE").exists()
    assert (tmp_path / "deco" / "NOTICE").read_text() == "by its makers"


# --- export ----------------------------------------------------------------------------------------------------------

UP_PROJ = "model.language_model.layers.0.mlp.up_proj.weight"


def test_a_deco_whose_files_are_broken_is_not_exported(saved, tmp_path):
    weights_of = [
        ({UP_PROJ: None}, rf"1 parameters are missing, such as '{UP_PROJ}'"),
        ({UP_PROJ: torch.zeros(3, 40)}, r"has the shape \(3, 40\), and the config .* wants \(56, 40\)"),
        ({f"{UP_PROJ}.absmax": torch.zeros(3)}, r"up_proj\.weight\.absmax' in .* is an unknown key"),
    ]
    configs = [
        ({"quantization_config": {"load_in_4bit": True}}, "has a quantization_config"),
        ({"pooled_grid_size": 99}, r"config\.json of "),
        ({"vision_config": 3}, r"config\.json of "),
        ({"projector_type": "x"}, r"config\.json of "),
    ]
    cases = [("model.safetensors", edit_tensors, *case) for case in weights_of]
    cases += [("config.json", edit_json, *case) for case in configs]
    for file, edit, changes, match in cases:
        deco = shutil.copytree(saved / "deco", tmp_path / "deco")
        edit(deco / file, **changes)
        with pytest.raises(InputError, match=match) as refusal:
            export(deco, tmp_path / "back")
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "back").exists()
        shutil.rmtree(deco)


@pytest.mark.parametrize("tower", ["dinov2", "siglip2", "efficientnet"])
def test_a_tower_that_llava_does_not_read_is_not_exported(tower, tmp_path):
    tiny.build_model(tower).save_pretrained(tmp_path / "deco")
    with pytest.raises(InputError, match=rf"is a {tower}.*; CLIP and SigLIP can be exported"):
        export(tmp_path / "deco", tmp_path / "back")


# --- values of the wrong kind ----------------------------------------------------------------------------------------


def test_a_value_of_the_wrong_kind_is_refused_in_one_line(tmp_path):
    cases = [
        ("config.json", {"mm_vision_select_feature": []}),
        ("config.json", {"mm_vision_tower": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": []}),
        ("tokenizer_config.json", {"eos_token": {"a": 1}}),
        ("tokenizer_config.json", {"eos_token": ["x"]}),
        ("tokenizer_config.json", {"pad_token": True}),
        ("generation_config.json", {"eos_token_id": "x", "max_new_tokens": []}),
    ]

    def spoil(file, changes):
        def edit(place):
            path = place.source / file
            path.write_text(path.read_text() if path.exists() else "{}")
            edit_json(path, **changes)

        return edit

    for file, changes in cases:
        options = {"vision_tower": None} if "mm_vision_tower" in changes else {}
        hostile.assert_all_refused(tmp_path, "original", {str(changes): (spoil(file, changes), "", options)})
