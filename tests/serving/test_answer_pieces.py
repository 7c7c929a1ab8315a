# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pieces of text that an answer is sent in, and stop strings across pieces."""

import asyncio

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from modeling_deco.serving.answer import Answer


def byte_tokenizer():
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece_tokenizer():
    words = ["<unk>", "▁one", "▁two", "\n", "▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


async def pieces_of(tokenizer, ids: list[int], stop=()) -> tuple[list[str], Answer]:
    """The pieces of an answer whose model generates these tokens."""

    class Model:
        def generate(self, input_ids, generation_config, streamer, logits_processor, tokenizer):
            streamer.put(input_ids)
            for token in ids:
                streamer.put(torch.tensor([token]))
            streamer.end()
            return torch.tensor([[0, *ids]])

    written = Answer(tokenizer, list(stop))
    config = GenerationConfig(max_new_tokens=len(ids) + 1)
    written.generate(Model(), {"input_ids": torch.tensor([[0]])}, config, None)
    pieces = []
    while (piece := await written.pieces.get()) is not None:
        if isinstance(piece, Exception):
            raise piece
        pieces.append(piece)
    return pieces, written


@pytest.mark.parametrize(
    ("tokenizer", "ids", "expected"),
    [
        (byte_tokenizer(), "a naïve 🙂\n สวัสดี", list("a naïve 🙂\n สวัสดี")),
        (sentencepiece_tokenizer(), [1, 3, 2, 1, 5, 6, 7, 8, 4, 2], ["one", "\n", " two", " one", "🙂", " ", " two"]),
    ],
)
def test_a_piece_is_the_text_of_a_token_and_has_no_incomplete_character(tokenizer, ids, expected):
    if isinstance(ids, str):
        ids = tokenizer(ids)["input_ids"]
    pieces, written = asyncio.run(pieces_of(tokenizer, ids))
    assert pieces == expected
    assert (written.num_tokens, written.finish_reason) == (len(ids), "stop")


def test_incomplete_characters_are_sent_at_the_end():
    pieces, _ = asyncio.run(pieces_of(sentencepiece_tokenizer(), [1, 5, 6]))
    assert "".join(pieces) == sentencepiece_tokenizer().decode([1, 5, 6])


@pytest.mark.parametrize(
    ("text", "stop", "expected", "num_tokens"),
    [
        ("abcdef", ["bcd"], "a", 4),
        ("abcdef", ["abd", "cde"], "ab", 5),
        ("abcdef", ["bce", "bcf"], "abcdef", 6),
        ("abcdef", ["f"], "abcde", 6),
        ("abcdef", ["de", "cd"], "ab", 4),
        ("baaab", ["aab"], "ba", 5),  # its beginning is a later part of what is held back
    ],
)
def test_a_stop_string_may_span_pieces(text, stop, expected, num_tokens):
    tokenizer = byte_tokenizer()
    pieces, written = asyncio.run(pieces_of(tokenizer, tokenizer(text)["input_ids"], stop))
    assert ("".join(pieces), written.num_tokens, written.finish_reason) == (expected, num_tokens, "stop")
