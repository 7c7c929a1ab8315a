# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo on the Hub: what is pushed, its model card, and loading by repository id at a revision, offline."""

import json
import os
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from fake_hub import FakeHub
from fresh_process import FreshProcesses
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlamaForCausalLM,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_deco import SHIPPED_CHECKPOINT, DecoConfig, DecoForConditionalGeneration, DecoModel, DecoProcessor
from modeling_deco.hub import AUTO_MAP, base_models

ROOT = Path(__file__).parents[2]
REPO = "someone/deco"
CODE_FILES = {
    "chat_templates.py",
    "configuration_deco.py",
    "feature_maps.py",
    "hub.py",
    "llava.py",
    "modeling_deco.py",
    "pixels.py",
    "positions.py",
    "processing_deco.py",
    "projectors.py",
    "videos.py",
    "views.py",
}
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
PROCESSOR_FILES = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return FakeHub(tmp_path / "cache").install(monkeypatch)


@pytest.fixture(scope="module")
def talking_processor():
    return tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE)


def files(hub, branch="main"):
    return {path.name for path in hub.snapshot(REPO, branch).iterdir()}


def readme(hub, repo_id=REPO):
    return (hub.snapshot(repo_id) / "README.md").read_text()


def metadata(hub, repo_id=REPO):
    return ModelCard(readme(hub, repo_id)).data


# --- what is pushed --------------------------------------------------------------------------------------------------


def test_a_pushed_model_is_weights_configs_code_and_card(hub, model):
    model.push_to_hub(REPO)
    assert files(hub) == MODEL_FILES | CODE_FILES | {"README.md"}
    assert json.loads((hub.snapshot(REPO) / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_pushed_processor_and_a_pushed_config_bring_the_code_and_leave_the_card_to_the_model(hub, talking_processor):
    talking_processor.push_to_hub(REPO)
    assert files(hub) == PROCESSOR_FILES | CODE_FILES
    tiny.build_config().push_to_hub(REPO)
    assert files(hub) == PROCESSOR_FILES | CODE_FILES | {"config.json"}


@pytest.mark.parametrize("order", ["model, processor", "processor, model", "together", "saved together"])
def test_pushes_in_any_order_make_a_complete_repository(order, hub, model, talking_processor, tmp_path):
    if order == "together":
        model.push_to_hub(REPO, processor=talking_processor)
    elif order == "saved together":
        model.save_pretrained(tmp_path / "deco", push_to_hub=True, repo_id=REPO, processor=talking_processor)
    else:
        parts = {"model": model, "processor": talking_processor}
        for name in order.split(", "):
            parts[name].push_to_hub(REPO)
    assert files(hub) == MODEL_FILES | PROCESSOR_FILES | CODE_FILES | {"README.md"}
    assert metadata(hub).pipeline_tag == "image-text-to-text"
    assert type(AutoModel.from_pretrained(REPO)) is DecoModel
    assert torch.equal(AutoModelForImageTextToText.from_pretrained(REPO).lm_head.weight, model.lm_head.weight)
    assert AutoProcessor.from_pretrained(REPO).chat_template == tiny.CHAT_TEMPLATE
    pipeline("image-text-to-text", model=REPO)


@pytest.mark.newest
def test_model_and_processor_together_are_one_commit(hub, model, talking_processor):
    model.push_to_hub(REPO, processor=talking_processor)
    assert len(list(hub.snapshot(REPO).parent.iterdir())) == 1


def test_arguments_of_a_push_reach_the_hub(hub, model):
    hub.commit(REPO, {"README.md": b"# Mine\n"})
    model.push_to_hub(REPO, revision="v2", private=True, commit_message="Try")
    assert hub.head(REPO, "v2") != hub.head(REPO)
    assert files(hub) == {"README.md"}
    assert files(hub, "v2") == MODEL_FILES | CODE_FILES | {"README.md"}
    assert hub.created[REPO]["private"] is True
    assert hub.messages == ["Try"]


@pytest.mark.newest
@pytest.mark.parametrize("part", ["model", "processor", "config"])
def test_saving_with_a_push_uploads_what_it_writes_and_no_other_file(part, hub, model, talking_processor, tmp_path):
    (tmp_path / "optimizer.pt").write_text("of the training run")
    saved = {"model": model, "processor": talking_processor, "config": tiny.build_config()}[part]
    saved.save_pretrained(tmp_path, push_to_hub=True, repo_id=REPO)
    expected = {"model": MODEL_FILES | {"README.md"}, "processor": PROCESSOR_FILES, "config": {"config.json"}}
    assert files(hub) == expected[part] | CODE_FILES
    assert (tmp_path / "optimizer.pt").exists()


def test_saving_without_a_push_uploads_nothing_and_writes_no_card(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "deco")
    assert not (tmp_path / "deco" / "README.md").exists()
    assert not hub.created


def test_a_process_that_is_not_the_main_one_pushes_nothing(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "deco", is_main_process=False, push_to_hub=True, repo_id=REPO)
    assert not hub.created


# --- the card of a pushed model --------------------------------------------------------------------------------------


def test_the_card_says_what_is_known_and_no_more(hub, model):
    model.push_to_hub(REPO)
    assert metadata(hub).to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["deco", "llava", "vision-language", "token-compression"],
    }


def test_what_the_user_knows_is_in_the_card(hub, model):
    widget = [{"text": "what is this ?", "src": "cat.png"}]
    model.push_to_hub(REPO, metadata={"license": "mit", "language": "en", "widget": widget}, tags="cats")
    data = metadata(hub)
    assert (data.license, data.language, data.widget) == ("mit", "en", widget)
    assert data.tags == ["deco", "llava", "vision-language", "token-compression", "cats"]


def test_tags_of_the_model_are_in_the_card(hub):
    model = tiny.build_model()
    model.add_model_tags(["trl"])
    model.push_to_hub(REPO)
    assert metadata(hub).tags[-1] == "trl"


def test_a_model_without_a_head_answers_nothing_and_its_card_says_so(hub, model):
    model.model.push_to_hub(REPO)
    assert metadata(hub).pipeline_tag is None
    assert "pipeline(" not in readme(hub)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {},
            "6 x 6 patches are shrunk by 2D average pooling, which has no parameters, to 3 x 3 = 9 tokens; any other",
        ),
        ({"pooled_grid_size": [2, 3]}, "to 2 x 3 = 6 tokens"),
        ({"projector_type": "mlp", "pooled_grid_size": 6}, "Each of an image's 6 x 6 patches becomes one token."),
        (
            {"projector_type": "qformer", "projector_config": {"hidden_size": 24, "num_attention_heads": 2}},
            "6 x 6 patches are shrunk by the projector `qformer` to 3 x 3 = 9 tokens.",
        ),
        (
            tiny.FAMILIES["llava_next"],  # 72 x 48: 9 rows of 6 tokens and a newline, and 9 tokens of the overview
            "A view's 6 x 6 patches are shrunk by 2D average pooling, which has no parameters, to 3 x 3 = 9 tokens; "
            "any other grid can be chosen per call. An image is seen as an overview and up to 6 tiles. The patches of "
            "the tiles are one map, which is pooled by the same factor. These are up to 72 tokens.",
        ),
        (tiny.FAMILIES["tiles"], "An image is seen as up to 6 tiles."),
        (
            {"video_token_id": tiny.VIDEO_TOKEN_ID, "pooled_video_grid_size": 2, "frames_per_token_grid": 4},
            "any other grid can be chosen per call. Every 4 frames of a video become 2 x 2 = 4 tokens.",
        ),
    ],
)
def test_the_card_describes_the_projector(config, text, hub):
    DecoForConditionalGeneration(tiny.build_config(**config)).push_to_hub(REPO)
    assert text in readme(hub)
    assert ("pooled_grid_size" in readme(hub)) == (config.get("projector_type") is None)


def test_the_example_in_the_card_runs(hub, talking_processor, tmp_path, monkeypatch):
    model = tiny.build_model()
    model.generation_config.max_new_tokens = 3
    model.push_to_hub(REPO, processor=talking_processor)
    (code,) = re.findall(r"```python\n(.*?)```", readme(hub), flags=re.DOTALL)
    tiny.picture(0).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["pipe"].model.name_or_path == REPO
    assert code.count("pipe(text=messages") == 2


def test_base_models_are_the_backbones_that_were_joined(hub, tmp_path):
    vision = CLIPModel(CLIPConfig(text_config=tiny.TEXT_CONFIGS["llama"], vision_config=tiny.VISION_CONFIGS["clip"]))
    vision.save_pretrained(tmp_path / "vision")
    config = AutoConfig.for_model(**tiny.TEXT_CONFIGS["llama"])
    LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    tiny.build_tokenizer().save_pretrained(tmp_path / "text")
    hub.commit("openai/tiny-clip", tmp_path / "vision")
    hub.commit("meta/tiny-llama", tmp_path / "text")
    joined = DecoForConditionalGeneration.from_vision_text_pretrained(
        "openai/tiny-clip", "meta/tiny-llama", pooled_grid_size=3
    )
    joined.push_to_hub(REPO)
    assert metadata(hub).base_model == ["openai/tiny-clip", "meta/tiny-llama"]
    joined.save_pretrained(tmp_path / "stage1")  # as training does
    DecoForConditionalGeneration.from_pretrained(tmp_path / "stage1").push_to_hub("someone/tuned")
    assert metadata(hub, "someone/tuned").base_model == ["openai/tiny-clip", "meta/tiny-llama"]


def test_the_base_model_is_the_repository_that_was_loaded(hub, model):
    model.push_to_hub("someone/base")
    DecoForConditionalGeneration.from_pretrained("someone/base").push_to_hub(REPO)
    assert metadata(hub).base_model == ["someone/base"]


def test_a_repository_is_not_its_own_base_model(hub, model, tmp_path):
    model.save_pretrained(tmp_path)
    hub.commit(REPO, tmp_path)
    DecoForConditionalGeneration.from_pretrained(REPO).push_to_hub(REPO)
    assert metadata(hub).base_model is None


@pytest.mark.parametrize(
    "name", ["/data/llava", "./align", "../runs/align", "runs/exp1/align", "align", "runs/here", ""]
)
def test_a_folder_is_no_base_model(name, tmp_path, monkeypatch):
    (tmp_path / "runs" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = tiny.build_config()
    config._name_or_path = config.vision_config._name_or_path = config.text_config._name_or_path = name
    assert base_models(config) == []


# --- a card that is there --------------------------------------------------------------------------------------------

CARD = b"---\nlicense: mit\ntags: [cats]\n# a comment\n---\n\n# Mine\n"


@pytest.mark.parametrize("part", ["model", "processor", "config"])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_the_card_of_the_repository_stays(part, way, hub, model, talking_processor, tmp_path):
    hub.commit(REPO, {"README.md": CARD})
    saved = {"model": model, "processor": talking_processor, "config": tiny.build_config()}[part]
    if way == "push_to_hub":
        saved.push_to_hub(REPO)
    else:
        (tmp_path / "README.md").write_text("# Of the folder\n")
        saved.save_pretrained(tmp_path, push_to_hub=True, repo_id=REPO)
        assert (tmp_path / "README.md").read_text() == "# Of the folder\n"
    assert readme(hub).encode() == CARD
    assert files(hub) >= CODE_FILES


def test_what_the_user_adds_is_added_to_the_card_of_the_repository(hub, model):
    hub.commit(REPO, {"README.md": CARD})
    model.push_to_hub(REPO, tags=["cats", "dogs"], metadata={"language": "en"})
    assert metadata(hub).to_dict() == {"license": "mit", "tags": ["cats", "dogs"], "language": "en"}
    assert readme(hub).endswith("# Mine\n")


def test_the_card_of_the_folder_is_the_card_of_a_new_repository(hub, model, tmp_path):
    (tmp_path / "README.md").write_bytes(CARD)
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id=REPO)
    assert readme(hub).encode() == (tmp_path / "README.md").read_bytes() == CARD


def test_the_card_of_the_folder_and_the_one_of_the_repository_are_kept_apart(hub, model, tmp_path):
    hub.commit(REPO, {"README.md": CARD})
    (tmp_path / "README.md").write_text("# Of the folder\n")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id=REPO, tags=["dogs"])
    assert (tmp_path / "README.md").read_text() == "# Of the folder\n"
    assert readme(hub).encode() == CARD


def test_the_card_that_stays_is_that_of_the_revision(hub, model):
    hub.commit(REPO, {"README.md": CARD})
    hub.commit(REPO, {"README.md": b"# Of v2\n"}, branch="v2")
    model.push_to_hub(REPO, revision="v2", tags=["dogs"])
    assert readme(hub).encode() == CARD
    other = ModelCard((hub.snapshot(REPO, "v2") / "README.md").read_text())
    assert (other.data.tags, other.text.strip()) == (["dogs"], "# Of v2")


def test_a_new_revision_begins_with_the_card_of_main(hub, model, monkeypatch):
    hub.commit(REPO, {"README.md": CARD})

    def download(repo_id, file, revision, token):
        if hub.head(repo_id, revision or "main") is None:
            raise RevisionNotFoundError("no such revision", response=Mock(headers={}))
        return hf_hub_download(repo_id, file, revision=revision, token=token)

    monkeypatch.setattr("modeling_deco.hub.hf_hub_download", download)
    model.push_to_hub(REPO, revision="v2")
    assert (hub.snapshot(REPO, "v2") / "README.md").read_bytes() == CARD


def test_a_card_that_cannot_be_read_is_not_replaced(hub, model, monkeypatch):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("the line is cut")

    monkeypatch.setattr("modeling_deco.hub.hf_hub_download", fail)
    monkeypatch.setattr("modeling_deco.hub.is_offline_mode", lambda: False)
    with pytest.raises(LocalEntryNotFoundError, match="the line is cut"):
        model.push_to_hub(REPO)
    assert hub.head(REPO) is None


def test_a_conversion_leaves_the_card_of_the_repository(hub, tmp_path):
    from modeling_deco.conversion.upload import upload

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("# Converted\n")
    (tmp_path / "model" / "config.json").write_text("{}")
    upload(tmp_path / "model", "someone/new")
    hub.commit(REPO, {"README.md": CARD})
    upload(tmp_path / "model", REPO)
    assert (hub.snapshot("someone/new") / "README.md").read_text() == "# Converted\n"
    assert readme(hub).encode() == CARD
    assert files(hub) == {"README.md", "config.json"}


# --- loading by id ---------------------------------------------------------------------------------------------------

GRIDS = {"v1": 3, "main": 2}


@pytest.fixture(scope="module")
def revisions(tmp_path_factory):
    """A Hub with a repository at two revisions, of other weights, another grid and other code; `MARK` is the code's.
    A file has what each has to give."""
    hub = FakeHub(tmp_path_factory.mktemp("hub") / "cache")
    expected = {}
    for seed, (branch, grid) in enumerate(GRIDS.items()):
        folder = tmp_path_factory.mktemp(branch)
        model = tiny.build_model(seed=seed, pooled_grid_size=grid)
        model.save_pretrained(folder)
        tiny.build_processor(grid, chat_template=tiny.CHAT_TEMPLATE).save_pretrained(folder)
        for path in folder.glob("*.py"):
            path.write_text(path.read_text() + f"\nMARK = {branch!r}\n")
        inputs = {**tiny.batch(tiny.prompt(grid**2, "what is this ?")), "pixel_values": tiny.pixels(1)}
        with torch.no_grad():
            outputs = {"logits": model(**inputs).logits, "hidden_state": model.model(**inputs).last_hidden_state}
        commit = hub.commit(REPO, folder, branch)
        expected[branch] = expected[commit] = {"inputs": inputs, "grid": grid, "branch": branch, **outputs}
    torch.save(expected, hub.cache / "expected.pt")
    return hub


def load_all(repo_id, file, *asked):
    """Load config, models, processor and pipeline at each of the revisions, "" for the default, in this order; returns
    the packages and the revisions' marks of their code."""
    import sys

    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    expected, packages, marks, models = torch.load(file), set(), [], []
    for revision in asked:
        at = {"trust_remote_code": True, **({"revision": revision} if revision else {})}
        config = AutoConfig.from_pretrained(repo_id, **at)
        processor = AutoProcessor.from_pretrained(repo_id, **at)
        base = AutoModel.from_pretrained(repo_id, **at)
        model = AutoModelForImageTextToText.from_pretrained(repo_id, **at)
        pipe = pipeline("image-text-to-text", model=repo_id, **at)
        parts = (config, processor, base, base.config, model, model.config, model.model, pipe.model, pipe.processor)
        modules = [sys.modules[type(part).__module__] for part in (*parts, model.model.multi_modal_projector)]
        packages |= {module.__name__.partition(".")[0] for module in modules}
        marks.append(sorted({getattr(module, "MARK", "none") for module in modules}))
        models.append((expected[revision or "main"], config, processor, base, model, pipe))
    for outputs, config, processor, base, model, pipe in models:  # when the others are there too
        grids = [part.pooled_grid_size for part in (config, processor, base.config, model.config, pipe.processor)]
        assert grids == [outputs["grid"]] * 5, grids
        with torch.no_grad():
            assert torch.equal(base(**outputs["inputs"]).last_hidden_state, outputs["hidden_state"])
            assert torch.equal(model(**outputs["inputs"]).logits, outputs["logits"])
            assert torch.equal(pipe.model(**outputs["inputs"]).logits, outputs["logits"])
    return [sorted(packages), marks]


ORDERS = {
    "the default": [""],
    "a branch": ["v1"],
    "a commit": ["commit of v1"],
    "new, then old": ["", "v1"],
    "old, then new": ["v1", "main", "v1"],
    "commits in turn": ["commit of main", "commit of v1", "commit of main"],
}


def revisions_of(order, hub):
    return [hub.head(REPO, name.removeprefix("commit of ")) if " of " in name else name for name in ORDERS[order]]


def branches_of(order):
    return [[name.removeprefix("commit of ") or "main"] for name in ORDERS[order]]


@pytest.mark.parametrize("order", ORDERS)
def test_a_repository_is_loaded_with_the_package(order, revisions, monkeypatch):
    revisions.install(monkeypatch)
    asked = revisions_of(order, revisions)
    expected = [["modeling_deco"], [["none"]] * len(asked)]
    assert load_all(REPO, revisions.cache / "expected.pt", *asked) == expected


@pytest.fixture(scope="module")
def remote(revisions, tmp_path_factory):
    """Fresh processes where the package cannot be imported, with an empty cache of remote code."""
    processes = FreshProcesses(
        modules=["torch", "transformers.models.auto.modeling_auto", "transformers.pipelines"],
        blocked=["modeling_deco"],
        environment={
            "HF_HUB_CACHE": str(revisions.cache),
            "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        },
    )
    yield processes
    processes.close()


@pytest.mark.parametrize("order", ORDERS)
def test_a_repository_is_loaded_without_the_package(order, revisions, remote):
    result = remote.run(load_all, REPO, revisions.cache / "expected.pt", *revisions_of(order, revisions))
    assert result == [["transformers_modules"], branches_of(order)]


def load_at_code_revision(repo_id, file, revision, code_revision):
    import sys

    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    at = {"trust_remote_code": True, "revision": revision, "code_revision": code_revision}
    outputs = torch.load(file)[revision]
    classes = (AutoConfig, AutoProcessor, AutoModelForImageTextToText)
    config, processor, model = (auto_class.from_pretrained(repo_id, **at) for auto_class in classes)
    assert config.pooled_grid_size == processor.pooled_grid_size == outputs["grid"]
    assert torch.equal(model(**outputs["inputs"]).logits, outputs["logits"])
    return [sys.modules[type(part).__module__].MARK for part in (config, processor, model, model.config)]


def test_code_can_be_of_another_revision_than_the_weights(revisions, remote):
    file = revisions.cache / "expected.pt"
    assert remote.run(load_at_code_revision, REPO, file, "main", "v1") == ["v1"] * 4


def load_without_trust(repo_id):
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(repo_id, trust_remote_code=False)
    except ValueError as error:
        return str(error)


def test_code_of_a_repository_is_not_run_without_trust(remote):
    assert "pass the argument `trust_remote_code=True`" in remote.run(load_without_trust, REPO)


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor])
def test_a_revision_that_is_not_there_is_one_error(auto_class, revisions, monkeypatch):
    revisions.install(monkeypatch)
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        auto_class.from_pretrained(REPO, revision="v9")


def test_a_pipeline_at_a_revision_that_is_not_there_is_the_same_error(revisions, monkeypatch):
    revisions.install(monkeypatch)
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        pipeline("image-text-to-text", model=REPO, revision="v9")


def test_package_and_remote_code_work_in_one_process(revisions, tmp_path, monkeypatch):
    revisions.install(monkeypatch)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    expected = torch.load(revisions.cache / "expected.pt")["v1"]
    remote_class = get_class_from_dynamic_module(AUTO_MAP["AutoModelForImageTextToText"], REPO, revision="v1")
    assert remote_class is not DecoForConditionalGeneration
    remote_model = remote_class.from_pretrained(REPO, revision="v1")
    model = AutoModelForImageTextToText.from_pretrained(REPO, revision="v1")
    assert type(model) is DecoForConditionalGeneration
    assert type(remote_model.config) is not type(model.config) is DecoConfig
    for either in (model, remote_model):
        assert torch.equal(either(**expected["inputs"]).logits, expected["logits"])


# --- pushing without the package -------------------------------------------------------------------------------------


def push_again(cache, repo_id, target, *order):
    """Push parts that were loaded by remote code to another Hub."""
    from pathlib import Path

    import pytest
    from fake_hub import FakeHub
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    classes = {
        "config": AutoConfig,
        "base model": AutoModel,
        "model": AutoModelForImageTextToText,
        "processor": AutoProcessor,
    }
    parts = []
    for name in order:  # each alone: what the process has loaded later has not been there when it was pushed
        part = classes[name].from_pretrained(repo_id, revision="v1", trust_remote_code=True)
        with pytest.MonkeyPatch.context() as patch:
            hub = FakeHub(Path(cache)).install(patch)
            part.push_to_hub(target)
        parts.append(sorted(path.name for path in hub.snapshot(target).iterdir()))
    return parts[-1]


@pytest.mark.parametrize("order", ["model, processor", "processor, model"])
def test_remote_code_pushes_a_complete_repository(order, remote, revisions, tmp_path, monkeypatch):
    pushed = remote.run(push_again, tmp_path, REPO, "me/again", *order.split(", "))
    assert set(pushed) == MODEL_FILES | PROCESSOR_FILES | CODE_FILES | {"README.md"}
    hub = FakeHub(tmp_path).install(monkeypatch)
    config = json.loads((hub.snapshot("me/again") / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    code = {name: (hub.snapshot("me/again") / name).read_text() for name in CODE_FILES}
    assert all("MARK = 'v1'" in text for text in code.values())
    assert metadata(hub, "me/again").base_model == [REPO]
    model, processor = (
        AutoModelForImageTextToText.from_pretrained("me/again"),
        AutoProcessor.from_pretrained("me/again"),
    )
    expected = torch.load(revisions.cache / "expected.pt")["v1"]
    assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
    assert type(processor) is DecoProcessor


@pytest.mark.parametrize("part", ["model", "base model"])
def test_a_model_that_is_remote_code_brings_all_of_its_code_alone(part, remote, tmp_path):
    assert set(remote.run(push_again, tmp_path, REPO, "me/again", part)) >= CODE_FILES


@pytest.mark.slow
def test_what_remote_code_pushed_is_loaded_by_remote_code(remote, revisions, tmp_path_factory):
    cache = tmp_path_factory.mktemp("again")
    remote.run(push_again, cache, REPO, "me/again", "processor", "model")
    processes = FreshProcesses(
        blocked=["modeling_deco"],
        environment={"HF_HUB_CACHE": str(cache), "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))},
    )
    expected = torch.load(revisions.cache / "expected.pt")
    torch.save({"main": expected["v1"]}, cache / "expected.pt")
    assert processes.run(load_all, "me/again", cache / "expected.pt", "") == [["transformers_modules"], [["v1"]]]
    processes.close()


# --- the card of the shipped checkpoint ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped_card():
    return ModelCard.load(ROOT / "MODEL_CARD.md")


@pytest.fixture(scope="module")
def measured():
    """By what was asked for ("alone", "in 4 bits", "in int8", "in conversation") and grid: accuracies and errors."""
    found = {}
    for name in ("digits_accuracy.jsonl", "digits_conversation.jsonl"):
        for line in (ROOT / "benchmarks" / "results" / name).read_text().splitlines():
            row = json.loads(line)
            asked = {"in conversation": "in_conversation", "in 4 bits": "in_4bit", "in int8": "in_int8"}
            how = next((how for how, field in asked.items() if row[field]), "alone")
            found[how, row["pooled_grid_size"][0]] = row["accuracy"]
    return found


def test_the_tables_of_the_shipped_card_are_what_was_measured(shipped_card, measured):
    tables = re.findall(r"^\| grid \|.*?(?=\n\n)", shipped_card.text, flags=re.DOTALL | re.MULTILINE)
    found = {}
    for how, table in zip(("alone", "in 4 bits", "in int8", "in conversation"), tables, strict=True):
        header, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines())
        for grid, tokens, *cells in rows:
            side = int(grid.partition(" x ")[0])
            assert (grid, int(tokens)) == (f"{side} x {side}", side * side)
            found[how, side] = dict(zip(header[2:], cells, strict=True))
    printed = {
        key: {kind: f"{row['accuracy']:.1f} ({row['standard_error']:.1f})" for kind, row in accuracy.items()}
        for key, accuracy in measured.items()
    }
    assert found == printed


def test_the_results_in_the_shipped_cards_metadata_are_what_was_measured(shipped_card, measured):
    results = shipped_card.data.eval_results
    assert {result.metric_name: result.metric_value for result in results} == {
        kind: row["accuracy"] for kind, row in measured["alone", 6].items()
    }
    assert {(result.task_type, result.metric_type) for result in results} == {("image-text-to-text", "accuracy")}
    assert AutoConfig.from_pretrained(SHIPPED_CHECKPOINT).pooled_grid_size == 6
    assert {result.dataset_args["pooled_grid_size"] for result in results} == {6}


def test_the_shipped_card_has_metadata(shipped_card):
    data = shipped_card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "image-text-to-text")
    assert (data.language, data.base_model) == ("en", None)
    assert {"deco", "llava", "vision-language", "token-compression"} <= set(data.tags)


def test_the_shipped_cards_widget_shows_what_the_model_answers(shipped_card):
    pipe = pipeline("image-text-to-text", model=str(SHIPPED_CHECKPOINT))
    assert len(shipped_card.data.widget) >= 3
    for example in shipped_card.data.widget:
        image, text = str(SHIPPED_CHECKPOINT / example["src"]), example["text"]
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        (output,) = pipe(text=[{"role": "user", "content": content}], return_full_text=False)
        assert output["generated_text"].strip() == example["output"]["text"]


def test_the_example_in_the_shipped_card_runs(shipped_card):
    (code,) = re.findall(r"```python\n(.*?)```", shipped_card.text, flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert names["answer"].strip() == re.search(r"# (.*)$", code.rstrip())[1]
