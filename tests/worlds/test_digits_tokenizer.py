# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and chat template of the digits world."""

import pytest
from transformers import AutoTokenizer

from modeling_deco.worlds.digits.tokenizer import SPECIAL_TOKENS, WORDS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_numbers_are_single_tokens(tokenizer):
    assert [len(tokenizer(str(number)).input_ids) for number in range(25)] == [1] * 25
    assert tokenizer("25").input_ids == [tokenizer.unk_token_id]


def test_image_token_survives_saving(tokenizer, tmp_path):
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
