# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Static caches, compiled decoding, CUDA graphs and attention kernels. The forward pass as one graph is in
test_modeling_deco.py."""

import pytest
import tiny
import torch
from transformers import CompileConfig

from modeling_deco import DecoForConditionalGeneration

GREEDY = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def model():
    return tiny.build_model().eval()


def inputs_of(*seeds, **kwargs):
    processor = tiny.build_processor()
    texts = ["<image> what is this ?", "<image> a ?"][: len(seeds)]
    return processor(
        images=[tiny.picture(seed) for seed in seeds], text=texts, return_tensors="pt", padding=True, **kwargs
    )


@pytest.mark.parametrize("grid", [None, 2])
def test_a_static_cache_gives_the_same_tokens(grid, model):
    inputs = inputs_of(0, 1, pooled_grid_size=grid)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_decoding_compiles_to_one_graph_that_serves_the_next_prompt_of_that_length(backend, model):
    compile_config = CompileConfig(fullgraph=True, mode="default", backend=backend)
    compile_config._compile_all_devices = True
    compiled = {**GREEDY, "cache_implementation": "static", "compile_config": compile_config}
    first, second = inputs_of(0), inputs_of(1)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(**first, **compiled), model.generate(**first, **GREEDY))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        found = model.generate(**second, **compiled)
    assert torch.equal(found, model.generate(**second, **GREEDY))


def test_attention_is_sdpa_in_all_parts_by_default():
    model = DecoForConditionalGeneration(tiny.build_config())
    parts = (model, model.model.vision_tower, model.model.language_model)
    assert [part.config._attn_implementation for part in parts] == ["sdpa"] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a flash attention that is not there")
def test_flash_attention_is_accepted_and_fails_for_want_of_its_library_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="the package for FlashAttention2 doesn.t seem to be installed"):
        DecoForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@pytest.mark.gpu
def test_flash_attention_gives_the_logits_of_sdpa(model, tmp_path):
    pytest.importorskip("flash_attn")
    model.save_pretrained(tmp_path)
    inputs, logits = inputs_of(0, 1).to("cuda", torch.bfloat16), {}
    for implementation in ("sdpa", "flash_attention_2"):
        loaded = DecoForConditionalGeneration.from_pretrained(
            tmp_path, attn_implementation=implementation, dtype=torch.bfloat16
        ).to("cuda")
        with torch.inference_mode():
            logits[implementation] = loaded(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(logits["flash_attention_2"], logits["sdpa"], rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_tokens():
    model = tiny.build_model().eval().to("cuda")
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)}
    assert compiled["compile_config"].mode == "reduce-overhead"
    for seed in (0, 1):
        inputs = inputs_of(seed).to("cuda")
        assert torch.equal(model.generate(**inputs, **GREEDY, **compiled), model.generate(**inputs, **GREEDY))


@pytest.mark.gpu
@torch.inference_mode()
def test_a_forward_pass_in_cuda_graphs_gives_the_same_logits():
    model = tiny.build_model().eval().to("cuda")
    inputs = inputs_of(0).to("cuda")
    expected = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead")
    for _ in range(3):  # to compile, to record, to replay
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
