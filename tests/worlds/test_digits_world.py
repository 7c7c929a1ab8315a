"""The digits world, checked by looking at the pixels and by asking again from the list of digits."""

import json
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn")

from modeling_deco.worlds.digits import world
from modeling_deco.worlds.digits.tokenizer import SPECIAL_TOKENS, WORDS, build_tokenizer

NUM_SCENES = 120


@pytest.fixture(scope="module")
def scenes():
    return [world.render("validation", index, min_digits=2) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def ask(scene, index, kinds=world.KINDS):
    return world.questions(scene, np.random.default_rng(index), kinds)


# --- splits and rendering --------------------------------------------------------------------------------------------


def test_splits_share_no_scan_and_cover_all():
    splits = [set(world.scan_indices(split).tolist()) for split in world.SPLITS]
    assert set.union(*splits) == set(range(1797))
    assert sum(map(len, splits)) == 1797
    assert [len(split) for split in splits] == [1259, 179, 359]


def test_every_split_has_every_class():
    from sklearn.datasets import load_digits

    for split in world.SPLITS:
        assert set(load_digits().target[world.scan_indices(split)]) == set(range(10))


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'holdout', must be one of train, validation, test"):
        world.render("holdout", 0)


def test_number_of_digits_is_checked():
    with pytest.raises(ValueError, match="min_digits 3 and max_digits 2"):
        world.render("test", 0, min_digits=3, max_digits=2)


@pytest.mark.parametrize("split", world.SPLITS)
def test_scenes_are_a_function_of_split_seed_and_index(split):
    first, again = world.render(split, 7, seed=3), world.render(split, 7, seed=3)
    assert first.digits == again.digits
    assert first.image.tobytes() == again.image.tobytes()
    for other in (world.render(split, 8, seed=3), world.render(split, 7, seed=4)):
        assert other.image.tobytes() != first.image.tobytes()


def test_pictures_are_what_the_tower_expects(scenes):
    assert {(scene.image.size, scene.image.mode) for scene in scenes} == {((96, 96), "RGB")}


def test_classes_are_unique_and_numbers_of_digits_are_even():
    counts = Counter()
    for index in range(200):
        values = [digit.value for digit in world.render("validation", index).digits]
        assert len(set(values)) == len(values)
        counts[len(values)] += 1
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 30


def ink_pixels(scene):
    """Ink by brightness alone: the background stays at 70 or below, ink does not."""
    return np.asarray(scene.image).max(-1) > 75


@pytest.mark.parametrize("split", ["train", "validation"])
def test_boxes_are_exactly_around_the_ink(split):
    for index in range(60):
        scene = world.render(split, index)
        ink, boxed = ink_pixels(scene), np.zeros((96, 96), dtype=bool)
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            inside = ink[y0:y1, x0:x1]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            boxed[y0:y1, x0:x1] = True
        assert not ink[~boxed].any()


def test_digits_keep_their_distances(scenes):
    for scene in scenes:
        claimed = np.zeros((96, 96), dtype=int)
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            claimed[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] += 1
        assert claimed.max() == 1
        centers = [(digit.box[0] + digit.box[2]) / 2 for digit in scene.digits]
        assert (np.diff(centers) >= 6).all()


def test_colour_names_match_the_pixels(scenes):
    palette = np.array(list(world.COLOURS.values()), dtype=float)
    for scene in scenes:
        pixels = np.asarray(scene.image, dtype=float)
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            box = pixels[y0:y1, x0:x1].reshape(-1, 3)
            brightest = box[box.max(-1) >= np.quantile(box.max(-1), 0.9)].mean(0)
            nearest = np.abs(palette - brightest).sum(-1).argmin()
            assert list(world.COLOURS)[nearest] == digit.colour


def test_distortions_are_for_training_only():
    digits = {split: [world.render(split, i).digits for i in range(150)] for split in ("train", "test")}
    heights = {
        split: [digit.box[3] - digit.box[1] for digits in found for digit in digits] for split, found in digits.items()
    }
    assert max(heights["test"]) <= 34  # a scan of 8 rows at 32 pixels, and what the spline swings over
    assert max(heights["train"]) > 36


# --- questions -------------------------------------------------------------------------------------------------------


def answer_independently(question, digits):
    """The truth about a question's text from `(value, colour, center)` alone."""
    words = question.text.lower().rstrip("?.").replace("?", "").split()
    by_value = {str(value): (colour, center) for value, colour, center in digits}
    if words[:2] == ["is", "there"]:
        return words[-1], words[-1] in by_value
    if words[0] == "how":
        return str(len(digits)), None
    if words[0] == "what":
        return words[-1], by_value[words[-1]][0]
    if words[0] == "read":
        return " ".join(value for value, _ in sorted(by_value.items(), key=lambda item: item[1][1][0])), None
    if words[0] == "where":
        return words[-1], by_value[words[-1]][1]
    one, other = by_value[words[2]][1], by_value[words[-1]][1]
    axis = 0 if "left" in words else 1
    assert abs(one[axis] - other[axis]) >= 8
    return words[2], one[axis] < other[axis]


def test_answers_agree_with_the_digits_and_begin_with_what_was_asked_for(scenes):
    seen = Counter()
    for index, scene in enumerate(scenes):
        digits = [(digit.value, digit.colour, digit.center) for digit in scene.digits]
        for question in ask(scene, index):
            subject, truth = answer_independently(question, digits)
            assert question.answer.startswith(subject)
            if isinstance(truth, bool):
                assert question.answer.endswith(" yes." if truth else " no.")
            elif isinstance(truth, str):
                assert question.answer == f"{subject} {truth}."
            elif isinstance(truth, tuple):
                x0, y0, x1, y1 = map(int, question.answer.rstrip(".").split()[-4:])
                assert (2 * (x0 + x1), 2 * (y0 + y1)) == pytest.approx(truth, abs=2)
            seen[question.kind] += 1
    assert set(seen) == set(world.KINDS)
    assert min(seen.values()) > 0.95 * len(scenes)


@pytest.mark.parametrize("kind", ["existence", "relation"])
def test_yes_and_no_are_balanced(kind):
    answers = [
        question.answer
        for index in range(400)
        for question in ask(world.render("validation", index, min_digits=2), index, [kind])
    ]
    share = sum(answer.endswith("yes.") for answer in answers) / len(answers)
    assert len(answers) > 380
    assert abs(share - 0.5) < 0.08


def test_kinds_may_be_asked_several_times_but_no_question_twice(scenes):
    kinds = ("existence", "existence", "locate", "locate", "count", "count")
    for index, scene in enumerate(scenes):
        asked = ask(scene, index, kinds)
        assert Counter(question.kind for question in asked) == {"existence": 2, "locate": 2, "count": 1}
        assert len({question.text for question in asked}) == len(asked)


def test_questions_are_a_function_of_their_seed(scenes):
    assert ask(scenes[0], 5) == ask(scenes[0], 5)
    assert ask(scenes[0], 5) != ask(scenes[0], 6)


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_reference_answers_score(scenes):
    for index, scene in enumerate(scenes):
        for question in ask(scene, index, world.KINDS + ("locate",) * 3):
            assert world.score(question, question.answer)
            assert world.score(question, " " + question.answer.upper().removesuffix("."))


@pytest.mark.parametrize(
    ("reference", "written", "right"),
    [
        ("7 red.", "7 red", True),
        ("7 red.", "4 red.", False),
        ("7 red.", "red.", False),
        ("7 yes.", "7 no.", False),
        ("4 7 1.", "4 1 7.", False),
        ("4 7 1.", "4 7.", False),
        ("3 digits.", "3 digits. 3 digits.", False),
        ("3 digits.", "", False),
    ],
)
def test_everything_that_was_written_counts(reference, written, right):
    assert world.score(world.Question("any", "", reference), written) is right


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("7 4 10 9 14.", True),
        ("7 4 10 9 15.", True),
        ("7 5 11 10 15.", False),  # 4 x 3 of 28 units shared
        ("7 9 14 4 10.", False),
        ("3 4 10 9 14.", False),
        ("7 4 10 9.", False),
        ("7 4 10 9 14 14.", False),
    ],
)
def test_boxes_are_judged_by_overlap(written, right):
    question = world.Question("locate", "Where is the 7?", "7 4 10 9 14.", box=(16, 40, 36, 56))
    assert world.score(question, written) is right


# --- LLaVA-format data -----------------------------------------------------------------------------------------------


def test_llava_data_is_written(tmp_path):
    from PIL import Image

    world.main(["--split", "test", "--num-pictures", "3", "--out", str(tmp_path), "--min-digits", "2"])
    records = json.loads((tmp_path / "test.json").read_text())
    assert len({record["id"] for record in records}) == len(records)
    assert len({record["image"] for record in records}) == 3
    for record in records:
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n")
        assert human["value"].count("<image>") == 1
        with Image.open(tmp_path / "images" / record["image"]) as image:
            assert image.size == (96, 96)
    first = Image.open(tmp_path / "images" / "test-0-000000.png").tobytes()
    assert first == world.render("test", 0, min_digits=2).image.tobytes()


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_every_question_and_answer_survives_the_tokenizer(scenes, tokenizer):
    for index, scene in enumerate(scenes):
        for question in ask(scene, index):
            for text in (question.text, question.answer):
                token_ids = tokenizer(text).input_ids
                assert tokenizer.unk_token_id not in token_ids
                assert tokenizer.decode(token_ids) == text.lower()


def test_numbers_are_single_tokens(tokenizer):
    assert [len(tokenizer(str(number)).input_ids) for number in range(25)] == [1] * 25
    assert tokenizer("25").input_ids == [tokenizer.unk_token_id]


def test_image_token_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (reloaded.image_token, reloaded.image_token_id) == ("<image>", tokenizer.image_token_id)
    assert len(reloaded) == len(SPECIAL_TOKENS) + len(WORDS)
    assert reloaded.decode(reloaded("7 yes.").input_ids) == "7 yes."


CONVERSATIONS = {
    "strings": [{"role": "user", "content": "<image>\nIs there a 7?"}, {"role": "assistant", "content": "7 yes."}],
    "parts": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a 7?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "7 yes."}]},
    ],
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_template_gives_the_same_tokens_for_strings_and_parts(form, tokenizer):
    token_ids = tokenizer.apply_chat_template(CONVERSATIONS[form], return_dict=True).input_ids
    tokens = tokenizer.convert_ids_to_tokens(token_ids)
    assert " ".join(tokens) == "<bos> <user> <image> is there a 7 ? <assistant> 7 yes . <eos>"


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_only_answers_and_their_eos_are_trained(form, tokenizer):
    conversation = CONVERSATIONS[form] + [
        {"role": "user", "content": "Read the digits."},
        {"role": "assistant", "content": "7 2."},
    ]
    encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    trained = [token for token, mask in zip(encoded.input_ids, encoded.assistant_masks, strict=True) if mask]
    assert tokenizer.convert_ids_to_tokens(trained) == ["7", "yes", ".", "<eos>", "7", "2", ".", "<eos>"]


def test_generation_prompt_is_the_start_of_the_trained_text(tokenizer):
    conversation = CONVERSATIONS["parts"]
    prompt = tokenizer.apply_chat_template(conversation[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert whole == prompt + "7 yes.<eos>"


def test_conversations_have_one_to_so_many_turns_in_any_order(tmp_path):
    path = world.write_llava_data(tmp_path, "train", 60, 5, 1, one_record_per_picture=True, max_turns=3)
    conversations = [record["conversations"] for record in json.loads(path.read_text())]
    assert len(conversations) == 60
    assert {len(turns) for turns in conversations} == {2, 4, 6}
    assert all(
        [turn["value"].startswith("<image>") for turn in turns] == [True] + [False] * (len(turns) - 1)
        for turns in conversations
    )
    starts = {turns[0]["value"].split()[1] for turns in conversations}
    assert starts >= {"Is", "What", "Where", "Read"}


@pytest.mark.parametrize("max_turns", ["0", "12"])
def test_turns_that_cannot_be_drawn_are_refused(max_turns, tmp_path, capsys):
    with pytest.raises(SystemExit):
        world.main(
            ["--split", "train", "--num-pictures", "1", "--out", str(tmp_path / "out"), "--max-turns", max_turns]
        )
    assert f"--max-turns must be 1 to 11, got {max_turns}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
