"""DeCo's training on the digits world: packed questions equal separate ones, and what the loss counts."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from safetensors.torch import load_file

from modeling_deco.training.collator import IGNORE_INDEX, DecoCollator, expand_images
from modeling_deco.worlds.digits import train
from modeling_deco.worlds.digits.evaluate import _summary
from modeling_deco.worlds.digits.optimizer import Muon, MuonAdamW
from modeling_deco.worlds.digits.processor import build_processor
from modeling_deco.worlds.digits.tower import build_tower


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def tower_dir(tmp_path_factory):
    torch.manual_seed(0)
    tower_dir = tmp_path_factory.mktemp("tower")
    build_tower().save_pretrained(tower_dir)
    return tower_dir


@pytest.fixture(scope="module")
def model(processor, tower_dir):
    torch.manual_seed(0)
    return train.build_model(tower_dir, processor).eval()


@pytest.fixture(scope="module")
def examples():
    return list(train.build_dataset(3, seed=5))


@pytest.mark.parametrize("side", [3, 6])
def test_packed_questions_have_the_logits_and_labels_of_separate_ones(side, model, processor, examples):
    batch = expand_images(DecoCollator(processor, independent_turns=True)(examples), side, processor)
    labels = batch.pop("labels")
    with torch.no_grad():
        packed_logits = model(**batch).logits
    num_picture_tokens = 2 + side * side  # <bos> <user> <image> ...
    for row, example in enumerate(examples):
        offset = num_picture_tokens
        for user, assistant in zip(example["messages"][::2], example["messages"][1::2], strict=True):
            content = [{"type": "image", "image": example["images"][0]}, {"type": "text", "text": user["content"]}]
            inputs = processor.apply_chat_template(
                [[{"role": "user", "content": content}, assistant]],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"pooled_grid_size": side},
            )
            with torch.no_grad():
                logits = model(**inputs).logits[0, num_picture_tokens:]
            packed = slice(offset, offset + len(logits))
            torch.testing.assert_close(packed_logits[row, packed], logits, atol=1e-5, rtol=1e-5)
            answer = processor.decode(labels[row, packed][labels[row, packed] != IGNORE_INDEX])
            assert answer.removesuffix("<eos>").strip() == assistant["content"]
            offset += len(logits)
        assert (labels[row, offset:] == IGNORE_INDEX).all()
        assert (labels[row, :num_picture_tokens] == IGNORE_INDEX).all()


def test_pictures_depend_on_their_index_alone():
    few, many = train.build_dataset(3, seed=5), train.build_dataset(30, seed=5)
    assert few[2]["messages"] == many[2]["messages"]
    assert np.array_equal(few[2]["images"][0], many[2]["images"][0])
    assert not np.array_equal(few[2]["images"][0], train.build_dataset(3, seed=6)[2]["images"][0])


def test_optimizer_covers_every_parameter_once_and_the_tower_at_its_own_rate(model):
    optimizer = train.build_optimizer(model, train.DigitsArguments(output_dir="unused"))
    covered = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(covered) == sorted(id(parameter) for parameter in model.parameters())
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert rates[id(named["model.language_model.layers.0.mlp.up_proj.weight"])] == 0.02
    assert rates[id(named["model.vision_tower.encoder.layers.0.mlp.fc1.weight"])] == pytest.approx(0.002)
    assert rates[id(named["model.multi_modal_projector.linear_1.weight"])] == 0.02
    assert rates[id(named["model.multi_modal_projector.linear_1.bias"])] == 2e-3
    assert rates[id(named["model.language_model.embed_tokens.weight"])] == 2e-3


@pytest.mark.parametrize(("projector_type", "grid"), [("avg_pool", 6), ("mlp", 12)])
def test_whitened_projector_sees_every_direction_of_the_features_alike(projector_type, grid, tower_dir):
    processor = build_processor(grid)
    torch.manual_seed(0)
    model = train.build_model(tower_dir, processor, projector_type).eval()
    pictures = [image for example in train.build_dataset(40, seed=5) for image in example["images"]]
    pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    seen = []
    model.model.multi_modal_projector.linear_1.register_forward_hook(lambda *call: seen.append(call[-1]))
    train.whiten_projector(model, pixel_values)
    with torch.no_grad():
        model.get_image_features(pixel_values)
    hidden_states = seen[0].flatten(0, 1)
    variances = torch.linalg.eigvalsh(torch.cov(hidden_states.T))
    assert hidden_states.mean(0).abs().max() < 1e-2
    assert variances.max() < 1.05
    assert (variances > 0.95).float().mean() > 0.5  # the others were numerical noise, and stay small


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_muon_is_torchs_but_for_the_rounding(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    convolution = torch.nn.Parameter(start.clone()[..., None, None])
    optimizers = [
        torch.optim.Muon([parameters[0]], lr=0.02, weight_decay=0.1),
        Muon([parameters[1], convolution], lr=0.02, weight_decay=0.1),
    ]
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        for parameter in (*parameters, convolution):
            parameter.grad = gradient.view_as(parameter).clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (parameters[0] - start).norm()
    assert (parameters[0] - parameters[1]).norm() < 0.02 * moved  # torch's is in bfloat16
    assert torch.equal(convolution[..., 0, 0], parameters[1])


def test_optimizer_resumes_exactly():
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        return layer, MuonAdamW([{"params": [layer.weight], "lr": 0.1}], [{"params": [layer.bias], "lr": 0.1}], 0.0)

    def step(layer, optimizer, value):
        layer(torch.full((2, 4), value)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = make()
    step(layer, optimizer, 1.0)
    weights, state = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))  # as from a file
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(state)
    resumed_optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.05  # as a scheduler does
    step(layer, optimizer, 2.0)
    step(resumed, resumed_optimizer, 2.0)
    assert torch.equal(layer.weight, resumed.weight)
    assert torch.equal(layer.bias, resumed.bias)


def test_standard_error_counts_pictures_not_questions():
    # Ten questions of a picture that are right or wrong together are one observation: sqrt(p (1 - p) / (n - 1)).
    summary = _summary([[True] * 10] * 60 + [[False] * 10] * 40)
    assert summary == {
        "accuracy": 60.0,
        "standard_error": pytest.approx(100 * (0.24 / 99) ** 0.5, abs=0.01),
        "questions": 1000,
    }


def test_a_run_on_the_plateau_stops_with_what_to_do(model, processor):
    args = train.DigitsArguments(output_dir="unused", plateau_step=7)
    state = type("State", (), {"global_step": 7})
    with pytest.raises(RuntimeError, match=r"at step 7 \d+\.\d % of its existence answers.*below 80\.0 %.*--seed"):
        train.PlateauCheck(args, processor, num_pictures=3).on_step_end(None, state, None, model=model)


def test_the_first_steps_have_one_grid_and_later_ones_every_grid():
    trainer = object.__new__(train.DigitsTrainer)
    trainer.first_elastic_step = 20
    trainer.args = train.DecoSFTConfig(
        output_dir="unused", use_cpu=True, bf16=False, pooled_grid_sizes=list(train.GRID_WEIGHTS)
    )
    sides = [trainer.grid_of_step(step) for step in range(60)]
    assert sides[:20] == [None] * 20
    assert set(sides[20:]) == set(train.GRID_WEIGHTS)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    arguments = {"num_steps": 4, "batch_size": 2, "plateau_step": 100, "save_steps": 2, "bf16": False}
    for name in ("straight", "stopped"):
        torch.manual_seed(0)
        build_tower().save_pretrained(tmp_path / name / "tower")
    whole = train.train(train.DigitsArguments(output_dir=str(tmp_path / "straight"), **arguments))

    real_step = train.MuonAdamW.step
    steps = []

    def failing_step(self, closure=None):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real_step(self, closure)

    monkeypatch.setattr(train.MuonAdamW, "step", failing_step)
    stopped = train.DigitsArguments(output_dir=str(tmp_path / "stopped"), **arguments)
    with pytest.raises(KeyboardInterrupt):
        train.train(stopped)
    monkeypatch.setattr(train.MuonAdamW, "step", real_step)
    resumed = train.train(stopped)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
