# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The evaluations of the emoji world on scenes made by hand, by models that were not trained on it."""

import json

import pytest
import tiny
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("sklearn")

from transformers import AutoModelForCausalLM

from modeling_deco.worlds.emoji import evaluate, pointing_game, text_alone
from modeling_deco.worlds.emoji.questions import KINDS
from modeling_deco.worlds.emoji.scenes import Scene, Thing

ANIMALS = ("dog", "cat", "cow", "lion", "tiger", "horse")


def render(split, index, *, seed=0, min_things=1):
    """A thing in each of two or three corners."""
    corners = ((0.05, 0.05, 0.4, 0.4), (0.6, 0.05, 0.7, 0.15), (0.1, 0.6, 0.5, 0.9))
    things = [
        Thing(ANIMALS[(index + place) % 6], box, ("red", None, "blue")[place])
        for place, box in enumerate(corners[: 2 + index % 2])
    ]
    return Scene(tiny.picture(index), tuple(things))


@pytest.fixture(autouse=True)
def scenes_without_art(monkeypatch):
    for module in (evaluate, pointing_game):
        monkeypatch.setattr(module, "render", render)
    monkeypatch.setattr(evaluate, "concepts_of", lambda split: ANIMALS)
    thing = (0.2, 0.2, 0.8, 0.8)
    monkeypatch.setattr(
        evaluate,
        "single",
        lambda split, concept, index, seed: Scene(Image.new("RGB", (30, 40)), (Thing(concept, thing, None),)),
    )


def test_each_kind_has_its_number_of_questions():
    pictures = list(evaluate.ask("test", 7))
    counts = dict.fromkeys(KINDS, 0)
    for name, scene, asked in pictures:
        assert len({question.kind for question in asked}) == len(asked)
        assert (len(scene.things) == 1) is name.startswith("single-")
        for question in asked:
            counts[question.kind] += 1
    assert counts == dict.fromkeys(KINDS, 7)
    names = [asked[0].names[0] for name, _, asked in pictures if name.startswith("single-")]
    assert names == [*ANIMALS, ANIMALS[0]]
    assert len({name for name, _, _ in pictures}) == len(pictures)


def test_a_kind_that_no_picture_allows_ends(monkeypatch):
    monkeypatch.setattr(
        evaluate, "render", lambda split, index, seed: Scene(tiny.picture(0), render("", 0).things[:1])
    )
    assert list(evaluate.ask("test", 2, ["relation"])) == []


def test_answers_are_scored_by_kind_and_by_grid(monkeypatch):
    grids = [(3, 3), (2, 2)]
    right = {}

    def answer_about(model, processor, images, asked, grids, max_new_tokens):
        return {(3, 3): [right[text, place] for place, text in asked], (2, 2): ["I see a dog."] * len(asked)}

    def ask(*arguments):
        for name, scene, asked in evaluate_ask(*arguments):
            place = len(images)
            images.append(name)
            right.update({(question.text, place): question.answer for question in asked})
            yield name, scene, asked

    images: list = []
    evaluate_ask = evaluate.ask
    monkeypatch.setattr(evaluate, "ask", ask)
    monkeypatch.setattr(evaluate, "answer_about", answer_about)
    model = tiny.build_model()
    found = evaluate.answers_by_grid(model, None, "test", 12, grids, ["name", "list", "relation"])
    perfect = evaluate.accuracy_by_kind(found[3, 3])
    assert {row["accuracy"] for row in perfect.values()} == {100.0}
    assert perfect["list"]["recall"] == 100.0
    assert perfect["list"]["by_number_of_things"] == {2: 100.0, 3: 100.0}
    assert {"relation", "relation, unseen pairs"} <= perfect.keys()
    poor = evaluate.accuracy_by_kind(found[2, 2])
    assert poor["name"]["accuracy"] == pytest.approx(100 / 6, abs=0.01)
    assert poor["list"]["accuracy"] == 0
    assert 0 < poor["list"]["recall"] < 50


def run(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_a_table_or_json_lines(checkpoint, tmp_path):
    options = ["--model", checkpoint, "--num-questions", 2, "--pooled-grid-size", 3, "--pooled-grid-size", "1x2"]
    table = run(evaluate.main, *options).stdout.splitlines()
    assert table[0].split() == ["questions", *"3 x 3".split(), *"1 x 2".split()]
    assert {line.split("  ")[0] for line in table[1:]} >= set(KINDS)
    answers = tmp_path / "answers.jsonl"
    options += ["--kinds", "name,list", "--answers", answers, "--json"]
    reports = [json.loads(line) for line in run(evaluate.main, *options).stdout.splitlines()]
    assert [report["pooled_grid_size"] for report in reports] == [[3, 3], [1, 2]]
    assert set(reports[0]["accuracy"]) == {"name", "list"}
    assert reports[0]["accuracy"]["name"]["questions"] == 2
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 8
    assert {row["kind"] for row in rows} == {"name", "list"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--split", "none", "'none' is not one of"),
        ("--kinds", "name,x", "'x' is not"),
        ("--pooled-grid-size", "a", "'a'"),
    ],
)
def test_wrong_options_are_refused(checkpoint, option, value, message):
    result = run(evaluate.main, "--model", checkpoint, option, value)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_pointing_game_asks_for_colours_of_things(monkeypatch):
    monkeypatch.setattr(pointing_game, "play", lambda model, processor, targets, *_: list(targets))
    targets = pointing_game.pointing_game(None, None, 5)
    assert len(targets) == 5
    for target in targets:
        assert target.word in ("red", "blue")
        assert target.answer.endswith(f"{target.word}.")
        assert target.box == {"red": (0.05, 0.05, 0.4, 0.4), "blue": (0.1, 0.6, 0.5, 0.9)}[target.word]


def test_perplexity_is_that_of_one_pass():
    model = tiny.build_model().eval()
    ids = torch.randint(3, 19, (23,), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:])
    assert text_alone.perplexity(model, ids, window=22) == pytest.approx(loss.exp().item(), rel=1e-4)
    assert text_alone.perplexity(model, ids, window=5) != pytest.approx(loss.exp().item(), rel=1e-4)


def test_text_alone_compares_with_the_plain_model(checkpoint, tmp_path, monkeypatch):
    model = tiny.build_model()
    plain = AutoModelForCausalLM.from_config(model.config.text_config)
    plain.load_state_dict(
        {
            name.replace("model.language_model.", "model."): tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(("model.language_model.", "lm_head"))
        }
    )
    plain.generation_config = model.generation_config
    plain.save_pretrained(tmp_path / "plain")
    monkeypatch.setattr(text_alone, "smollm2_folder", lambda: tmp_path / "plain")
    text = tmp_path / "text.md"
    text.write_text("what is this ? " * 50 + "<image> the cat")
    report = json.loads(run(text_alone.main, "--model", checkpoint, "--text", text).stdout)
    assert report["num_tokens"] == 203
    assert report["perplexity"]["deco"] == report["perplexity"]["plain"] > 1
    assert len(report["answers"]) == 10
