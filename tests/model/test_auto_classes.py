# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo through the Auto classes: registered by import in any order, and from a saved folder without the package."""

import json
import subprocess
import sys
from shutil import copytree

import pytest
import tiny
import torch
from fresh_process import FreshProcesses
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    pipeline,
)

from modeling_deco import DecoConfig, DecoForConditionalGeneration, DecoModel, DecoProcessor
from modeling_deco.modeling_deco import StopStrings

AUTO_MAP = {
    "AutoConfig": "configuration_deco.DecoConfig",
    "AutoModel": "modeling_deco.DecoModel",
    "AutoModelForImageTextToText": "modeling_deco.DecoForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_deco.DecoForConditionalGeneration",
    "AutoProcessor": "processing_deco.DecoProcessor",
}
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

# --- registered by import --------------------------------------------------------------------------------------------

# What slow imports import in their turn, from elsewhere than transformers.
DEPENDENCIES = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.export",
    "accelerate",
    "huggingface_hub",
    "scipy.optimize",
    "sklearn.metrics",
]
ENTRIES = {
    "its configuration": "from modeling_deco.configuration_deco import DecoConfig",
    "its models": "from modeling_deco.modeling_deco import DecoModel",
    "its processor": "from modeling_deco.processing_deco import DecoProcessor",
    "its projector": "from modeling_deco.projectors import AvgPoolProjector",
    "AutoConfig": "from transformers import AutoConfig",
    "AutoTokenizer": "from transformers import AutoTokenizer",
    "AutoModel": "from transformers import AutoModel",
    "AutoProcessor": "from transformers import AutoProcessor",
    "modeling_utils": "import transformers.modeling_utils",
    "processing_utils": "import transformers.processing_utils",
    "pipeline": "from transformers import pipeline",
    "Trainer": "from transformers import Trainer",
}
ALL = ["DecoConfig", "DecoModel", "DecoForConditionalGeneration", "DecoProcessor"]


@pytest.fixture(scope="module")
def fresh():
    """Fresh processes without transformers and DeCo."""
    processes = FreshProcesses(modules=DEPENDENCIES)
    yield processes
    processes.close()


def classes_after(*statements):
    """Import, then ask each Auto class for DeCo's."""
    for statement in statements:
        exec(statement, {})
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config_class = type(AutoConfig.for_model("deco"))
    mappings = (MODEL_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PROCESSOR_MAPPING)
    return [config_class.__name__, *(mapping[config_class].__name__ for mapping in mappings)]


def entries(*names, of=ENTRIES):
    """One of each kind at every run; the others among the slow tests."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in of]


@pytest.mark.parametrize("first", entries("its processor", "AutoModel"))
def test_every_auto_class_knows_deco_whatever_is_imported_before_it(first, fresh):
    assert fresh.run(classes_after, ENTRIES[first], "import modeling_deco") == ALL


@pytest.mark.parametrize(
    "then",
    entries(
        "its models",
        "AutoProcessor",
        "pipeline",
        of=["its models", "its processor", "AutoModel", "AutoProcessor", "pipeline"],
    ),
)
def test_every_auto_class_knows_deco_whatever_is_imported_after_it(then, fresh):
    assert fresh.run(classes_after, "import modeling_deco", ENTRIES[then]) == ALL


@pytest.mark.slow
@pytest.mark.parametrize("trl_first", [True, False])
def test_every_auto_class_knows_deco_beside_trl(trl_first, fresh):
    pytest.importorskip("trl")
    statements = ["from trl import SFTTrainer", "import modeling_deco"]
    assert fresh.run(classes_after, *(statements if trl_first else reversed(statements))) == ALL


def test_importing_the_package_imports_no_torch():
    code = "import sys, modeling_deco; print({'torch', 'transformers.modeling_utils'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout == "set()\n"


def modules_for_the_projector():
    import sys

    import torch

    from modeling_deco.projectors import AvgPoolProjector

    assert AvgPoolProjector(5, 12, 3)(torch.zeros(1, 36, 5)).shape == (1, 9, 12)
    return sorted(name for name in sys.modules if name.startswith("modeling_deco."))


def test_the_projector_comes_without_the_models(fresh):
    expected = ["_registration", "configuration_deco", "feature_maps", "hub", "projectors", "views"]
    assert fresh.run(modules_for_the_projector) == [f"modeling_deco.{name}" for name in expected]


def test_the_package_lists_its_names():
    import modeling_deco

    assert set(modeling_deco.__all__) <= set(dir(modeling_deco))
    assert all(getattr(modeling_deco, name) for name in modeling_deco.__all__)
    with pytest.raises(AttributeError, match="DecoTokenizer"):
        modeling_deco.DecoTokenizer  # noqa: B018


# --- with the package ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [
        (AutoConfig, DecoConfig),
        (AutoModel, DecoModel),
        (AutoModelForImageTextToText, DecoForConditionalGeneration),
        (AutoModelForMultimodalLM, DecoForConditionalGeneration),
        (AutoProcessor, DecoProcessor),
    ],
)
def test_a_checkpoint_is_loaded_by_the_classes_of_the_package_without_trust(auto_class, expected, checkpoint):
    assert type(auto_class.from_pretrained(checkpoint)) is expected


def test_the_pipeline_of_any_modality_answers_as_that_of_images(checkpoint, monkeypatch):
    # the pipeline asks for torchvision, which DeCo's processor does without
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    content = [{"type": "image", "image": tiny.picture(0)}, {"type": "text", "text": "what is this ?"}]
    messages = [{"role": "user", "content": content}]
    answers = [
        pipeline(task, model=str(checkpoint))(text=messages, return_full_text=False)[0]["generated_text"]
        for task in ("any-to-any", "image-text-to-text")
    ]
    assert answers[0] == answers[1] != ""


@pytest.fixture(scope="module")
def answer(checkpoint):
    """Of the pipeline with the package: what it has to be without."""
    return ask(checkpoint)


def conversation():
    text = {"type": "text", "text": "what is this ?"}
    return [{"role": "user", "content": [{"type": "image", "image": tiny.picture(0)}, text]}]


def ask(folder):
    pipe = pipeline("image-text-to-text", model=str(folder))
    return pipe(text=conversation(), return_full_text=False)[0]["generated_text"]


@pytest.mark.newest
def test_the_pipeline_answers_as_model_and_processor_do(answer, checkpoint):
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    inputs = processor.apply_chat_template(
        conversation(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :])
    assert answer.strip() == expected
    assert len(answer.split()) == 6


# --- what a folder holds ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model):
    """What each of the classes saves, by its name."""
    parts = {
        "config": tiny.build_config(),
        "model": model.model,
        "model with head": model,
        "processor": tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE),
    }
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in parts}
    for name, part in parts.items():
        part.save_pretrained(folders[name])
    return folders


@pytest.mark.newest
@pytest.mark.parametrize("part", ["config", "model", "model with head", "processor"])
def test_every_saved_folder_holds_the_code(part, folders):
    assert {path.name for path in folders[part].glob("*.py")} == CODE_FILES


@pytest.mark.parametrize("part", ["config", "model", "model with head"])
def test_every_config_names_all_auto_classes(part, folders):
    assert json.loads((folders[part] / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_the_config_of_the_processor_names_its_auto_class(folders):
    auto_map = json.loads((folders["processor"] / "processor_config.json").read_text())["auto_map"]
    assert auto_map == {"AutoProcessor": "processing_deco.DecoProcessor"}


def test_the_auto_map_names_classes_that_are_there():
    import modeling_deco

    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert getattr(modeling_deco, name).__module__ == f"modeling_deco.{module}"


@pytest.mark.parametrize("part", ["config", "model", "processor"])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_what_is_uploaded_holds_the_code(part, way, model, tmp_path, monkeypatch):
    class Repository(str):
        repo_id = "someone/deco"

    uploaded = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repository())
    monkeypatch.setattr(
        HfApi,
        "create_commit",
        lambda *_, operations, **__: uploaded.extend(operation.path_in_repo for operation in operations),
    )
    saved = {"config": tiny.build_config(), "model": model, "processor": tiny.build_processor()}[part]
    if way == "push_to_hub":
        saved.push_to_hub("someone/deco")
    else:
        saved.save_pretrained(str(tmp_path / "deco"), push_to_hub=True, repo_id="someone/deco")
    assert set(uploaded) >= CODE_FILES


# --- without the package ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """Fresh processes where the package cannot be imported, with an empty cache of remote code."""
    processes = FreshProcesses(
        modules=["torch", "transformers.models.auto.modeling_auto", "transformers.pipelines"],
        blocked=["modeling_deco"],
        environment={"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))},
    )
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory, model):
    """Inputs, logits and hidden state of the model, in a file."""
    inputs = {**tiny.batch(tiny.prompt(9, "what is this ?")), "pixel_values": tiny.pixels(1)}
    file = tmp_path_factory.mktemp("expected") / "outputs.pt"
    with torch.no_grad():
        hidden_state = model.model(**inputs).last_hidden_state
        torch.save({"inputs": inputs, "logits": model(**inputs).logits, "hidden_state": hidden_state}, file)
    return file


def run_views_and_videos(folder, file):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    expected = torch.load(file, weights_only=False)
    inputs = processor(
        images=expected["images"], videos=expected["videos"], text=expected["text"], return_tensors="pt"
    )
    assert inputs.keys() == expected["inputs"].keys()
    assert all(torch.equal(inputs[name], expected["inputs"][name]) for name in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected["logits"])
    return [type(part).__module__.partition(".")[0] for part in (model, processor)]


def import_the_package():
    import modeling_deco  # noqa: F401


def load_config(folder):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return [type(config).__module__.partition(".")[0], config.model_type, config.num_image_tokens]


def build_model_from_config(folder):
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    return type(model).__name__


def load_base_model(folder, file):
    import torch
    from transformers import AutoModel

    model, expected = AutoModel.from_pretrained(folder, trust_remote_code=True), torch.load(file)
    assert type(model).__module__.startswith("transformers_modules.")
    assert torch.equal(model(**expected["inputs"]).last_hidden_state, expected["hidden_state"])
    return type(model).__name__


def load_model(folder, file):
    import torch
    from transformers import AutoModelForImageTextToText

    model, expected = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True), torch.load(file)
    assert type(model).__module__.startswith("transformers_modules.")
    assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
    return type(model).__name__


def load_processor(folder):
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__module__.startswith("transformers_modules.")
    ids = processor(images=Image.new("RGB", (40, 30)), text="<image> what", pooled_grid_size=[2, 3])["input_ids"][0]
    return [type(processor).__name__, processor.pooled_grid_size, ids.count(processor.image_token_id)]


def ask_by_pipeline(folder, picture):
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is this ?"}]
    return pipe(text=[{"role": "user", "content": content}], return_full_text=False)[0]["generated_text"]


def ask_by_pipelines(first, second, picture):
    from transformers import pipeline

    answers = []
    for folder in (first, second, first):
        pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is this ?"}]
        answers += pipe(text=[{"role": "user", "content": content}], return_full_text=False)
    return [answer["generated_text"] for answer in answers]


def load_all_of_two_folders(first, second, file):
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    expected = torch.load(file)
    for folder in (first, second, first):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        base = AutoModel.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        assert config.to_dict()["model_type"] == base.config.model_type == model.config.model_type == "deco"
        assert torch.equal(base(**expected["inputs"]).last_hidden_state, expected["hidden_state"])
        assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])


def save_again(folder, target, *order):
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    classes = {
        "config": AutoConfig,
        "base model": AutoModel,
        "model": AutoModelForImageTextToText,
        "processor": AutoProcessor,
    }
    for part in order:
        classes[part].from_pretrained(folder, trust_remote_code=True).save_pretrained(target)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    tiny.picture(0).save(path)
    return path


def test_the_package_cannot_be_imported_in_what_follows(remote):
    with pytest.raises(AssertionError, match="No module named 'modeling_deco'"):
        remote.run(import_the_package)


@pytest.mark.parametrize("part", ["config", "model", "model with head"])
def test_auto_config_reads_every_folder_that_has_one(part, folders, remote):
    assert remote.run(load_config, folders[part]) == ["transformers_modules", "deco", 9]


def test_a_model_is_built_from_a_saved_config(folders, remote):
    assert remote.run(build_model_from_config, folders["config"]) == "DecoForConditionalGeneration"


@pytest.mark.parametrize("part", ["model", "model with head"])
def test_auto_model_reads_every_folder_with_a_model(part, folders, expected, remote):
    assert remote.run(load_base_model, folders[part], expected) == "DecoModel"


@pytest.mark.newest
def test_auto_model_for_image_text_to_text_reads_the_model(folders, expected, remote):
    assert remote.run(load_model, folders["model with head"], expected) == "DecoForConditionalGeneration"


def test_a_convolutional_tower_comes_with_the_code(tmp_path, remote):
    model, inputs = tiny.build_model("efficientnet"), {**tiny.batch(tiny.prompt(9, "what is this ?"))}
    inputs["pixel_values"] = tiny.pixels(1)
    with torch.no_grad():
        torch.save({"inputs": inputs, "logits": model(**inputs).logits}, tmp_path / "outputs.pt")
    model.save_pretrained(tmp_path / "model")
    found = remote.run(load_model, str(tmp_path / "model"), str(tmp_path / "outputs.pt"))
    assert found == "DecoForConditionalGeneration"


def test_auto_processor_reads_the_processor(folders, remote):
    assert remote.run(load_processor, folders["processor"]) == ["DecoProcessor", 3, 6]


@pytest.mark.newest
def test_the_pipeline_reads_a_checkpoint(checkpoint, picture, answer, remote):
    assert remote.run(ask_by_pipeline, checkpoint, picture) == answer


def test_a_folder_of_a_model_with_views_and_videos_is_read(remote, tmp_path):
    model = tiny.build_family("llava_next_video")
    processor = tiny.build_family_processor(model.config)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    given = {"images": [tiny.picture(0, 40, 110)], "videos": [[tiny.picture(1), tiny.picture(2)]]}
    given |= {"text": "<image> what is <video> this ?"}
    inputs = processor(**given, return_tensors="pt")
    with torch.no_grad():
        torch.save({**given, "inputs": dict(inputs), "logits": model(**inputs).logits}, tmp_path / "expected.pt")
    found = remote.run(run_views_and_videos, str(tmp_path / "model"), str(tmp_path / "expected.pt"))
    assert found == ["transformers_modules"] * 2


def test_two_folders_are_read_in_one_process(checkpoint, expected, remote, tmp_path, model):
    model.save_pretrained(tmp_path)
    tiny.build_processor().save_pretrained(tmp_path)
    remote.run(load_all_of_two_folders, checkpoint, tmp_path, expected)


def test_two_pipelines_are_read_in_one_process(checkpoint, picture, answer, remote, tmp_path):
    copytree(checkpoint, tmp_path / "other")
    assert remote.run(ask_by_pipelines, checkpoint, tmp_path / "other", picture) == [answer] * 3


@pytest.mark.newest
@pytest.mark.parametrize("order", [("model", "processor"), ("processor", "model")], ids=" ".join)
def test_a_folder_saved_again_works_again(order, checkpoint, picture, answer, expected, remote, tmp_path):
    remote.run(save_again, checkpoint, tmp_path, *order)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE_FILES
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert remote.run(load_model, tmp_path, expected) == "DecoForConditionalGeneration"
    assert remote.run(load_base_model, tmp_path, expected) == "DecoModel"
    assert remote.run(load_processor, tmp_path) == ["DecoProcessor", 3, 6]
    assert remote.run(ask_by_pipeline, tmp_path, picture) == answer


def test_a_folder_saved_again_is_loaded_by_the_package(checkpoint, answer, remote, tmp_path):
    remote.run(save_again, checkpoint, tmp_path, "model", "processor")
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is DecoForConditionalGeneration
    assert ask(tmp_path) == answer


@pytest.mark.parametrize("part", ["base model", "model", "processor"])
def test_a_part_saved_again_alone_works_again(part, checkpoint, expected, remote, tmp_path):
    remote.run(save_again, checkpoint, tmp_path, part)
    if part == "processor":
        assert remote.run(load_processor, tmp_path) == ["DecoProcessor", 3, 6]
    else:
        assert remote.run(load_config, tmp_path) == ["transformers_modules", "deco", 9]
        assert remote.run(load_base_model, tmp_path, expected) == "DecoModel"


def test_a_config_saved_again_alone_works_again(checkpoint, remote, tmp_path):
    remote.run(save_again, checkpoint, tmp_path, "config")
    assert remote.run(load_config, tmp_path) == ["transformers_modules", "deco", 9]


# --- stop strings ----------------------------------------------------------------------------------------------------


def test_the_pipeline_stops_at_a_stop_sequence(answer, checkpoint):
    """The tokenizer is word-level, as the shipped one: transformers' own search fails on it."""
    words = answer.split()
    stop = words[3]
    expected = words[: words.index(stop) + 1]
    pipe = pipeline("image-text-to-text", model=str(checkpoint))
    for options in (
        {"stop_sequence": stop},
        {"stop_sequence": ["blue dog cat", stop]},
        {"generate_kwargs": {"stop_strings": stop, "tokenizer": pipe.tokenizer}},
    ):
        (found,) = pipe(text=conversation(), return_full_text=False, **options)
        assert found["generated_text"].split() == expected


def test_stop_strings_of_a_generation_config_are_obeyed(answer, checkpoint):
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    stop = answer.split()[1]
    inputs = processor.apply_chat_template(
        conversation(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    config = GenerationConfig.from_model_config(model.config)
    config.update(stop_strings=[stop], max_new_tokens=6, do_sample=False)
    generated = model.generate(**inputs, generation_config=config, tokenizer=processor.tokenizer)
    assert processor.decode(generated[0, inputs["input_ids"].shape[1] :]).split()[-1] == stop
    assert config.stop_strings == [stop]  # the caller's stays as it is


def test_a_special_token_is_a_stop_string(processor, model):
    tokenizer = processor.tokenizer
    criterion = StopStrings(tokenizer, ["</s>", "red cat"], prompt_length=2)
    rows = [tiny.prompt("red cat", "a"), tiny.prompt("a", "red cat"), [1, 4, 5, tokenizer.eos_token_id], [1, 4, 2, 5]]
    found = [criterion(torch.tensor([row]), None).item() for row in rows]
    assert found == [False, True, True, True]
