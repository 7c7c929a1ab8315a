# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""From the name of a model to its checkpoint: what is missing, or is not a DeCo, is reported in one line."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tiny
import torch
from fake_hub import FakeHub
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from modeling_deco import SHIPPED_CHECKPOINT, DecoConfig, DecoForConditionalGeneration
from modeling_deco.conversion import InputError
from modeling_deco.conversion import convert as convert_checkpoint
from modeling_deco.conversion import export as export_checkpoint
from modeling_deco.inference import describe, load, load_config, load_model
from modeling_deco.inference.lookup import checkpoint_name
from modeling_deco.inference.quantization import nf4_config


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "model").mkdir(parents=True)
    (tmp_path / "models" / "deco-7b").mkdir(parents=True)
    (tmp_path / "model.safetensors").touch()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("models/deco-7b", "models/deco-7b"),
        (Path("models/deco-7b"), "models/deco-7b"),
        ("~/model", "{home}/model"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
    ],
)
def test_a_folder_and_a_hub_id_are_names_of_checkpoints(here, name, path):
    assert checkpoint_name(name) == path.format(home=os.environ["HOME"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deco-7b", r"^There is no folder deco-7b; a Hub id would be owner/name\.$"),
        ("", r"^There is no folder ''; a Hub id"),
        ("./deco-7b", r"^There is no folder \./deco-7b; a Hub id"),
        ("~/deco-7b", r"^There is no folder ~/deco-7b; a Hub id"),
        ("~nobody-at-all/deco-7b", r"^There is no folder ~nobody-at-all/deco-7b; a Hub id"),
        ("/models/deco-7b", r"^There is no folder /models/deco-7b; a Hub id"),
        ("a/b/c", r"^There is no folder a/b/c; a Hub id"),
        ("owner/a name", r"^There is no folder owner/a name; a Hub id"),
        ("owner/", r"^There is no folder owner/; a Hub id"),
        ("owner/" + 300 * "a", r"^There is no folder owner/a+; a Hub id"),
        (
            "models/deco-13b",
            r"^There is no folder models/deco-13b\. The Hub is not asked, since models is a folder here",
        ),
        ("model.safetensors", r"^model\.safetensors is a file; a model is a folder or a Hub id"),
    ],
)
def test_a_mistyped_name_is_said_at_once(here, name, message):
    """Sockets are blocked, and a name that is looked for on the Hub would end in another message."""
    with pytest.raises(ValueError, match=message):
        load_config(name)


def test_a_mistyped_source_of_a_conversion_is_said_at_once(here):
    for name in ("llava-7b", "models/llava-7b", "model.safetensors"):
        with pytest.raises(ValueError) as said:  # noqa: PT011  its words are what is compared with
            checkpoint_name(name)
        for run in (convert_checkpoint, export_checkpoint):
            with pytest.raises(InputError, match=re.escape(f"SRC: {said.value}")):
                run(name, "out")


@pytest.mark.parametrize("fields", [{"model_type": "llava"}, {}])
def test_what_is_no_deco_is_refused_in_the_same_words_by_every_door(fields, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(fields))
    words = rf"{model} is a {fields.get('model_type')!r} model, not a DeCo\. deco convert makes one of a LLaVA; "
    for door in (load_config, load, describe):
        with pytest.raises(ValueError, match=words):
            door(str(model))
    with pytest.raises(InputError, match=words):
        export_checkpoint(model, tmp_path / "exported")


def test_the_config_is_the_saved_one(tmp_path):
    config = tiny.build_config(pooled_grid_size=[2, 3])
    config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).to_dict() == config.to_dict()


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(checkpoint, tmp_path):
    """A copy of the checkpoint, to be spoiled."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def change(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without(*prefixes):
    def drop(tensors):
        for key in [key for key in tensors if key.startswith(prefixes)]:
            del tensors[key]

    return lambda folder: change(folder, drop)


def with_tensor(key, *shape):
    return lambda folder: change(folder, lambda tensors: tensors.update({key: torch.zeros(*shape)}))


def in_shards(spoil):
    """Two files and their index, which `spoil` changes."""

    def split(folder):
        model = DecoForConditionalGeneration.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="60KB")
        spoil(folder)

    return split


def without_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def half_a_shard(folder):
    with (folder / "model-00003-of-00003.safetensors").open("r+b") as file:
        file.truncate(5000)


def without_a_tensor_of_a_shard(folder):
    file = next(file for file in sorted(folder.glob("model-*")) if "lm_head.weight" in load_file(file))
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})


PROJECTOR = "model.multi_modal_projector"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without(PROJECTOR),
            rf"no weights for 4 of the model's 64 tensors: {PROJECTOR}\.linear_1\.bias, .* and 1 more\.",
        ),
        (
            without(f"{PROJECTOR}.linear_2.bias"),
            rf"no weights for 1 of the model's 64 .*: {PROJECTOR}\.linear_2\.bias\.",
        ),
        (without("lm_head"), r"no weights for 1 of the model's 64 tensors: lm_head\.weight\."),
        (
            without("model.vision_tower"),
            r"no weights for 39 of the model's 64 tensors: model\.vision_tower\..* and 36 more\.",
        ),
        (without(""), r"no weights for 64 of the model's 64 tensors"),
        (
            with_tensor(f"{PROJECTOR}.linear_1.weight", 32, 16),
            rf"has 1 tensors whose shape differs .*: {PROJECTOR}\.linear_1\.weight is \[32, 16\], not \[32, 32\]\.",
        ),
        (
            with_tensor(f"{PROJECTOR}.linear_3.weight", 32, 32),
            rf"has 1 tensors that are not in the model of its config\.json: {PROJECTOR}\.linear_3\.weight\.",
        ),
        (with_tensor("lm_head.bias", 64), r"has 1 tensors that are not in the model .*: lm_head\.bias\."),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights: neither model\.safetensors nor"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b""),
            r"model\.safetensors of .* is damaged or incomplete",
        ),
        (in_shards(without_shard), r"lacks 1 of the 3 files that .* names: model-00002-of-00003\.safetensors\."),
        (in_shards(half_a_shard), r"model-00003-of-00003\.safetensors of .* is damaged or incomplete"),
        (in_shards(without_a_tensor_of_a_shard), r"no weights for 1 of the model's 64 tensors: lm_head\.weight\."),
    ],
)
def test_weights_that_are_not_the_configs_are_refused_by_every_door(spoil, message, whole):
    spoil(whole)
    for door in (load, describe):
        with pytest.raises(ValueError, match=message) as raised:
            door(str(whole))
        assert re.fullmatch(rf"(\S+ of )?{whole} .*", str(raised.value))


def test_shards_that_are_whole_are_read(whole):
    in_shards(lambda folder: None)(whole)
    assert len(list(whole.glob("model-*.safetensors"))) == 3
    load(str(whole))
    describe(str(whole))


def test_layers_of_the_tower_that_are_not_read_may_be_there(whole):
    """A LLaVA checkpoint is a DeCo's with another config.json."""
    with_tensor("model.vision_tower.encoder.layers.7.mlp.fc1.weight", 48, 32)(whole)
    load(str(whole))
    describe(str(whole))


@pytest.mark.parametrize("text", ["llama", "gemma"])
def test_a_head_that_is_the_embeddings_is_not_missing(text, tmp_path):
    tiny.build_model(text=text, tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model, _ = load(str(tmp_path))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    describe(str(tmp_path))


def test_weights_that_are_stored_in_another_form_are_not_missing(tmp_path):
    """Of Mixtral each expert's matrices are stored, and one tensor for all is computed with."""
    from transformers import MixtralConfig

    text = MixtralConfig(**tiny.TEXT_CONFIGS["llama"] | {"model_type": "mixtral", "num_local_experts": 2})
    config = tiny.build_config()
    config = DecoConfig(**{**config.to_dict(), "text_config": text})
    tiny.randomize(DecoForConditionalGeneration(config)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(".experts.1." in key for key in stored)
    load_model(str(tmp_path))
    describe(str(tmp_path))
    without("model.language_model.layers.0.")(tmp_path)
    for door in (load_model, describe):
        with pytest.raises(ValueError, match=r"no weights for \d+ of the model's \d+ tensors: model\.language_model"):
            door(str(tmp_path))


def test_quantized_weights_are_whole_by_their_names(tmp_path):
    from transformers import AutoProcessor

    model = DecoForConditionalGeneration.from_pretrained(SHIPPED_CHECKPOINT, quantization_config=nf4_config())
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(SHIPPED_CHECKPOINT).save_pretrained(tmp_path)
    load(str(tmp_path))
    describe(str(tmp_path))
    without(PROJECTOR)(tmp_path)
    for door in (load, describe):
        with pytest.raises(ValueError, match=rf"no weights for 4 of .*: {PROJECTOR}\.linear_1\.bias"):
            door(str(tmp_path))


def test_weights_on_the_hub_are_checked_where_they_are_cached(whole, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub").install(monkeypatch)
    hub.commit("me/whole", whole)
    assert describe("me/whole")["parameters"] == describe(str(whole))["parameters"]
    without(PROJECTOR)(whole)
    hub.commit("me/part", whole)
    for door in (load, describe):
        with pytest.raises(ValueError, match=rf"^me/part has no weights for 4 of .*: {PROJECTOR}"):
            door("me/part")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["me/absent"], r"^There is no folder me/absent, and the Hub cannot be asked for it: this is offline mode\.$"),
        (["me/whole", "v2"], r"^There is no folder me/whole, and the Hub cannot be asked"),
        (["me/empty"], r"^me/empty is not a model: it has no config\.json\.$"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(arguments, message, whole, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub").install(monkeypatch)
    hub.commit("me/whole", whole)
    hub.commit("me/empty", {"README.md": b"nothing"})
    for door in (load_config, describe):
        with pytest.raises(ValueError, match=message):
            door(*arguments)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", r"^There is neither a folder me/it nor such a model on the Hub, or it is private"),
        ("GatedRepoError", r"^me/it is gated: ask for access on its page, huggingface\.co/me/it"),
        ("RevisionNotFoundError", r"^me/it has no revision 'v2' on the Hub"),
        ("EntryNotFoundError", r"^me/it is not a model: it has no config\.json"),
    ],
)
def test_what_the_hub_answers_is_one_line(error, message, monkeypatch):
    import huggingface_hub.errors

    response = MagicMock()

    def fail(*args, **kwargs):
        kind = getattr(huggingface_hub.errors, error)
        arguments = {"response": response} if issubclass(kind, huggingface_hub.errors.HfHubHTTPError) else {}
        raise kind("404 Client Error. Request ID: 1-2-3", **arguments)

    monkeypatch.setattr("modeling_deco.inference.lookup.hf_hub_download", fail)
    with pytest.raises(ValueError, match=message):
        load_config("me/it", "v2")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    from huggingface_hub import HfApi

    asked = []

    def fail(api, repo_id, **kwargs):
        asked.append(repo_id)
        raise RuntimeError("[Errno -2] Name or service not known")

    monkeypatch.setattr("modeling_deco.inference.lookup.is_offline_mode", lambda: False)
    monkeypatch.setattr(HfApi, "model_info", fail)
    with pytest.raises(
        ValueError, match=r"^There is no folder chekpoints/deco-7b, and asking the Hub for it failed: \["
    ):
        load_config("chekpoints/deco-7b")
    assert asked == ["chekpoints/deco-7b"]


def test_heads_of_files_on_the_hub_are_asked_for_where_they_are_not_cached(whole, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub").install(monkeypatch)
    shapes = {key: tensor.shape for key, tensor in load_file(whole / "model.safetensors").items()}
    (whole / "model.safetensors").unlink()
    hub.commit("me/it", whole)
    describe("me/it")  # offline: nothing is known of the weights
    heads = {key: SimpleNamespace(shape=list(shape)) for key, shape in shapes.items() if PROJECTOR not in key}
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=heads)})
    for module in ("lookup", "weights"):
        monkeypatch.setattr(f"modeling_deco.inference.{module}.is_offline_mode", lambda: False)
    monkeypatch.setattr("modeling_deco.inference.weights.get_safetensors_metadata", lambda *args, **kwargs: metadata)
    monkeypatch.setattr("modeling_deco.inference.lookup.hf_hub_download", fetched := _cached(hub, "me/it"))
    with pytest.raises(ValueError, match=r"^me/it has no weights for 4 of the model's 64 tensors"):
        describe("me/it")
    assert fetched


def _cached(hub, repo_id):
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(repo_id, filename, revision=None):
        file = hub.snapshot(repo_id) / filename
        if not file.exists():
            raise EntryNotFoundError(filename)
        return str(file)

    return fetch


# --- adapters --------------------------------------------------------------------------------------------------------

LORA = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["multi_modal_projector"]}


def save_adapter(base: Path, folder: Path, lora=LORA) -> dict[str, torch.Tensor]:
    """An adapter that changes what the model answers, and the logits of some inputs with it."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(base), LoraConfig(**lora, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.tensor([tiny.prompt("what", 9, "?")]), pixel_values=tiny.pixels(1)).logits


def point_to(folder: Path, base) -> None:
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": base}))


@pytest.mark.parametrize("place", ["absolute", "beside", "in it", "moved with it", "working directory"])
def test_an_adapter_is_loaded_onto_its_base_wherever_that_is(place, whole, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    right = save_adapter(whole, adapter)
    if place == "beside":
        point_to(adapter, "../model")
    elif place == "in it":
        shutil.move(whole, adapter / "base")
        point_to(adapter, "base")
    elif place == "moved with it":
        shutil.move(whole, adapter / "base")
        point_to(adapter, "/where/it/was/trained/base")
    elif place == "working directory":
        monkeypatch.chdir(tmp_path)
        point_to(adapter, "model")
    model, processor = load(str(adapter))
    assert type(model) is DecoForConditionalGeneration
    torch.testing.assert_close(logits(model), right, rtol=0, atol=1e-4)
    base = whole if whole.exists() else adapter / "base"
    assert (logits(load_model(str(base))) - right).abs().max() > 0.1
    assert processor.chat_template == tiny.CHAT_TEMPLATE
    about = describe(str(adapter))
    assert about["parameters"]["total"] == model.num_parameters()
    assert Path(about["adapter_of"]).samefile(base)


def test_an_adapters_own_processor_and_grid_are_used(whole, tmp_path):
    save_adapter(whole, tmp_path / "adapter")
    tiny.build_processor(pooled_grid_size=2, chat_template="{{ 'the' }}").save_pretrained(tmp_path / "adapter")
    model, processor = load(str(tmp_path / "adapter"))
    assert (processor.chat_template, processor.pooled_grid_size, model.config.pooled_grid) == (
        "{{ 'the' }}",
        2,
        (2, 2),
    )


def test_what_an_adapter_trained_in_float32_has_the_type_of_its_base(whole, tmp_path):
    """The recipes train the projector in float32 on a base of 16 bits."""
    save_adapter(whole, tmp_path / "adapter")
    load_model(whole, dtype=torch.bfloat16).save_pretrained(whole)
    model, _ = load(str(tmp_path / "adapter"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    inputs = {"input_ids": torch.tensor([tiny.prompt("what", 9, "?")]), "pixel_values": tiny.pixels(1).bfloat16()}
    assert model(**inputs).logits.isfinite().all()


def test_an_adapter_of_a_base_on_the_hub(whole, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub").install(monkeypatch)
    hub.commit("me/base", whole)
    right = save_adapter(whole, tmp_path / "adapter")
    point_to(tmp_path / "adapter", "me/base")
    torch.testing.assert_close(logits(load(str(tmp_path / "adapter"))[0]), right, rtol=0, atol=1e-4)
    hub.commit("me/adapter", tmp_path / "adapter")
    torch.testing.assert_close(logits(load("me/adapter")[0]), right, rtol=0, atol=1e-4)


def test_an_adapters_base_is_of_the_revision_that_it_was_trained_on(whole, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub").install(monkeypatch)
    right = save_adapter(whole, tmp_path / "adapter")
    hub.commit("me/base", {"README.md": b"Nothing yet."})
    hub.commit("me/base", whole, branch="v2")
    point_to(tmp_path / "adapter", "me/base")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**fields, "revision": "v2"}))
    torch.testing.assert_close(logits(load(str(tmp_path / "adapter"))[0]), right, rtol=0, atol=1e-4)


def llava(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llava"}')


def drop_adapter_weight(folder, word):
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[next(key for key in sorted(tensors) if word in key)]
    save_file(tensors, folder / "adapter_model.safetensors")


ADAPTER_SPOILS = [
    (
        lambda base, folder: point_to(folder, "gone"),
        r"is an adapter, and its base model is missing .*no folder gone;",
    ),
    (lambda base, folder: point_to(folder, None), r"does not name its base model \(base_model_name_or_path\)"),
    (lambda base, folder: point_to(folder, "."), r"which is not a model: it has no config\.json"),
    (lambda base, folder: llava(base), r"model is a 'llava' model, not a DeCo"),
    (lambda base, folder: without(PROJECTOR)(base), r"model has no weights for 4 of the model's 64 tensors"),
    (lambda base, folder: (folder / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
    (
        lambda base, folder: drop_adapter_weight(folder, "lora_B"),
        r"adapter has no weights for 1 of .*lora_B\.weight\.",
    ),
    (
        lambda base, folder: drop_adapter_weight(folder, "projector"),
        r"adapter has no weights for 1 of .*projector\.lin",
    ),
    (lambda base, folder: llava(folder), r"has both a model \(config\.json\) and an adapter"),
]


@pytest.mark.parametrize(("spoil", "message"), ADAPTER_SPOILS)
def test_an_adapter_that_is_not_whole_is_one_line(spoil, message, whole, tmp_path):
    save_adapter(whole, tmp_path / "adapter")
    spoil(whole, tmp_path / "adapter")
    for door in (load, describe):
        with pytest.raises(ValueError, match=message) as raised:
            door(str(tmp_path / "adapter"))
        assert len(str(raised.value).splitlines()) == 1


def test_an_adapter_without_peft_says_what_to_install(whole, tmp_path, monkeypatch):
    save_adapter(whole, tmp_path / "adapter")
    monkeypatch.setattr("modeling_deco.inference.adapters.find_spec", lambda name: None if name == "peft" else True)
    for door in (load, describe):
        with pytest.raises(
            ValueError, match=r"adapter is an adapter, which needs peft: pip install peft\. .*merge_ad"
        ):
            door(str(tmp_path / "adapter"))


def test_an_adapter_that_is_no_part_of_the_weights_is_refused(whole, tmp_path):
    PromptTuningConfig(
        num_virtual_tokens=2, base_model_name_or_path=str(whole), token_dim=32, num_layers=2
    ).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter of the kind PROMPT_TUNING, which cannot be merged"):
        load(str(tmp_path / "adapter"))


def test_an_adapter_stays_one_on_4_bits_and_is_merged_before_int8(tmp_path):
    lora = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "lora_alpha": 1}
    get_peft_model(load_model(SHIPPED_CHECKPOINT), LoraConfig(**lora)).save_pretrained(tmp_path)
    kinds = {}
    for name, arguments in {"4bit": {"in_4bit": True}, "int8": {"in_int8": True}, "float": {}}.items():
        kinds[name] = {type(module).__name__ for module in load(str(tmp_path), **arguments)[0].modules()}
    assert {"Linear4bit", "ParameterDict"} < kinds["4bit"]  # in the latter LoRA's layers keep theirs
    assert "Int8Linear" in kinds["int8"]
    assert "ParameterDict" not in kinds["int8"] | kinds["float"]
    with pytest.raises(ValueError, match=r"is an adapter, which cannot be merged in 4 bits: merge it before"):
        load(str(tmp_path), in_4bit=True, in_int8=True)
