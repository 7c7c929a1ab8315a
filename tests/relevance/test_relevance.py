# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Relevance maps against rules written out here: full matrices, plain loops, `backward` in float64."""

import copy
import math
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
)
from transformers.generation.streamers import BaseStreamer

from modeling_deco import DecoConfig, DecoForConditionalGeneration, DecoProcessor
from modeling_deco.relevance import Relevance, explain, plot_relevance
from modeling_deco.relevance.explain import _decode_one_by_one, _find_word_ids
from modeling_deco.relevance.figure import describe_peak, draw_heat_map
from modeling_deco.relevance.forward import _check_layers
from modeling_deco.relevance.rules import _divide_by_sum, _normalize_rows

QUESTION, ANSWER = "what is this ?", "a red cat ."
SMALL = {"hidden_size": 16, "num_attention_heads": 2}
PROJECTORS = {
    "avg_pool": {},
    "mlp": {"pooled_grid_size": 6},
    "qformer": {"projector_config": {**SMALL, "num_hidden_layers": 3}},
    "resampler": {"projector_config": {**SMALL, "num_hidden_layers": 2}},
    "c_abstractor": {"projector_config": {"hidden_size": 16, "num_hidden_layers": 1}},
    "d_abstractor": {"projector_config": {**SMALL, "num_hidden_layers": 2}},
}
GRID = [2, 3]  # of what is not said otherwise: neither square nor all the patches
WORD_IDS = range(len(tiny.SPECIAL_TOKENS), tiny.IMAGE_TOKEN_ID)
IN_WORDS = {"suppress_tokens": [token for token in range(tiny.VOCAB_SIZE) if token not in WORD_IDS]}


def build(projector="avg_pool", vision="clip", text="llama", **kwargs):
    """A model in float64, in which rounding does not hide a mistake, and its processor."""
    kwargs = {"pooled_grid_size": GRID, **PROJECTORS[projector], **kwargs}
    model = tiny.build_model(vision, text, projector_type=projector, **kwargs).double()
    return model, tiny.build_processor(kwargs["pooled_grid_size"], chat_template=tiny.CHAT_TEMPLATE)


def explain_answer(model, processor, answer=ANSWER, **kwargs) -> Relevance:
    return explain(model, processor, tiny.picture(0), QUESTION, answer, **kwargs)


def assert_same(found: Relevance, expected: Relevance, **tolerance):
    for name in ("text_to_query", "query_to_patch", "text_to_patch"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **tolerance)


# --- naive rules -----------------------------------------------------------------------------------------------------


class Naive:
    """The same answer differentiated by `backward` for the token at `index`, every attention kept with its `.grad`."""

    def __init__(self, model, processor, index, answer=ANSWER):
        model = copy.deepcopy(model)
        model.set_attn_implementation("eager")
        self.attentions = {"vision_tower": [], "multi_modal_projector": [], "language_model": []}
        for part, kept in self.attentions.items():
            for module in model.model.get_submodule(part).modules():
                if "Attention" in type(module).__name__:
                    module.register_forward_hook(self._keep(kept), with_kwargs=True)
        self.projector = model.model.multi_modal_projector
        self.projector.register_forward_hook(self._keep_call)

        content = [{"type": "image", "image": tiny.picture(0)}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        prompt, answer_ids = inputs.pop("input_ids")[0].tolist(), processor.tokenizer(answer)["input_ids"]
        inputs.pop("attention_mask")
        self.ids = prompt + answer_ids
        self.position = len(prompt) + index - 1
        logits = model(input_ids=torch.tensor([self.ids]), **inputs).logits[0, self.position]
        token = answer_ids[index]
        (logits[token] - max(logit for other, logit in enumerate(logits) if other != token)).backward()
        self.placeholders = [at for at, token in enumerate(self.ids) if token == tiny.IMAGE_TOKEN_ID]
        self.first_patch = model.config.num_prefix_tokens

    def _keep(self, kept):
        def hook(module, args, kwargs, output):
            if isinstance(output, tuple) and isinstance(output[1], torch.Tensor) and output[1].requires_grad:
                output[1].retain_grad()
                kept.append((output[1], kwargs.get("encoder_hidden_states") is not None))

        return hook

    def _keep_call(self, module, args, output):
        self.patches, self.patch_grid, self.pooled_grid = args
        self.num_patches = self.patches.shape[1]
        output.retain_grad()
        self.features = output

    def maps(self, part):
        """`A` of each attention, and whether it is cross-attention."""
        found = []
        for attention, is_cross in self.attentions[part]:
            total = torch.zeros(attention.shape[-2:], dtype=torch.float64)
            for head in range(attention.shape[1]):
                product = attention.grad[0, head] * attention.detach()[0, head]
                total += torch.where(product > 0, product, 0.0)
            found.append((total / attention.shape[1], is_cross))
        return found

    def relevance(self, part):
        """R of a stack of self-attention, all of it."""
        maps = self.maps(part)
        relevance = torch.eye(len(maps[0][0]), dtype=torch.float64)
        for attention_map, _ in maps:
            relevance = relevance + attention_map @ relevance
        return relevance

    def text_to_query(self):
        return self.relevance("language_model")[self.position, self.placeholders]

    def patch_columns(self, matrix):
        return matrix[..., self.first_patch : self.first_patch + self.num_patches]

    def tower_relevance(self):
        return self.patch_columns(self.patch_columns(self.relevance("vision_tower")).T).T

    def pooling(self):
        """Windows of adaptive average pooling, cell by cell."""
        (patch_rows, patch_cols), (rows, cols) = self.patch_grid, self.pooled_grid
        matrix = torch.zeros(rows * cols, patch_rows, patch_cols, dtype=torch.float64)
        for row in range(rows):
            for col in range(cols):
                top, bottom = row * patch_rows // rows, math.ceil((row + 1) * patch_rows / rows)
                left, right = col * patch_cols // cols, math.ceil((col + 1) * patch_cols / cols)
                matrix[row * cols + col, top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
        return matrix.flatten(1)

    def query_to_patch(self, projector_type):
        if projector_type in ("avg_pool", "mlp"):
            return self.pooling() @ self.tower_relevance()
        if projector_type == "qformer":
            return self.qformer()
        if projector_type == "resampler":
            return self.resampler() @ self.tower_relevance()
        return self.gradient_times_input() @ self.tower_relevance()

    def qformer(self):
        num_queries = self.features.shape[1]
        r_qq = torch.eye(num_queries, dtype=torch.float64)
        r_ii = normalized(self.relevance("vision_tower"))
        r_qi = torch.zeros(num_queries, len(r_ii), dtype=torch.float64)
        pad = (self.first_patch, len(r_ii) - self.first_patch - self.num_patches)
        for attention_map, is_cross in self.maps("multi_modal_projector"):
            if is_cross:
                attention_map = torch.nn.functional.pad(attention_map, pad)
                r_qi = r_qi + normalized(r_qq).T @ attention_map @ r_ii
            else:
                r_qi, r_qq = r_qi + attention_map @ r_qi, r_qq + attention_map @ r_qq
        return self.patch_columns(r_qi)

    def resampler(self):
        """One rule of self-attention over patches and latents, whose rows of patches attend to nothing."""
        num_queries = self.features.shape[1]
        size = self.num_patches + num_queries
        relevance = torch.eye(size, dtype=torch.float64)
        for attention_map, _ in self.maps("multi_modal_projector"):
            joint = torch.zeros(size, size, dtype=torch.float64)
            joint[self.num_patches :] = attention_map
            relevance = relevance + joint @ relevance
        return relevance[self.num_patches :, : self.num_patches]

    def gradient_times_input(self):
        def project(patches):
            return self.projector.forward(patches[None], self.patch_grid, self.pooled_grid)[0]  # without hooks

        patches = self.patches.detach()[0]
        jacobian = torch.autograd.functional.jacobian(project, patches)  # (queries, hidden, patches, vision_hidden)
        products = torch.einsum("qh,qhpc,pc->qp", self.features.grad[0], jacobian, patches)
        rows = []
        for row in products.clamp(min=0):
            rows.append(row / row.sum() if row.sum() > 0 else row)
        return torch.stack(rows)


def normalized(relevance):
    """Each row of what was added to the identity divided by its sum."""
    rows = []
    for index, row in enumerate(relevance):
        added = row.clone()
        added[index] -= 1
        total = added.sum()
        added = added / total if total > 0 else added
        added[index] += 1
        rows.append(added)
    return torch.stack(rows)


NAIVE_CASES = [
    *((projector, "clip", {}) for projector in PROJECTORS),
    *((projector, "dinov2_with_registers", {}) for projector in ("avg_pool", "qformer", "resampler")),
    ("avg_pool", "siglip", {"pooled_grid_size": [4, 5]}),  # overlapping windows
    ("c_abstractor", "clip", {"pooled_grid_size": [5, 4]}),
]


@pytest.mark.newest
@pytest.mark.parametrize(("projector", "vision", "kwargs"), NAIVE_CASES)
def test_maps_are_those_of_the_naive_rules(projector, vision, kwargs):
    model, processor = build(projector, vision, **kwargs)
    found = explain_answer(model, processor)
    for index in (0, 2):
        naive = Naive(model, processor, index)
        text_to_query, query_to_patch = naive.text_to_query(), naive.query_to_patch(projector)
        tolerance = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
        torch.testing.assert_close(found.text_to_query[index], text_to_query, **tolerance)
        torch.testing.assert_close(found.query_to_patch[index], query_to_patch, **tolerance)
        torch.testing.assert_close(found.text_to_patch[index], text_to_query @ query_to_patch, **tolerance)


@pytest.mark.parametrize("grid", [[2, 3], [4, 5], 6], ids=str)
def test_pooling_is_as_a_layer_of_attention_between_tower_and_language_model(grid):
    model, processor = build(pooled_grid_size=grid)
    found = explain_answer(model, processor)
    for index in range(4):
        naive = Naive(model, processor, index)
        tower, language = naive.maps("vision_tower"), naive.maps("language_model")
        num_tower = len(tower[0][0])
        size = num_tower + len(naive.ids)
        layers = []
        for attention_map, _ in tower:
            layers.append(torch.zeros(size, size, dtype=torch.float64))
            layers[-1][:num_tower, :num_tower] = attention_map
        layers.append(torch.zeros(size, size, dtype=torch.float64))
        for placeholder, row in zip(naive.placeholders, naive.pooling(), strict=True):
            layers[-1][num_tower + placeholder, naive.first_patch : naive.first_patch + naive.num_patches] = row
        for attention_map, _ in language:
            layers.append(torch.zeros(size, size, dtype=torch.float64))
            layers[-1][num_tower:, num_tower : num_tower + len(attention_map)] = torch.nn.functional.pad(
                attention_map, (0, 0, 0, len(naive.ids) - len(attention_map))
            )
        relevance = torch.eye(size, dtype=torch.float64)
        for layer in layers:
            relevance = relevance + layer @ relevance
        expected = naive.patch_columns(relevance[num_tower + naive.position])
        torch.testing.assert_close(found.text_to_patch[index], expected, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("projector", ["avg_pool", "qformer", "resampler"])
def test_the_baseline_is_mean_attention(projector):
    model, processor = build(projector)
    found = explain_answer(model, processor, method="attention")
    naive = Naive(model, processor, index=1)
    means = {
        part: [(attention[0].detach().mean(0), is_cross) for attention, is_cross in kept]
        for part, kept in naive.attentions.items()
    }
    text_to_query = torch.stack([mean[naive.position] for mean, _ in means["language_model"]]).mean(0)
    torch.testing.assert_close(
        found.text_to_query[1], text_to_query[naive.placeholders], rtol=1e-6, atol=1e-6, check_dtype=False
    )
    if projector == "avg_pool":
        expected = naive.pooling()
    else:
        read = [mean for mean, is_cross in means["multi_modal_projector"] if is_cross or projector == "resampler"]
        expected = torch.stack(read).mean(0)[:, : naive.num_patches]
    torch.testing.assert_close(found.query_to_patch[1], expected, rtol=1e-6, atol=1e-6, check_dtype=False)


def test_rows_without_mass_stay_zero():
    rows = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert _divide_by_sum(rows).tolist() == [[0, 0], [0.25, 0.75]]
    assert torch.equal(_normalize_rows(torch.eye(3)), torch.eye(3))


@pytest.mark.parametrize("projector", PROJECTORS)
def test_a_picture_without_influence_gives_zeros_and_no_nan(projector):
    model, processor = build(projector)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
    found = explain_answer(model, processor)
    for name in ("text_to_query", "query_to_patch", "text_to_patch"):
        assert getattr(found, name).isfinite().all()
    assert not found.text_to_patch.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_relevance(found, "both").canvas.draw()


# --- what a token depends on -----------------------------------------------------------------------------------------


def test_what_comes_after_a_token_has_no_influence():
    model, processor = build()
    longer, shorter = explain_answer(model, processor, "a red cat ."), explain_answer(model, processor, "a red dog")
    assert_same(longer._mean([[0], [1]], ["a", "red"], [0, 1]), shorter._mean([[0], [1]], ["a", "red"], [0, 1]))
    assert not torch.allclose(longer.text_to_query[2], shorter.text_to_query[2])


def test_a_generated_answer_is_explained_like_the_same_answer_given():
    model, processor = build()
    generated = explain_answer(model, processor, answer=None, max_new_tokens=4, do_sample=False, **IN_WORDS)
    assert len(generated.tokens) == 4
    assert_same(generated, explain_answer(model, processor, generated.answer))


@pytest.fixture
def tower_calls():
    """A list that grows with each call of a model's vision tower, and what attaches it."""
    calls, handles = [], []

    def count(model):
        hook = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
        handles.append(hook)
        return calls

    yield count
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("method", ["gae", "attention"])
@pytest.mark.parametrize(
    "kwargs",
    [{"answer": ANSWER}, {"max_new_tokens": 3, **IN_WORDS}, {"max_new_tokens": 3, "num_beams": 2, **IN_WORDS}],
    ids=["given", "greedy", "beams"],
)
def test_the_image_is_encoded_once_for_answer_and_maps(tower_calls, method, kwargs):
    model, processor = build()
    calls = tower_calls(model)
    explain_answer(model, processor, **{"answer": None, **kwargs}, method=method)
    assert len(calls) == 1


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_answer_is_what_the_model_generates(projector, num_beams):
    model, processor = build(projector)
    content = [{"type": "image", "image": tiny.picture(0)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    arguments = {"max_new_tokens": 5, "num_beams": num_beams, **IN_WORDS}
    expected = model.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :].tolist()
    found = explain_answer(model, processor, answer=None, **arguments)
    assert [token for (token,) in found.token_ids] == [token for token in expected if token != 2]


def test_a_streamer_gets_the_answer_before_the_maps_are_computed(monkeypatch):
    model, processor = build()
    events = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: events.append("map") or grad(*args, **kwargs))

    class Streamer(BaseStreamer):
        def put(self, ids):
            events.append("token")

        def end(self):
            events.append("end")

    explain_answer(model, processor, answer=None, max_new_tokens=2, streamer=Streamer(), **IN_WORDS)
    assert events == ["token"] * 3 + ["end"] + ["map"] * 2  # the prompt, too, is put


def test_special_tokens_are_not_explained():
    model, processor = build()
    red = processor.tokenizer("red")["input_ids"]
    script = [*red, 3, *red, 2]  # <unk> amid the answer, </s> at its end
    sequence = []

    def force(batch, ids):
        sequence.append(ids)
        return [script[len(sequence) - 1]]

    found = explain_answer(model, processor, answer=None, max_new_tokens=8, prefix_allowed_tokens_fn=force)
    assert (found.answer, found.tokens, found.token_ids) == ("red red", ["red", " red"], [red, red])
    unbroken = explain_answer(model, processor, "red red")
    torch.testing.assert_close(found.text_to_query[0], unbroken.text_to_query[0])
    assert not torch.allclose(found.text_to_query[1], unbroken.text_to_query[1])  # <unk> is in the context


# --- backbones, grids, pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vision", "text"),
    [*((vision, "llama") for vision in tiny.VISION_CONFIGS), *(("clip", t) for t in tiny.TEXT_CONFIGS)],
)
def test_every_backbone_gives_maps(vision, text):
    model, processor = tiny.build_model(vision, text), tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE)
    found = explain_answer(model, processor, pooled_grid_size=[4, 5])
    assert (found.patch_grid, found.pooled_grid, found.has_grid) == ((6, 6), (4, 5), True)
    shapes = [found.text_to_query.shape, found.query_to_patch.shape, found.text_to_patch.shape]
    assert shapes == [(4, 20), (4, 20, 36), (4, 36)]
    assert all(map.dtype == torch.float32 and (map >= 0).all() for map in (found.text_to_query, found.text_to_patch))
    assert (found.text_to_patch.sum(-1) > 0).all()
    assert found.image.shape == (24, 24, 3)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_projector_gives_maps_in_bfloat16(projector):
    model, processor = build(projector)
    found = explain_answer(model.bfloat16(), processor)
    rows, cols = found.pooled_grid
    assert found.query_to_patch.shape == (4, rows * cols, 36)
    assert found.text_to_patch.dtype == torch.float32
    assert found.text_to_patch.isfinite().all()
    assert found.text_to_patch.any()
    assert found.has_grid == (projector not in ("qformer", "resampler"))


def test_pictures_need_not_be_square():
    model = tiny.build_model()
    image_processor = CLIPImageProcessorPil(size={"height": 19, "width": 34}, do_center_crop=False)
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), 3, chat_template=tiny.CHAT_TEMPLATE)
    found = explain_answer(model, processor)
    assert (found.patch_grid, found.text_to_patch.shape) == ((4, 8), (4, 32))
    resized = np.asarray(tiny.picture(0).resize((34, 19), Image.Resampling.BICUBIC)).astype(int)
    assert found.image.shape == (16, 32, 3)  # what no patch covers is cut off
    assert np.abs(found.image - resized[:16, :32]).max() <= 1


def test_the_windows_of_an_oblong_picture_are_rows_by_columns():
    model = tiny.build_model(pooled_grid_size=2)
    image_processor = CLIPImageProcessorPil(size={"height": 16, "width": 32}, do_center_crop=False)
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), 2, chat_template=tiny.CHAT_TEMPLATE)
    found = explain_answer(model, processor, method="attention")
    expected = torch.zeros(4, 4, 8)  # 2 x 2 windows of 2 x 4 patches
    for query, (top, left) in enumerate([(0, 0), (0, 4), (2, 0), (2, 4)]):
        expected[query, top : top + 2, left : left + 4] = 1 / 8
    torch.testing.assert_close(found.query_to_patch[0], expected.flatten(1))


def test_siglip2_at_any_shape():
    image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=40)
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), 3, chat_template=tiny.CHAT_TEMPLATE)
    picture = tiny.picture(0, 20, 40)
    found = explain(tiny.build_model("siglip2"), processor, picture, QUESTION, ANSWER)
    rows, cols = found.patch_grid
    assert rows < cols
    assert rows * cols < 40  # so that there is padding
    assert found.text_to_patch.shape == (4, rows * cols)
    resized = np.asarray(picture.resize((4 * cols, 4 * rows), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(found.image - resized).max() <= 2


def test_padding_of_siglip2_changes_nothing():
    model, found = tiny.build_model("siglip2").double(), []
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8))
    for max_num_patches in (32, 40):
        image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=max_num_patches)
        processor = DecoProcessor(image_processor, tiny.build_tokenizer(), 3, chat_template=tiny.CHAT_TEMPLATE)
        processor.image_processor.do_resize = False
        found.append(explain(model, processor, picture, QUESTION, ANSWER))
    assert_same(*found)


# --- what is left as it was ------------------------------------------------------------------------------------------


def state_of(model):
    implementations = {
        name: module.config._attn_implementation for name, module in model.named_modules() if hasattr(module, "config")
    }
    modes = {name: module.training for name, module in model.named_modules()}
    num_hooks = sum(len(module._forward_hooks) for module in model.model.multi_modal_projector.modules())
    return implementations, modes, num_hooks


@pytest.fixture
def mixed_model():
    """Trained with a tower in evaluation mode, and with another attention in the language model."""
    model, processor = build("qformer")
    explain_answer(model, processor)  # transformers puts its own hooks on at the first call
    model.train()
    model.model.vision_tower.eval()
    model.model.language_model.config._attn_implementation = "eager"
    assert len(set(state_of(model)[0].values())) == 2
    return model, processor


def test_attention_and_mode_are_put_back(mixed_model):
    before = state_of(mixed_model[0])
    explain_answer(*mixed_model)
    assert state_of(mixed_model[0]) == before


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector", "language_model"])
def test_attention_and_mode_are_put_back_after_an_error(part, mixed_model, monkeypatch):
    model, processor = mixed_model
    before = state_of(model)

    def fail(*args, **kwargs):
        assert not model.training
        assert model.model.vision_tower.config._attn_implementation == "eager"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model.get_submodule(part), "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        explain_answer(model, processor)
    assert state_of(model) == before


def test_dropout_is_off(mixed_model):
    model, processor = mixed_model
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    assert_same(explain_answer(model, processor), explain_answer(model, processor))


def test_generation_has_the_attention_that_the_model_has(monkeypatch):
    model, processor = build()
    generate, used = model.generate, []

    def spy(**kwargs):
        used.append(model.model.language_model.config._attn_implementation)
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", spy)
    explain_answer(model, processor, answer=None, max_new_tokens=2, **IN_WORDS)
    assert used == [model.config._attn_implementation] == ["sdpa"]


@pytest.mark.parametrize("projector", PROJECTORS)
def test_parameters_may_be_frozen_and_their_grad_is_not_touched(projector):
    model, processor = build(projector)
    expected = explain_answer(model, processor)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.requires_grad_(False)
    assert_same(explain_answer(model, processor), expected, rtol=0, atol=0)
    assert (model.lm_head.weight.grad == 1).all()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_gradients_off(mode):
    model, processor = build()
    expected = explain_answer(model, processor)
    with mode():
        assert_same(explain_answer(model, processor), expected, rtol=0, atol=0)
        assert not torch.is_grad_enabled()
        generated = explain_answer(model, processor, answer=None, max_new_tokens=2, **IN_WORDS)
    assert len(generated.tokens) == 2


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model, processor = build()
    with pytest.raises(ValueError, match=r"loaded under torch\.inference_mode\(\); load it outside"):
        explain_answer(model, processor)


def test_memory_does_not_grow_with_the_number_of_tokens(monkeypatch):
    model, processor = build()
    grad, num_differentiated = torch.autograd.grad, []

    def spy(output, *args, **kwargs):
        num_differentiated.append(output.numel())
        return grad(output, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    explain_answer(model, processor)
    assert num_differentiated == [1] * 4


# --- wrapped and quantized -------------------------------------------------------------------------------------------


def test_a_model_with_lora_and_a_trained_projector():
    peft = pytest.importorskip("peft")
    model, processor = build("qformer")
    expected = explain_answer(model, processor)
    config = peft.LoraConfig(
        r=2, target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["multi_modal_projector"]
    )
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    assert_same(explain_answer(wrapped, processor), expected)  # a fresh adapter changes nothing
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted = explain_answer(wrapped, processor)
    assert not torch.allclose(adapted.text_to_query, expected.text_to_query)
    assert_same(explain_answer(wrapped.merge_and_unload(), processor), adapted, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("model")
    text_config = {**tiny.TEXT_CONFIGS["llama"], "hidden_size": 64, "intermediate_size": 128}
    config = DecoConfig(
        vision_config=tiny.VISION_CONFIGS["clip"],
        text_config=text_config,
        image_token_id=tiny.IMAGE_TOKEN_ID,
        pooled_grid_size=3,
    )
    tiny.randomize(DecoForConditionalGeneration(config)).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=quantization)


def test_a_4_bit_model(quantized):
    processor = tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE)
    generated = explain_answer(quantized, processor, answer=None, max_new_tokens=3, **IN_WORDS)
    found = explain_answer(quantized, processor, generated.answer)
    assert_same(found, generated, rtol=1e-4, atol=1e-6)
    assert (found.text_to_patch.sum(-1) > 0).all()
    dequantized = copy.deepcopy(quantized).dequantize()
    assert_same(explain_answer(dequantized, processor, generated.answer), found, rtol=1e-2, atol=1e-4)


def test_4_bit_layers_are_not_in_the_mode_that_repacks_them(quantized):
    processor = tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE)
    layer, modes = quantized.model.language_model.layers[0].mlp.up_proj, []
    assert type(layer).__name__ == "Linear4bit"
    handle = layer.register_forward_hook(lambda module, *_: modes.append(module.training))
    explain_answer(quantized, processor, answer=None, max_new_tokens=2, **IN_WORDS)
    handle.remove()
    assert all(modes)
    assert len(modes) == 3  # two steps of generation, and the differentiated pass
    assert not layer.training


def test_attention_without_graph_is_refused():
    model, processor = build()
    layer = model.model.language_model.layers[1].self_attn
    for projection in (layer.q_proj, layer.k_proj):
        projection.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match="1 of 4 attentions cannot be differentiated"):
        explain_answer(model, processor)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "rollout"}, "method must be one of gae, attention, got 'rollout'"),
        ({"answer": ""}, "The answer is empty"),
        ({"answer": None, "max_new_tokens": 1, "suppress_tokens": list(range(3, 64))}, "The answer is empty"),
        ({"max_new_tokens": 3}, "max_new_tokens has no effect on a given answer"),
        ({"answer": None, "num_return_sequences": 2}, "num_return_sequences cannot be set"),
        ({"answer": "a <image> red"}, "The answer contains '<image>', which marks an image"),
        ({"pooled_grid_size": 7}, "7 x 7 is larger than the 6 x 6 patches"),
    ],
)
def test_what_cannot_be_explained_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        explain_answer(*build(), **kwargs)


@pytest.mark.parametrize("projector", ["c_abstractor", "d_abstractor"])
def test_abstractors_have_no_attention_to_patches(projector):
    with pytest.raises(ValueError, match=f"'{projector}' has no attention to patches; use method='gae'"):
        explain_answer(*build(projector), method="attention")


def test_other_models_are_refused():
    model, processor = build()
    with pytest.raises(ValueError, match="needs a DecoForConditionalGeneration, got a DecoModel"):
        explain_answer(model.model, processor)


def test_layers_without_attention_are_refused():
    config = tiny.build_config().text_config
    attention = torch.zeros(1, 2, 5, 5)
    for attentions, number in [(None, 0), ((attention,), 1), ((None, attention), 1)]:
        with pytest.raises(
            ValueError, match=rf"language model \(llama\) has 2 layers but returns {number} attentions"
        ):
            _check_layers(attentions, config, "language model")


# --- tokens and words ------------------------------------------------------------------------------------------------


def relevance_of(tokens, seed=0) -> Relevance:
    generator = torch.Generator().manual_seed(seed)
    number = len(tokens)
    return Relevance(
        answer="".join(tokens).strip(),
        tokens=tokens,
        token_ids=[[index] for index in range(number)],
        word_ids=_find_word_ids(tokens),
        patch_grid=(4, 6),
        pooled_grid=(2, 3),
        has_grid=True,
        text_to_query=torch.rand(number, 6, generator=generator),
        query_to_patch=torch.rand(number, 6, 24, generator=generator),
        text_to_patch=torch.rand(number, 24, generator=generator),
        image=np.zeros((32, 48, 3), dtype=np.uint8),
    )


@pytest.mark.parametrize(
    ("tokens", "word_ids", "words", "groups"),
    [
        (["7", " red", "."], [0, 1, 1], ["7", "red"], [[0], [1]]),
        (
            ["A", " re", "d", ",", " big", " cat"],
            [0, 1, 1, 1, 2, 3],
            ["A", "red", "big", "cat"],
            [[0], [1, 2], [4], [5]],
        ),
        (["don", "'", "t", "\n", "x"], [0, 0, 0, None, 1], ["don't", "x"], [[0, 2], [4]]),
        (["a", " -", " b"], [0, 1, 2], ["a", "b"], [[0], [2]]),
        ([" ", "cat", " ", "dog"], [None, 0, None, 1], ["cat", "dog"], [[1], [3]]),
        (["", "", "é", "t", "é"], [0, 0, 0, 0, 0], ["été"], [[0, 1, 2, 3, 4]]),
        (["a", "", " é"], [0, 1, 1], ["a", "é"], [[0], [1, 2]]),
        (["the", " red cat", "s"], [0, 2, 2], ["the", "red cats"], [[0], [1, 2]]),
        (["?", "!"], [0, 0], ["?!"], [[0, 1]]),
    ],
)
def test_words_are_means_of_their_tokens(tokens, word_ids, words, groups):
    relevance = relevance_of(tokens)
    assert relevance.word_ids == word_ids
    grouped = relevance.by_word()
    assert (grouped.tokens, grouped.token_ids) == (words, groups)
    for index, group in enumerate(groups):
        for name in ("text_to_query", "query_to_patch", "text_to_patch"):
            torch.testing.assert_close(
                getattr(grouped, name)[index], sum(getattr(relevance, name)[group]) / len(group)
            )
    again = grouped.by_word()
    assert again.tokens == words
    assert_same(again, grouped, rtol=0, atol=0)


def test_the_average_of_chosen_words():
    relevance = relevance_of(["re", "d", " or", " blue", ",", " no", " red", "."])
    average = relevance.average(["red", "blue"])
    assert (average.tokens, average.token_ids) == (["red blue red"], [[0, 1, 3, 6]])
    expected = (relevance.text_to_patch[:2].mean(0) + relevance.text_to_patch[3] + relevance.text_to_patch[6]) / 3
    torch.testing.assert_close(average.text_to_patch, expected[None])
    assert average.text_to_query.shape == (1, 6)


def test_a_word_that_is_not_in_the_answer_is_refused():
    with pytest.raises(ValueError, match="'green' is not a word of the answer; choose from '7', 'red'"):
        relevance_of(["7", " red", "."]).average(["red", "green"])
    with pytest.raises(ValueError, match="at least one word"):
        relevance_of(["7"]).average([])


def test_pieces_of_characters_wait_for_the_last():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = tokenizer("né 猫.")["input_ids"]
    assert _decode_one_by_one(tokenizer, ids) == ["n", "", "é", " ", "", "", "猫", "."]
    assert _decode_one_by_one(tokenizer, ids[:-2]) == ["n", "", "é", " ", "", "\ufffd"]  # generation stopped there


# --- figure ----------------------------------------------------------------------------------------------------------


def panels(figure):
    """Titles of the panels that are drawn, row by row."""
    return [axes.get_title() for axes in figure.axes if axes.images and axes.get_title()]


@pytest.mark.parametrize(
    ("level", "titles"),
    [
        ("patch", ["4 x 6 patches", "7", "red"]),
        ("query", ["2 x 3 tokens", "7", "red"]),
        ("both", ["4 x 6 patches", "7", "red", "2 x 3 tokens", "7", "red"]),
    ],
)
def test_a_figure_has_a_panel_for_each_word(level, titles):
    from matplotlib.figure import Figure

    relevance = relevance_of(["7", " red", "."])
    figure = plot_relevance(relevance, level)
    assert isinstance(figure, Figure)
    assert panels(figure) == titles
    drawn = [axes.images[-1].get_array() for axes in figure.axes if axes.get_title() == "red"]
    for heat, name in zip(drawn, {"both": ("patch", "query")}.get(level, (level,)), strict=True):
        values = relevance.text_to_patch[1].view(4, 6) if name == "patch" else relevance.text_to_query[1].view(2, 3)
        np.testing.assert_allclose(heat, values / values.max(), rtol=1e-6)


def drawn(relevance, index, level="patch"):
    """The figure of one word, `(height, width, 3)`, in which a patch has 20 x 20 pixels or, by query, 40 x 40."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = relevance.image.shape[:2]
    figure = Figure(figsize=(1.2, 1.2 * height / width), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_heat_map(axes, relevance, index, level)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def cells(pixels, rows, cols):
    """The middle pixel of each cell."""
    height, width = pixels.shape[0] // rows, pixels.shape[1] // cols
    return pixels[height // 2 :: height, width // 2 :: width]


@pytest.mark.parametrize("level", ["patch", "query"])
def test_each_patch_is_drawn_in_its_place_as_bright_as_its_relevance(level):
    relevance = relevance_of(["7", " red"])
    picture = np.zeros((32, 48, 3), dtype=np.uint8)
    rows, cols = relevance.patch_grid if level == "patch" else relevance.pooled_grid
    shown = cells(drawn(replace(relevance, image=picture), 1, level), rows, cols).sum(-1)
    values = (relevance.text_to_patch if level == "patch" else relevance.text_to_query)[1].view(rows, cols).numpy()
    assert shown.shape == (rows, cols)
    # inferno and the opacity both rise with the value; the picture is black
    order = np.argsort(values, axis=None)
    assert (np.diff(shown.flatten()[order]) >= 0).all()
    assert shown.max() > 400  # orange and yellow: its own peak is the scale's end
    assert values.flat[np.argmax(shown)] >= 0.99 * values.max()


def test_the_scale_of_a_map_ends_at_its_own_peak_and_begins_at_nothing():
    relevance = relevance_of(["7", " red"])
    weak = replace(
        relevance, text_to_patch=torch.stack([relevance.text_to_patch[0] * 100, relevance.text_to_patch[1]])
    )
    assert np.array_equal(drawn(relevance, 1), drawn(weak, 1))
    flat = replace(relevance, text_to_patch=torch.tensor([[0.2] * 12 + [0.4] * 12]))
    values = cells(drawn(flat, 0), 4, 6).sum(-1)
    assert values[0, 0] > 60  # the lowest is half of the peak, not the scale's beginning
    nothing = replace(relevance, text_to_patch=torch.zeros(1, 24))
    assert drawn(nothing, 0).max() < 10


def test_the_picture_is_grey_and_upright_under_the_map():
    picture = np.zeros((32, 48, 3), dtype=np.uint8)
    picture[:8, :8] = (255, 0, 0)  # the patch at the top left
    picture[24:, 40:] = (0, 255, 255)
    nothing = replace(relevance_of(["7"]), image=picture, text_to_patch=torch.zeros(1, 24))
    shown = cells(drawn(nothing, 0), 4, 6)
    assert np.ptp(shown, axis=-1).max() <= 3  # grey
    # 85 and 170 of 255 * 1.8, under a tenth of black
    expected = np.zeros((4, 6))
    expected[0, 0], expected[3, 5] = 0.9 * 85 / 1.8, 0.9 * 170 / 1.8
    np.testing.assert_allclose(shown.mean(-1), expected, atol=4)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("patch", ["50% of the answer's maximum", "100% of the answer's maximum", "0% of the answer's maximum"]),
        ("query", ["100% of the answer's maximum", "25% of the answer's maximum", "75% of the answer's maximum"]),
    ],
)
def test_the_peak_is_a_share_of_the_highest_of_all_words(level, expected):
    relevance = replace(
        relevance_of(["a", " b", " c"]),
        text_to_patch=torch.tensor([[0.1, 0.3] + [0.0] * 22, [0.6] * 24, [0.0] * 24]),
        text_to_query=torch.tensor([[0.8] * 6, [0.2] * 6, [0.6, 0, 0, 0, 0, 0]]),
    )
    assert [describe_peak(relevance, index, level) for index in range(3)] == expected
    assert describe_peak(replace(relevance, text_to_patch=torch.zeros(3, 24)), 0) == "no relevance"
    figure = plot_relevance(relevance, level)
    assert [axes.texts[0].get_text() for axes in figure.axes[1:4]] == expected


def test_a_long_answer_wraps():
    figure = plot_relevance(relevance_of(["$x$", *(f" word{index}" for index in range(12)), " " + "long" * 9]), "both")
    titles = panels(figure)
    assert titles.count("word11") == 2
    assert "longlonglonglongl..." in titles
    assert len({axes.get_position().y0 for axes in figure.axes if axes.images}) >= 6
    figure.canvas.draw()  # "$x$" is no formula


def test_queries_without_a_place_are_drawn_without_the_picture():
    relevance = replace(relevance_of(["7", " red"]), has_grid=False)
    figure = plot_relevance(relevance, "query")
    assert panels(figure) == ["6 tokens, no grid", "7", "red"]
    assert [len(axes.images) for axes in figure.axes[:3]] == [1, 1, 1]
    assert [len(axes.images) for axes in plot_relevance(relevance).axes[:3]] == [1, 2, 2]


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="level must be one of patch, query, both, got 'token'"):
        plot_relevance(relevance_of(["7"]), "token")


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_relevance(relevance_of(["7"]))
