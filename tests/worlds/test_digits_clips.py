# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Clips of the digits world, checked by their pixels, and questions about them, answered again from the pixels."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("sklearn")

from modeling_deco.worlds.digits.clip_questions import (
    CLIP_KINDS,
    CLIP_WORDS,
    build_clip_tokenizer,
    clip_questions,
    score_clip,
)
from modeling_deco.worlds.digits.clips import DIRECTIONS, NUM_SECONDS, render_clip, write_video
from modeling_deco.worlds.digits.questions import Question
from modeling_deco.worlds.digits.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def clips():
    return [render_clip("validation", index) for index in range(40)]


def test_clips_are_a_function_of_split_seed_and_index(clips):
    again = render_clip("validation", 3)
    assert again.actors == clips[3].actors
    assert [frame.tobytes() for frame in again.frames] == [frame.tobytes() for frame in clips[3].frames]
    for other in (render_clip("validation", 3, seed=1), render_clip("test", 3), clips[4]):
        assert other.actors != again.actors


def test_a_clip_is_a_minute_of_pictures_of_a_fixed_camera(clips):
    for clip in clips:
        assert len(clip.frames) == NUM_SECONDS == 60
        assert {(frame.size, frame.mode) for frame in clip.frames} == {((96, 96), "RGB")}
        assert 3 <= len(clip.actors) <= 5
    for clip in clips[:5]:
        first, last = np.asarray(clip.frames[0]), np.asarray(clip.frames[-1])
        is_empty = (first.max(-1) <= 75) & (last.max(-1) <= 75)
        assert is_empty.mean() > 0.7
        assert (first[is_empty] == last[is_empty]).all()


def test_boxes_are_around_the_ink_of_every_second_and_do_not_touch(clips):
    for clip in clips[:10]:
        for second in range(0, NUM_SECONDS, 5):
            claimed = np.zeros((96, 96), dtype=int)
            ink = np.asarray(clip.frames[second]).max(-1) > 75
            for digit in clip.digits(second):
                x0, y0, x1, y1 = digit.box
                assert min(digit.box) >= 0
                assert max(digit.box) <= 96
                inside = ink[y0:y1, x0:x1]
                assert inside[[0, -1]].any(1).all()
                assert inside[:, [0, -1]].any(0).all()
                claimed[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] += 1
            assert claimed.max(initial=0) <= 1
            assert not ink[claimed == 0].any()


def test_digits_come_one_after_the_other_and_one_changes_its_colour(clips):
    for clip in clips:
        firsts = [actor.first for actor in clip.actors]
        assert all(later - earlier >= 3 for earlier, later in pairwise(firsts))
        assert len({actor.value for actor in clip.actors}) == len(clip.actors)
        assert [actor for actor in clip.actors if actor.colours[0] != actor.colours[1]] == [clip.changed]
        assert clip.changed.first < clip.changed.changes < clip.changed.last
        assert all(actor.last - actor.first >= 15 for actor in clip.actors)


def answer_from_what_is_seen(question, clip):
    """The answer from the digits of each second alone."""
    seen = [{digit.value: digit for digit in clip.digits(second)} for second in range(NUM_SECONDS)]
    first_second = {value: next(s for s in range(60) if value in seen[s]) for value in set().union(*seen)}
    order = sorted(first_second, key=first_second.get)
    named = next((int(word) for word in question.text.rstrip("?").split() if word.isdigit()), None)
    if question.kind == "existence":
        return f"{named} {'yes' if named in order else 'no'}."
    if question.kind == "first":
        return f"{order[0]}."
    if question.kind == "before":
        return f"{named} {order[order.index(named) - 1]}."
    if question.kind == "when":
        return f"{named} {first_second[named]}."
    if question.kind == "changed":
        colours = {value: {digits[value].colour for digits in seen if value in digits} for value in order}
        (changed,) = (value for value in order if len(colours[value]) > 1)
        return f"{changed}."
    return " ".join(str(value) for value in sorted(seen[-1], key=lambda value: seen[-1][value].center[0])) + "."


def path_of(value, clip):
    """How far a digit has moved while it was seen, `(dx, dy)`."""
    seen = [digit.center for second in range(60) for digit in clip.digits(second) if digit.value == value]
    return seen[-1][0] - seen[0][0], seen[-1][1] - seen[0][1]


def test_answers_agree_with_what_is_seen(clips):
    counts = Counter()
    for index, clip in enumerate(clips):
        for question in clip_questions(clip, np.random.default_rng(index)):
            counts[question.kind] += 1
            assert score_clip(question, question.answer, clip)
            if question.kind == "direction":
                value, direction = question.answer.rstrip(".").split()
                assert np.sign(path_of(int(value), clip)).tolist() == list(DIRECTIONS[direction])
            else:
                assert score_clip(question, answer_from_what_is_seen(question, clip), clip)
    assert counts == dict.fromkeys(CLIP_KINDS, len(clips))


@pytest.mark.parametrize(
    ("written", "right"),
    [("{0} {1}.", True), ("{0} {2}", True), ("{0} {3}.", False), ("{1}.", False), ("{0} soon.", False), ("", False)],
)
def test_a_time_may_be_three_seconds_off(written, right, clips):
    actor = next(actor for actor in clips[0].actors if actor.first >= 4)
    question = Question("when", f"When did the {actor.value} come?", f"{actor.value} {actor.first}.")
    answer = written.format(actor.value, actor.first, actor.first - 3, actor.first + 4)
    assert score_clip(question, answer, clips[0]) is right


def test_the_tokenizer_adds_words_behind_those_of_pictures(clips):
    tokenizer, of_pictures = build_clip_tokenizer(), build_tokenizer()
    assert len(tokenizer) == len(of_pictures) + 1 + len(CLIP_WORDS)
    vocabulary = tokenizer.get_vocab()
    assert {word: vocabulary[word] for word in of_pictures.get_vocab()} == of_pictures.get_vocab()
    for index, clip in enumerate(clips):
        for question in clip_questions(clip, np.random.default_rng(index)):
            for text in (question.text, question.answer):
                ids = tokenizer(text).input_ids
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text.lower()
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Was there a 7?"}]}
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True).input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["<bos>", "<user>", "<video>"]
    assert ids[2] == tokenizer.video_token_id


def test_a_clip_is_read_back_from_a_file_as_it_was_drawn(clips, tmp_path):
    pytest.importorskip("av")
    from modeling_deco.videos import read_video

    write_video(clips[0].frames, tmp_path / "clip.mp4")
    seconds, frames = zip(*read_video(tmp_path / "clip.mp4", fps=1, max_frames=60), strict=True)
    assert [round(second, 3) for second in seconds] == list(range(60))
    for frame, drawn in zip(frames, clips[0].frames, strict=True):
        difference = np.abs(np.asarray(frame).astype(int) - np.asarray(drawn).astype(int))
        assert difference.mean() < 6  # H.264 keeps colours at half the resolution
