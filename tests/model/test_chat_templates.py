# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Chat templates: each family's own format, images where they stand, and marks around what the assistant writes.

The expected texts are written by hand after the model cards of the families.
"""

import re
import time

import llava_families
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_deco import DecoProcessor
from modeling_deco.chat_templates import (
    CHAT_TEMPLATES,
    adapt_chat_template,
    complete_chat_template,
    read_chat_template,
    render,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SYSTEM = {"role": "system", "content": "Be short."}
TURNS = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Ho."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A cat."},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


def chatml(system: str) -> str:
    return (
        system + "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHo.<|im_end|>\n"
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    )


def chatml_system(words: str) -> str:
    return f"<|im_start|>system\n{words}<|im_end|>\n"


# name: (start of an answer, the four turns, the four turns after a system message)
FORMATS = {
    "vicuna": (
        "ASSISTANT:",
        VICUNA + "USER: Hi? ASSISTANT: Ho.</s>USER: What is it? ASSISTANT: A cat.</s>",
        "Be short. USER: Hi? ASSISTANT: Ho.</s>USER: What is it? ASSISTANT: A cat.</s>",
    ),
    "chatml": ("<|im_start|>assistant\n", chatml(""), chatml(chatml_system("Be short."))),
    "qwen2": (
        "<|im_start|>assistant\n",
        chatml(chatml_system("You are a helpful assistant.")),
        chatml(chatml_system("Be short.")),
    ),
    "qwen2.5": ("<|im_start|>assistant\n", chatml(chatml_system(QWEN)), chatml(chatml_system("Be short."))),
    "qwen3": ("<|im_start|>assistant\n", chatml(""), chatml(chatml_system("Be short."))),
    "llama3": (
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>",
    ),
    "mistral": (
        "",
        "<s>[INST] Hi?[/INST] Ho.</s>[INST] What is it?[/INST] A cat.</s>",
        "<s>[INST] Be short.\n\nHi?[/INST] Ho.</s>[INST] What is it?[/INST] A cat.</s>",
    ),
    "gemma": (
        "<start_of_turn>model\n",
        "<s><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\nHo.<end_of_turn>\n"
        "<start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n",
        "<s><start_of_turn>user\nBe short.\n\nHi?<end_of_turn>\n<start_of_turn>model\nHo.<end_of_turn>\n"
        "<start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n",
    ),
    "phi3": (
        "<|assistant|>\n",
        "<|user|>\nHi?<|end|>\n<|assistant|>\nHo.<|end|>\n"
        "<|user|>\nWhat is it?<|end|>\n<|assistant|>\nA cat.<|end|>\n",
        "<|system|>\nBe short.<|end|>\n<|user|>\nHi?<|end|>\n<|assistant|>\nHo.<|end|>\n"
        "<|user|>\nWhat is it?<|end|>\n<|assistant|>\nA cat.<|end|>\n",
    ),
    "phi4": (
        "<|im_start|>assistant<|im_sep|>",
        "<|im_start|>user<|im_sep|>Hi?<|im_end|><|im_start|>assistant<|im_sep|>Ho.<|im_end|>"
        "<|im_start|>user<|im_sep|>What is it?<|im_end|><|im_start|>assistant<|im_sep|>A cat.<|im_end|>",
        "<|im_start|>system<|im_sep|>Be short.<|im_end|>"
        "<|im_start|>user<|im_sep|>Hi?<|im_end|><|im_start|>assistant<|im_sep|>Ho.<|im_end|>"
        "<|im_start|>user<|im_sep|>What is it?<|im_end|><|im_start|>assistant<|im_sep|>A cat.<|im_end|>",
    ),
    "phi4-mini": (
        "<|assistant|>",
        "<|user|>Hi?<|end|><|assistant|>Ho.<|end|><|user|>What is it?<|end|><|assistant|>A cat.<|end|>",
        "<|system|>Be short.<|end|>"
        "<|user|>Hi?<|end|><|assistant|>Ho.<|end|><|user|>What is it?<|end|><|assistant|>A cat.<|end|>",
    ),
}
# What a model of the family has to write in TURNS, its end of turn included.
LEARNED = {
    "vicuna": [" Ho.</s>", " A cat.</s>"],
    "mistral": [" Ho.</s>", " A cat.</s>"],
    "llama3": ["Ho.<|eot_id|>", "A cat.<|eot_id|>"],
    "gemma": ["Ho.<end_of_turn>", "A cat.<end_of_turn>"],
    "phi3": ["Ho.<|end|>", "A cat.<|end|>"],
    "phi4-mini": ["Ho.<|end|>", "A cat.<|end|>"],
    **{name: ["Ho.<|im_end|>", "A cat.<|im_end|>"] for name in ("chatml", "qwen2", "qwen2.5", "qwen3", "phi4")},
}
MARKS = sorted(set(re.findall(r"<[^<>\s]+>|\[/?INST\]", repr(FORMATS))) - {"<s>", "</s>"})


def byte_tokenizer(marks=MARKS, chat_template=None) -> PreTrainedTokenizerFast:
    """Every byte is a token, and every mark of the formats."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template
    )
    tokenizer.add_tokens([*marks, "<image>"], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def processor():
    return DecoProcessor(tiny.build_image_processor(), byte_tokenizer(), pooled_grid_size=2)


def as_parts(messages):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def rendered(processor, name, messages, **options):
    return processor.apply_chat_template(messages, chat_template=CHAT_TEMPLATES[name], **options)


# --- named templates -------------------------------------------------------------------------------------------------


def test_every_template_is_tried_here():
    assert set(FORMATS) == set(LEARNED) == set(CHAT_TEMPLATES) - {"plain"}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("form", [list, as_parts], ids=["strings", "parts"])
def test_text_has_the_format_of_the_family(name, form, processor):
    start, turns, turns_after_system = FORMATS[name]
    assert rendered(processor, name, form(TURNS)) == turns
    assert rendered(processor, name, form([SYSTEM, *TURNS])) == turns_after_system
    question = turns[: turns.index("A cat.")].rstrip(" ")  # Vicuna's and Mistral's answers begin with their space
    assert rendered(processor, name, form(TURNS[:3]), add_generation_prompt=True) == question
    assert question.endswith(start)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"vicuna"}))
def test_images_and_videos_stand_where_their_parts_stand(name):
    picture, video, text = {"type": "image"}, {"type": "video"}, lambda words: {"type": "text", "text": words}
    content = [picture, video, picture, text("Hi"), video, picture, text("?")]
    expected = FORMATS[name][1].replace("Hi?", "<image>\n<video>\n<image>\nHi<video><image>?")
    found = render(CHAT_TEMPLATES[name], [{"role": "user", "content": content}, *TURNS[1:3]], **SPECIAL)
    assert found == expected[: expected.index("A cat.")].rstrip(" ")


def test_images_and_videos_come_first_in_vicunas_format_and_alone_in_stage_1():
    content = [{"type": "text", "text": "Hi?"}, {"type": "video"}, {"type": "image"}]
    messages = [{"role": "user", "content": content}]
    assert render(CHAT_TEMPLATES["vicuna"], messages, **SPECIAL).endswith("USER: <video>\n<image>\nHi? ASSISTANT:")
    assert render(CHAT_TEMPLATES["plain"], messages) == "<video><image>"


@pytest.mark.parametrize("name", FORMATS)
def test_exactly_the_answers_and_their_ends_are_learned(name, processor):
    question = {
        "role": "user",
        "content": [{"type": "image", "image": tiny.picture(0)}, {"type": "text", "text": "Hi?"}],
    }
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = rendered(processor, name, [SYSTEM, question, *TURNS[1:]], **options)
    (ids,), (mask,) = inputs["input_ids"], inputs["assistant_masks"]
    assert ids.count(processor.image_token_id) == 4
    assert "image_grid_thw" not in inputs  # which is for vLLM
    learned = [token if marked else None for token, marked in zip(ids, mask, strict=True)]
    runs, run = [], []
    for token in [*learned, None]:
        if token is None and run:
            runs.append(processor.tokenizer.decode(run))
        run = [] if token is None else [*run, token]
    assert runs == LEARNED[name]


@pytest.mark.parametrize("name", FORMATS)
def test_training_learns_the_answers_and_their_ends(name, processor):
    collator = pytest.importorskip("modeling_deco.training.collator")
    processor = DecoProcessor(tiny.build_image_processor(), byte_tokenizer(), 2, CHAT_TEMPLATES[name])
    batch = collator.DecoCollator(processor)([{"messages": TURNS, "images": [tiny.picture(0)]}])
    (labels,) = batch["labels"].tolist()
    assert processor.tokenizer.decode([token for token in labels if token != -100]) == "".join(LEARNED[name])
    assert batch["input_ids"].tolist()[0].count(processor.image_token_id) == 1


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"vicuna"}))
def test_what_cannot_be_shown_is_refused(name, processor):
    with pytest.raises(Exception, match="Only text, images and videos can be shown, got audio"):
        rendered(processor, name, [{"role": "user", "content": [{"type": "audio"}]}])


@pytest.mark.parametrize("name", ["vicuna", "mistral", "gemma"])
def test_a_role_without_a_place_is_refused(name, processor):
    with pytest.raises(Exception, match="Only user and assistant may speak after the system message, got tool"):
        rendered(processor, name, [*TURNS, {"role": "tool", "content": "4"}])


def test_llama_3_has_texts_without_the_white_space_around_them():
    rendered = render(CHAT_TEMPLATES["llama3"], [{"role": "user", "content": " a \n"}], bos_token="<s>")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert rendered == f"<s>{header.format('user')}a<|eot_id|>{header.format('assistant')}"


def test_an_unknown_name_is_no_template():
    with pytest.raises(
        ValueError, match=r"'chatlm' is neither the path of a Jinja file nor one of plain, vicuna, cha"
    ):
        read_chat_template("chatlm")


# --- templates of language models ------------------------------------------------------------------------------------

# As these families' tokenizers have them, shortened: strings alone.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | "
    "trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] "
    "+ '[/INST]' }}{% elif message['role'] == 'system' %}{{ raise_exception('no system') }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + eos_token "
    "}}{% else %}{{ '<|' + message['role'] + '|>\n'  + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]}


@pytest.mark.parametrize(
    ("template", "name"), [(LLAMA3, "llama3"), (GEMMA2, "gemma"), (PHI3, "phi3"), (MISTRAL, "mistral")]
)
def test_a_text_template_of_a_known_format_is_the_named_one(template, name):
    assert adapt_chat_template(template, {}, **SPECIAL) == CHAT_TEMPLATES[name]


def test_a_default_system_message_is_kept():
    adapted = adapt_chat_template(SMOLLM2, {}, **SPECIAL)
    system = chatml_system("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    assert render(adapted, [QUESTION, *TURNS[1:3]]) == system + (
        "<|im_start|>user\n<image>\nHi?<|im_end|>\n<|im_start|>assistant\nHo.<|im_end|>\n"
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(adapted, [SYSTEM, QUESTION]).startswith(chatml_system("Be short."))
    assert "{% generation %}" in adapted


def test_another_text_template_is_kept_and_shows_images():
    adapted = adapt_chat_template(ZEPHYR, {}, **SPECIAL)
    expected = "<|system|>\nBe short.</s><|user|>\n<image>\nHi?</s><|assistant|>\nHo.</s><|user|>\nWhat is it?</s>"
    assert render(adapted, [SYSTEM, QUESTION, *TURNS[1:3]], **SPECIAL) == expected + "<|assistant|>"


def test_a_template_that_shows_images_is_kept():
    assert adapt_chat_template(tiny.CHAT_TEMPLATE, {}, **SPECIAL) == tiny.CHAT_TEMPLATE


@pytest.mark.parametrize(
    "template",
    ["{% for", "{{ raise_exception('no') }}", "{% for message in messages %}{{ message.role }}{% endfor %}"],
)
def test_a_template_that_does_not_show_the_text_is_not_adapted(template):
    assert adapt_chat_template(template, {}, **SPECIAL) is None


@pytest.mark.parametrize(
    ("marks", "name"),
    [
        (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "llama3"),
        (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "chatml"),
        (["<|im_start|>", "<|im_end|>", "<|im_sep|>"], "phi4"),
        (["<start_of_turn>", "<end_of_turn>"], "gemma"),
        (["<|user|>", "<|assistant|>", "<|end|>"], "phi3"),
        (["[INST]", "[/INST]"], "mistral"),
        (["<|im_start|>", "<|user|>"], None),
    ],
)
def test_without_a_template_the_special_tokens_tell_the_format(marks, name):
    assert adapt_chat_template(None, dict.fromkeys(marks, 0)) == CHAT_TEMPLATES.get(name)


# --- templates of llava-hf -------------------------------------------------------------------------------------------

# name: (the prompt of two turns, the next question and the start of its answer; what has to be learned)
LLAVA_HF = {
    "mistral": (
        "[INST] <image>\nHi? [/INST] Ho.</s> [INST] What is it? [/INST]",
        [" Ho.</s>", " A cat.</s>"],
    ),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ["Ho.<|eot_id|>", "A cat.<|eot_id|>"],
    ),
    "yi": (
        "<|im_start|>user\n<image>\nHi?<|im_end|><|im_start|>assistant\nHo.<|im_end|>"
        "<|im_start|>user\nWhat is it?<|im_end|><|im_start|>assistant\n",
        ["Ho.<|im_end|>", "A cat.<|im_end|>"],
    ),
    "onevision": (
        "<|im_start|>user <image>\nHi?<|im_end|><|im_start|>assistant \nHo.<|im_end|>"
        "<|im_start|>user \nWhat is it?<|im_end|><|im_start|>assistant\n",
        ["Ho.<|im_end|>", "A cat.<|im_end|>"],
    ),
}


@pytest.mark.parametrize("name", LLAVA_HF)
def test_a_template_of_llava_hf_keeps_its_prompt_and_gets_marks_and_videos(name):
    prompt, learned = LLAVA_HF[name]
    source = llava_families.CHAT_TEMPLATES[name]
    template = complete_chat_template(source, **SPECIAL)
    messages = [QUESTION, *as_parts(TURNS[1:])]
    assert render(source, messages[:3], **SPECIAL) == render(template, messages[:3], **SPECIAL) == prompt
    options = {"chat_template": template, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    tokenizer = byte_tokenizer()
    inputs = tokenizer.apply_chat_template(messages, **options)
    marked = [token for token, mark in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "".join(learned)
    video = [{**QUESTION, "content": [{"type": "video"}, QUESTION["content"][1]]}, *messages[1:3]]
    assert render(template, video, **SPECIAL) == prompt.replace("<image>", "<video>")


@pytest.mark.parametrize("name", sorted(set(CHAT_TEMPLATES) - {"plain"}))
def test_a_template_that_lacks_nothing_is_complete(name):
    assert complete_chat_template(CHAT_TEMPLATES[name], **SPECIAL) == CHAT_TEMPLATES[name]


def test_a_template_whose_answers_are_not_found_stays_as_it_is():
    """It shows the last answer alone, so that a conversation does not begin as the one before it."""
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'video' %}<video>"
        "{% elif part['type'] == 'image' %}<image>{% elif message['role'] == 'user' or loop.last and messages[-1] == "
        "message %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    assert complete_chat_template(template) == template


# --- joining ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def backbones(tmp_path):
    """A function that writes a vision tower's files and a tokenizer with a chat template: the two folders."""

    def write(chat_template, marks=MARKS):
        vision, text = tmp_path / "vision", tmp_path / "text"
        tiny.build_image_processor().save_pretrained(vision)
        tiny.build_config().vision_config.save_pretrained(vision)
        byte_tokenizer(marks, chat_template).save_pretrained(text)
        return str(vision), str(text)

    return write


def test_a_joined_chatml_model_sees_the_first_picture(backbones):
    processor = DecoProcessor.from_vision_text_pretrained(*backbones(SMOLLM2), pooled_grid_size=2)
    content = [{"type": "image", "image": tiny.picture(0)}, {"type": "text", "text": "Hi?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    expected = tiny.build_processor()(images=tiny.picture(0), return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)


def test_a_processor_put_together_by_hand_shows_images_in_its_tokenizers_format():
    processor = DecoProcessor(tiny.build_image_processor(), byte_tokenizer(chat_template=LLAMA3), pooled_grid_size=2)
    expected = FORMATS["llama3"][1].replace("Hi?", "<image>\nHi?")
    assert processor.apply_chat_template([QUESTION, *TURNS[1:]]) == expected


def test_a_template_is_not_rendered_where_a_processor_is_loaded(tmp_path):
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = byte_tokenizer(chat_template=endless)
    start = time.perf_counter()
    DecoProcessor(tiny.build_image_processor(), tokenizer, pooled_grid_size=2).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path)
    assert endless in DecoProcessor.from_pretrained(tmp_path).chat_template
    assert time.perf_counter() - start < 20


def test_a_joined_model_whose_template_cannot_show_images_is_refused(backbones):
    folders = backbones("{% for message in messages %}{{ message.role }}{% endfor %}")
    with pytest.raises(
        ValueError, match=r"text cannot show images, and .*chat_template: plain, vicuna, chatml, llama3"
    ):
        DecoProcessor.from_vision_text_pretrained(*folders)
    chosen = DecoProcessor.from_vision_text_pretrained(*folders, chat_template="llama3")
    assert chosen.chat_template == CHAT_TEMPLATES["llama3"]


def test_a_joined_model_without_a_known_format_has_no_template(backbones):
    processor = DecoProcessor.from_vision_text_pretrained(*backbones(None, marks=[]))
    assert processor.chat_template is None


def test_the_default_among_several_templates_is_adapted(backbones):
    folders = backbones({"default": LLAMA3, "tool_use": "{{ tools }}"}, marks=[])
    processor = DecoProcessor.from_vision_text_pretrained(*folders)
    assert processor.chat_template == CHAT_TEMPLATES["llama3"]
