# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What goes with converted weights: the original's ids, prompts and pixels, by the original's own rules."""

import io
import json
import re
import struct
import sys

import numpy as np
import pytest
import sentencepiece
import tiny
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    GenerationConfig,
    SiglipImageProcessorPil,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_deco import DecoProcessor
from modeling_deco.chat_templates import CHAT_TEMPLATES
from modeling_deco.conversion.chat_template import (
    VICUNA_CHAT_TEMPLATE,
    choose_chat_template,
    load_chat_template,
    named_chat_template,
)
from modeling_deco.conversion.generation_config import load_generation_config
from modeling_deco.conversion.image_processor import load_image_processor
from modeling_deco.conversion.tokenizer import load_tokenizer
from modeling_deco.utils.errors import InputError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CORPUS = [
    SYSTEM,
    "USER: What is this? ASSISTANT: a red cat and two blue dogs.",
    "def colours():    return  the        red   one",
    "USER: USER: ASSISTANT: the user sees the colours of the cats and dogs",
    *(("." + " " * length) * (12 - length) for length in range(2, 10)),
] * 10
NUM_PIECES = 420
TEXTS = [
    "",
    "What is this?",
    " two dogs",
    "  two  dogs  ",
    "the cat\n\nthe\tdog\n",
    "\nWhat is this?",
    "        the        red",
    "café, naïve, Привет, 日本",
    "a cat 😀👍🏽\u200b\u00a0!",
    "▁the▁cat",
    "<0x0A> <image",
    "USER: <image>\nWhat is this? ASSISTANT:",
    "<image>",
    "<image> <image>\n<image><image>What",
    "a red cat</s>USER: What is this?",
    "a red cat</s> USER:  two",
    "</s>\nUSER:",
    "<s>USER: the <unk>cat<unk></s></s>USER",
    "USER: <image></s>USER",
]
WORDS = "What is this?"
PICTURE = {"type": "image", "image": tiny.picture(0)}
QUESTION = {"role": "user", "content": [PICTURE, {"type": "text", "text": WORDS}]}
CONVERSATION = [
    QUESTION,
    {"role": "assistant", "content": [{"type": "text", "text": "a red cat"}]},
    {"role": "user", "content": [{"type": "text", "text": "two dogs?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "the dogs"}]},
]


def train_sentencepiece(model_type="bpe", **kwargs) -> bytes:
    """A sentencepiece model as Llama's was trained, with a small vocabulary."""
    settings = {
        "byte_fallback": True,
        "vocab_size": NUM_PIECES,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        **kwargs,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type=model_type, pad_id=-1, **settings
    )
    return model.getvalue()


def with_lowest_score(model: bytes, piece: str) -> bytes:
    """The model with another score of a piece, in its protobuf message: the text (field 1), then a float (field 2)."""
    content = piece.encode()
    head = b"\x0a" + bytes([len(content)]) + content + b"\x15"
    position = model.index(head) + len(head)
    return model[:position] + struct.pack("<f", -1e9) + model[position + 4 :]


@pytest.fixture(scope="module")
def llama_model():
    """With runs of spaces that have low ids and the lowest score, as Llama's."""
    model = train_sentencepiece()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    runs = [piece for piece in map(pieces.id_to_piece, range(pieces.get_piece_size())) if set(piece) == {"▁"}]
    assert len(runs) >= 3
    for run in runs:
        model = with_lowest_score(model, run)
    return model


@pytest.fixture
def llama(llama_model, tmp_path):
    """A folder with a `tokenizer.model` alone."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(llama_model)
    return folder


def write_json(path, **content):
    path.write_text(json.dumps(content))


def original_ids(model: bytes, text: str, legacy: bool, image_token_id: int) -> list[int]:
    """The ids of LLaVA's `tokenizer_image_token` with Llama's slow tokenizer, by sentencepiece itself.

    The prompt is cut at its images, a piece is cut at Llama's special tokens, and the rest is sentencepiece's, which
    begins with a space; after a special token it does not, unless the tokenizer is legacy.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [1]
    for number, chunk in enumerate(text.split("<image>")):
        ids += [image_token_id] * (number > 0)
        for position, part in enumerate(re.split("(<unk>|<s>|</s>)", chunk)):
            if position % 2:
                ids.append(["<unk>", "<s>", "</s>"].index(part))
            elif legacy or position == 0 or chunk.startswith(part):
                ids += pieces.encode(part)
            else:
                ids += pieces.encode("\n" + part)[2:]  # without its first space and the newline
    return ids


# --- tokenizer: ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_model_gives_the_ids_that_the_original_gives(legacy, llama, llama_model, tmp_path):
    write_json(llama / "tokenizer_config.json", legacy=legacy)
    tokenizer = load_tokenizer(llama)
    assert tokenizer.is_fast
    runs = ["red" + " " * number + "the" + " " * number for number in range(1, 20)]
    for text in [*TEXTS, *runs]:
        ids = tokenizer(text)["input_ids"]
        assert ids == original_ids(llama_model, text, legacy, image_token_id=NUM_PIECES), text
    for text in ("What is this?", "two  dogs\n", "café 😀"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.tokenize("red  the")[-2:] == ["▁", "▁the"]  # a space goes to its word, not to a run of spaces
    assert tokenizer.tokenize("<image>\nWhat")[:3] == ["<image>", "▁", "<0x0A>"]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_an_unset_legacy_is_legacy(llama):
    tokens = load_tokenizer(llama).tokenize("cat</s>USER")
    assert tokens[-1] == "▁USER"


def test_texts_are_padded_on_the_left(llama):
    tokenizer = load_tokenizer(llama)
    ids = tokenizer(["a cat", "a cat and two dogs"], padding=True)["input_ids"]
    assert ids[0][0] == tokenizer.pad_token_id
    assert ids[1][0] == tokenizer.bos_token_id


def test_the_config_says_which_tokens_begin_and_end_a_text_and_its_longest_length(llama):
    for add_bos, add_eos in ((True, False), (False, False), (True, True)):
        settings = {"add_bos_token": add_bos, "add_eos_token": add_eos, "model_max_length": 2048}
        write_json(llama / "tokenizer_config.json", **settings)
        tokenizer = load_tokenizer(llama)
        ids = tokenizer("cat")["input_ids"]
        assert (ids[0] == 1, ids[-1] == 2) == (add_bos, add_eos)
        assert tokenizer.model_max_length == 2048


def test_a_tokenizer_json_is_taken_as_it_is(llama, tmp_path):
    folder = tmp_path / "fast"
    load_tokenizer(llama).save_pretrained(folder)
    # This class builds its own normalizer where it is asked to load the file, and drops the file's.
    write_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=False, bos_token="<s>")
    (folder / "tokenizer.model").write_bytes(b"unread")
    file_ids = [encoding.ids for encoding in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(TEXTS)]
    assert load_tokenizer(folder)(TEXTS)["input_ids"] == file_ids


# --- tokenizer: added tokens -----------------------------------------------------------------------------------------


def test_missing_tokens_are_added_in_order(llama):
    tokenizer = load_tokenizer(llama, extra_tokens=["<im_patch>", "<im_start>", "<im_end>"])
    added = ["<im_patch>", "<im_start>", "<im_end>", "<image>", "<pad>"]
    assert tokenizer.convert_tokens_to_ids(added) == list(range(NUM_PIECES, NUM_PIECES + 5))


def test_tokens_that_are_there_are_not_added_again(llama, tmp_path):
    first = load_tokenizer(llama, extra_tokens=["<im_patch>"])
    first.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved", extra_tokens=["<im_patch>"]).get_vocab() == first.get_vocab()


def test_the_image_token_is_special_and_never_normalized(llama):
    tokenizer = load_tokenizer(llama)
    token = tokenizer.added_tokens_decoder[NUM_PIECES]
    assert (token.content, token.special, token.normalized) == ("<image>", True, False)


def test_a_token_of_another_use_is_not_the_padding_token(llama):
    for pad in (None, "<unk>", "</s>", "<s>", {"content": "<unk>", "lstrip": False}):
        write_json(llama / "tokenizer_config.json", pad_token=pad)
        tokenizer = load_tokenizer(llama)
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", NUM_PIECES + 1), pad


def test_a_padding_token_of_its_own_is_kept(llama):
    write_json(llama / "added_tokens.json", **{"[PAD]": NUM_PIECES})
    write_json(llama / "special_tokens_map.json", pad_token="[PAD]")
    tokenizer = load_tokenizer(llama)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("[PAD]", NUM_PIECES, NUM_PIECES + 2)


def test_tokens_that_were_added_before_keep_their_ids(llama):
    write_json(llama / "added_tokens.json", **{"<im_end>": NUM_PIECES + 1, "<im_start>": NUM_PIECES})
    tokenizer = load_tokenizer(llama, extra_tokens=["<im_start>", "<im_end>"])
    added = ["<im_start>", "<im_end>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(added) == [NUM_PIECES, NUM_PIECES + 1, NUM_PIECES + 2]


@pytest.mark.parametrize(("legacy", "expected"), [(True, "▁USER"), (False, "ER")])
def test_the_text_after_an_extra_token_is_as_after_llamas_own(legacy, expected, llama):
    write_json(llama / "tokenizer_config.json", legacy=legacy)
    assert load_tokenizer(llama, extra_tokens=["<im_end>"]).tokenize("<im_end>USER")[-1] == expected


def test_an_image_token_that_was_added_before_is_an_image_token(llama):
    write_json(llama / "added_tokens.json", **{"<image>": NUM_PIECES})
    write_json(llama / "tokenizer_config.json", legacy=False)
    assert load_tokenizer(llama).tokenize("<image>USER") == ["<image>", "▁USER"]


def test_a_gap_in_the_added_tokens_is_refused(llama):
    write_json(llama / "added_tokens.json", **{"<im_end>": NUM_PIECES + 5})
    with pytest.raises(InputError, match=f"'<im_end>' should have id {NUM_PIECES + 5}, .* gets {NUM_PIECES}"):
        load_tokenizer(llama)


def test_added_tokens_that_are_words_are_decoded(llama):
    decoder = {str(NUM_PIECES): {"content": "<box>", "special": False}}
    write_json(llama / "tokenizer_config.json", added_tokens_decoder=decoder)
    tokenizer = load_tokenizer(llama)
    assert "<box>" in tokenizer.decode(tokenizer("a <box>")["input_ids"], skip_special_tokens=True)


# --- tokenizer: what cannot be read ----------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))} has no tokenizer.json and no tokenizer.m"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_no_sentencepiece_model_is_named(llama, llama_model):
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for content in (b"", lfs, b"\x00" * 99, llama_model[: len(llama_model) // 2]):
        (llama / "tokenizer.model").write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer.model is not a sentencepiece model .*; download it"):
            load_tokenizer(llama)


def test_a_sentencepiece_model_that_a_fast_tokenizer_would_read_otherwise_is_refused(llama):
    kinds = [
        {"model_type": "unigram"},
        {"user_defined_symbols": ["[INST]"]},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
    ]
    for kind in kinds:
        (llama / "tokenizer.model").write_bytes(train_sentencepiece(**kind))
        with pytest.raises(InputError, match="is not of Llama's kind .*put a tokenizer.json beside it"):
            load_tokenizer(llama)


def test_without_sentencepiece_the_user_hears_what_to_install(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match="reading it takes sentencepiece: pip install sentencepiece$"):
        load_tokenizer(llama)


def test_a_tokenizer_json_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: the tokenizer cannot be read: ")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "is not valid JSON"), ("[]", "holds a JSON list")])
def test_a_malformed_config_is_named(content, message, llama):
    (llama / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=f"tokenizer_config.json {message}"):
        load_tokenizer(llama)


def test_a_tokenizer_runs_no_code_of_its_folder(llama, tmp_path):
    folder = tmp_path / "fast"
    load_tokenizer(llama).save_pretrained(folder)
    (folder / "evil.py").write_text("raise SystemExit('the code ran')")
    write_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    assert len(load_tokenizer(folder)) == NUM_PIECES + 2


# --- Vicuna's chat template ------------------------------------------------------------------------------------------


@pytest.fixture
def processor(llama):
    return DecoProcessor(
        tiny.build_image_processor(),
        load_tokenizer(llama),
        pooled_grid_size=2,
        chat_template=choose_chat_template(None)[0],
    )


def original_prompt(*turns, system=SYSTEM):
    """LLaVA's `get_prompt` for two separators; None is the turn to generate."""
    prompt = system + " "
    for position, words in enumerate(turns):
        role, separator = [("USER", " "), ("ASSISTANT", "</s>")][position % 2]
        prompt += f"{role}:" if words is None else f"{role}: {words}{separator}"
    return prompt


def test_a_question_renders_as_the_original_does(processor):
    expected = original_prompt("<image>\nWhat is this?", None)
    assert processor.apply_chat_template([QUESTION], add_generation_prompt=True) == expected


def test_a_conversation_renders_as_the_original_does(processor):
    expected = original_prompt("<image>\nWhat is this?", "a red cat", "two dogs?", "the dogs")
    assert processor.apply_chat_template(CONVERSATION) == expected


def test_a_system_message_takes_the_place_of_the_default(processor):
    system = {"role": "system", "content": [{"type": "text", "text": "Be short."}]}
    expected = original_prompt("<image>\nWhat is this?", None, system="Be short.")
    assert processor.apply_chat_template([system, QUESTION], add_generation_prompt=True) == expected


def test_images_come_first(processor):
    message = {"role": "user", "content": [{"type": "text", "text": WORDS}, PICTURE, PICTURE]}
    assert processor.apply_chat_template([message]) == original_prompt("<image>\n<image>\nWhat is this?")


def test_content_may_be_a_string(llama):
    conversation = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a cat"}]
    rendered = load_tokenizer(llama).apply_chat_template(
        conversation, chat_template=VICUNA_CHAT_TEMPLATE, tokenize=False
    )
    assert rendered == original_prompt("<image>\nWhat?", "a cat")


def test_an_image_may_stand_between_its_marks(processor):
    template, _ = choose_chat_template(None, use_im_start_end=True)
    rendered = processor.apply_chat_template([QUESTION], chat_template=template)
    assert rendered == original_prompt("<im_start><image><im_end>\nWhat is this?")


def test_a_role_without_a_place_is_an_error(processor):
    with pytest.raises(Exception, match="Only user and assistant may speak after the system message, got tool"):
        processor.apply_chat_template([QUESTION, {"role": "tool", "content": "a cat"}])


@pytest.mark.parametrize("legacy", [True, False])
def test_the_answers_and_their_ends_are_what_the_assistant_writes(legacy, llama):
    write_json(llama / "tokenizer_config.json", legacy=legacy)
    tokenizer = load_tokenizer(llama)
    inputs = tokenizer.apply_chat_template(
        CONVERSATION,
        chat_template=VICUNA_CHAT_TEMPLATE,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    written = [token for token, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(written) == "a red cat</s> the dogs</s>"


def test_a_tokenized_conversation_has_the_original_ids(processor, llama_model):
    inputs = processor.apply_chat_template(
        [QUESTION], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = original_prompt("<image>\nWhat is this?", None)
    expected = original_ids(llama_model, prompt.replace("<image>", "<image>" * 4), True, processor.image_token_id)
    assert inputs["input_ids"].tolist() == [expected]
    text = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    assert processor(images=PICTURE["image"], text=text)["input_ids"][0] == expected
    assert inputs["pixel_values"].shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


# --- the choice of a chat template -----------------------------------------------------------------------------------

CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<|im_end|>
{% endfor -%}"""


def test_another_format_that_shows_images_is_kept():
    assert choose_chat_template(CHATML) == (CHATML, "source")


def test_the_default_among_named_templates_counts():
    assert choose_chat_template({"tool_use": "", "default": CHATML}) == (CHATML, "source")


def test_vicunas_is_chosen_in_place_of_what_shows_no_images():
    templates = {
        "none": None,
        "empty": "",
        "no default": {"tool_use": CHATML},
        "another image token": CHATML.replace("<image>", "<img>"),
        "not Jinja": "<image>{% for",
        "raises": "<image>{{ raise_exception('no images here') }}",
        "adds lists to strings": "<image>{{ messages[0]['content'] + 'text' }}",
        "leaves the sandbox": "<image>{{ ''.__class__.__mro__[1].__subclasses__() }}",
    }
    for name, template in templates.items():
        assert choose_chat_template(template) == (VICUNA_CHAT_TEMPLATE, "vicuna"), name


MODELS_OWN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_for_text_is_adapted():
    assert choose_chat_template(MODELS_OWN) == (CHAT_TEMPLATES["chatml"], "adapted")


@pytest.mark.parametrize(
    ("marks", "name"),
    [(["<|start_header_id|>", "<|eot_id|>"], "llama3"), (["<|im_start|>", "<|im_end|>"], "chatml"), ([], "vicuna")],
)
def test_without_a_template_the_tokens_tell_the_format(marks, name, llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.add_tokens(marks, special_tokens=True)
    template, origin = choose_chat_template(None, tokenizer)
    assert (template, origin) == (CHAT_TEMPLATES[name], "adapted" if marks else "vicuna")


def test_an_unknown_format_of_another_language_model_is_refused():
    for template, reason in ((None, "no chat template"), ("{% for", "a chat template that cannot show images")):
        message = (
            rf"of a 'mistral' language model is not recognized: its tokenizer has {reason}\. .* --chat-template: "
        )
        with pytest.raises(InputError, match=message):
            choose_chat_template(template, model_type="mistral")


def test_images_of_an_adapted_format_stand_between_their_marks():
    template, _ = choose_chat_template(MODELS_OWN, use_im_start_end=True)
    (rendered,), _ = render_jinja_template([[QUESTION]], chat_template=template)
    assert rendered == "<|im_start|>user\n<im_start><image><im_end>\nWhat is this?<|im_end|>\n"


def test_a_named_template_is_taken(tmp_path):
    assert named_chat_template("llama3") == CHAT_TEMPLATES["llama3"]
    (tmp_path / "own.jinja").write_text(CHATML)
    assert named_chat_template(str(tmp_path / "own.jinja")) == CHATML
    (tmp_path / "text.jinja").write_text(MODELS_OWN)
    with pytest.raises(InputError, match=r"text\.jinja does not write <image> for an image"):
        named_chat_template(str(tmp_path / "text.jinja"))
    with pytest.raises(InputError, match="'llama4' is neither the path of a Jinja file nor one of plain, vicuna"):
        named_chat_template("llama4")


def test_a_source_in_vicunas_format_keeps_its_questions_and_gets_our_answers():
    source = "{% for m in messages %}{{ m['role'] | upper }}: <image>{{ m['content'] }} {% endfor %}ASSISTANT:"
    template, origin = choose_chat_template(source)
    assert origin == "vicuna"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (rendered,), _ = render_jinja_template([messages], chat_template=template, eos_token="</s>")
    assert rendered == "USER: Hi ASSISTANT: Ho</s>"


def test_a_template_file_goes_before_a_processors_and_that_before_a_tokenizers(tmp_path, llama):
    write_json(llama / "tokenizer_config.json", chat_template="the tokenizer's")
    tokenizer = load_tokenizer(llama)
    assert load_chat_template(tmp_path, tokenizer) == "the tokenizer's"
    write_json(tmp_path / "chat_template.json", chat_template="the processor's")
    assert load_chat_template(tmp_path, tokenizer) == "the processor's"
    (tmp_path / "chat_template.jinja").write_text("the file's")
    assert load_chat_template(tmp_path, tokenizer) == "the file's"


# --- image processor -------------------------------------------------------------------------------------------------

SIZES = [(40, 30), (30, 40), (41, 30), (30, 41), (24, 24), (90, 35)]
CLIP = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
SIGLIP = SiglipImageProcessorPil(size={"height": 24, "width": 24}, resample=2)
DINOV2 = BitImageProcessorPil(
    size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24}, image_mean=[0.485, 0.456, 0.406]
)


def expand_to_square(image, color):
    """LLaVA's `expand2square`."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("source", [CLIP, SIGLIP, DINOV2], ids=["clip", "siglip", "dinov2"])
def test_padding_gives_the_pixels_that_the_original_gives(source, tmp_path):
    source.save_pretrained(tmp_path)
    for image_aspect_ratio in (None, "square"):
        assert load_image_processor(tmp_path, image_aspect_ratio).to_dict() == source.to_dict()
    processor = load_image_processor(tmp_path, "pad")
    for size in SIZES:
        image = tiny.picture(3, 100, 100).resize(size)
        square = expand_to_square(image, tuple(int(value * 255) for value in source.image_mean))
        expected = source(square, return_tensors="np")["pixel_values"]
        pixels = processor(image, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(pixels, expected, atol=1e-5, err_msg=str(size))


@pytest.mark.parametrize("image_aspect_ratio", [None, "pad"])
def test_an_image_processor_without_torchvision_is_saved_under_the_name_that_all_can_load(
    image_aspect_ratio, tmp_path
):
    CLIP.save_pretrained(tmp_path)
    load_image_processor(tmp_path, image_aspect_ratio).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == ("LlavaImageProcessor" if image_aspect_ratio else "CLIPImageProcessor")


@pytest.mark.parametrize("key", ["feature_extractor_type", "image_processor_type"])
def test_old_names_and_sizes_are_known(key, tmp_path):
    write_json(tmp_path / "preprocessor_config.json", **{key: "CLIPFeatureExtractor"}, size=24, crop_size=24)
    assert load_image_processor(tmp_path).to_dict() == CLIP.to_dict()


def test_an_image_processor_is_found_in_a_processors_config(tmp_path):
    write_json(tmp_path / "preprocessor_config.json", image_processor_type="another")
    write_json(tmp_path / "processor_config.json", image_processor=json.loads(CLIP.to_json_string()))
    assert load_image_processor(tmp_path).to_dict() == CLIP.to_dict()


def test_llavas_own_padding_is_kept(tmp_path):
    CLIP.save_pretrained(tmp_path)
    load_image_processor(tmp_path, "pad").save_pretrained(tmp_path / "llava")
    assert load_image_processor(tmp_path / "llava").do_pad


def test_another_aspect_ratio_is_refused(tmp_path):
    with pytest.raises(InputError, match="image_aspect_ratio must be 'pad' or 'square', got 'anyres'"):
        load_image_processor(tmp_path, "anyres")


def test_a_folder_without_an_image_processor_is_named(tmp_path):
    with pytest.raises(InputError, match=re.escape(f"{tmp_path} names no image processor")):
        load_image_processor(tmp_path)


def test_an_unknown_image_processor_is_named(tmp_path):
    write_json(tmp_path / "preprocessor_config.json", image_processor_type="AnImageProcessor")
    with pytest.raises(InputError, match="the image processor 'AnImageProcessor' cannot be built"):
        load_image_processor(tmp_path)


def test_an_image_processor_runs_no_code_of_its_folder(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('the code ran')")
    write_json(
        tmp_path / "preprocessor_config.json",
        image_processor_type="EvilProcessor",
        auto_map={"AutoImageProcessor": "evil.EvilProcessor"},
    )
    with pytest.raises(InputError, match="the image processor 'EvilProcessor' cannot be built"):
        load_image_processor(tmp_path)


def test_an_image_processor_leaves_the_code_of_its_folder_behind(tmp_path):
    settings = {**json.loads(CLIP.to_json_string()), "auto_map": {"AutoImageProcessor": "evil.EvilProcessor"}}
    write_json(tmp_path / "preprocessor_config.json", **settings)
    assert "auto_map" not in load_image_processor(tmp_path).to_dict()


# --- generation ------------------------------------------------------------------------------------------------------


def saved_generation_config(folder, tokenizer):
    load_generation_config(folder, tokenizer).save_pretrained(folder / "saved")
    return GenerationConfig.from_pretrained(folder / "saved")


def test_vicunas_generation_is_greedy_and_can_be_saved(tmp_path, llama):
    write_json(tmp_path / "generation_config.json", max_length=4096, pad_token_id=0, temperature=0.9, top_p=0.6)
    saved = saved_generation_config(tmp_path, load_tokenizer(llama)).to_diff_dict()
    assert {name for name in saved if name != "transformers_version"} == {
        "bos_token_id",
        "eos_token_id",
        "max_length",
        "pad_token_id",
    }


def test_settings_of_sampling_stay_where_it_samples(tmp_path, llama):
    write_json(tmp_path / "generation_config.json", do_sample=True, temperature=0.2, top_p=0.6)
    saved = saved_generation_config(tmp_path, load_tokenizer(llama))
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.2, 0.6)


def test_settings_of_beams_stay_where_there_are_beams(tmp_path, llama):
    write_json(tmp_path / "generation_config.json", num_beams=3, length_penalty=0.5)
    saved = saved_generation_config(tmp_path, load_tokenizer(llama))
    assert (saved.num_beams, saved.length_penalty) == (3, 0.5)


def test_settings_of_beams_are_left_out_where_there_are_none(tmp_path, llama):
    write_json(tmp_path / "generation_config.json", length_penalty=0.5, early_stopping=True)
    assert "length_penalty" not in saved_generation_config(tmp_path, load_tokenizer(llama)).to_diff_dict()


def test_generation_without_a_file_has_the_tokenizers_ids(tmp_path, llama):
    saved = saved_generation_config(tmp_path, load_tokenizer(llama))
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (1, 2, NUM_PIECES + 1)


def test_generation_without_a_tokenizer_has_the_files_ids(tmp_path):
    write_json(tmp_path / "generation_config.json", eos_token_id=2, pad_token_id=0)
    saved = saved_generation_config(tmp_path, tokenizer=None)
    assert (saved.eos_token_id, saved.pad_token_id) == (2, 0)


def test_several_ends_of_generation_are_kept(tmp_path, llama):
    write_json(tmp_path / "generation_config.json", eos_token_id=[2, 7])
    assert saved_generation_config(tmp_path, load_tokenizer(llama)).eos_token_id == [2, 7]


@pytest.mark.parametrize("settings", [{"num_return_sequences": 3}, {"output_scores": True}], ids=str)
def test_settings_that_contradict_each_other_are_named(settings, tmp_path, llama):
    write_json(tmp_path / "generation_config.json", **settings)
    with pytest.raises(InputError, match=rf"generation_config.json is not valid .*{next(iter(settings))}"):
        load_generation_config(tmp_path, load_tokenizer(llama))


# --- all of it in a folder -------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(llama, tmp_path):
    """A processor with padding, and the same as it is loaded from a model's folder."""
    CLIP.save_pretrained(tmp_path)
    processor = DecoProcessor(
        load_image_processor(tmp_path, "pad"),
        load_tokenizer(llama),
        pooled_grid_size=2,
        chat_template=choose_chat_template(None)[0],
    )
    folder = tmp_path / "deco"
    tiny.build_config().save_pretrained(folder)  # the class of a tokenizer is chosen with it
    processor.save_pretrained(folder)
    return processor, AutoProcessor.from_pretrained(folder)


def test_a_loaded_processor_is_the_saved_one(loaded, tmp_path):
    given, found = [
        processor.apply_chat_template(
            CONVERSATION, tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "pt"}
        )
        for processor in loaded
    ]
    assert {name: tensor.tolist() for name, tensor in given.items()} == {
        name: tensor.tolist() for name, tensor in found.items()
    }
    given, found = loaded
    assert found.chat_template == VICUNA_CHAT_TEMPLATE
    assert found.image_processor.do_pad
    assert found.tokenizer.special_tokens_map == given.tokenizer.special_tokens_map
    assert found.tokenizer.get_added_vocab() == given.tokenizer.get_added_vocab()
    alone = AutoTokenizer.from_pretrained(tmp_path / "deco")
    assert alone(TEXTS)["input_ids"] == given.tokenizer(TEXTS)["input_ids"]
    alone = AutoImageProcessor.from_pretrained(tmp_path / "deco")
    assert alone.to_dict() == given.image_processor.to_dict()
