# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`load`: where a model goes, and in which type. `stream`: the same text as `generate`, piece by piece; it stops when
nobody reads on."""

import shutil
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, pipeline

from modeling_deco.inference import load, loading
from modeling_deco.inference.generation import check_length, encode, sampling, stream, stream_call, with_system


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(str(checkpoint))


def ask(*pictures, question="what is this ?") -> list[dict]:
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("grid", [None, [2, 4]])
def test_the_pieces_are_the_text_of_generate(pictures, grid, loaded):
    model, processor = loaded
    messages = ask(*(tiny.picture(seed) for seed in range(pictures)))
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"pooled_grid_size": grid},
    )
    generated = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    pieces = list(stream(model, processor, messages, pooled_grid_size=grid, max_new_tokens=5))
    assert "".join(pieces) == processor.decode(generated, skip_special_tokens=True)
    assert len(pieces) > 1


@pytest.mark.parametrize("settings", [{"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}])
def test_a_checkpoint_of_beam_search_answers_with_the_likeliest_tokens(settings, loaded, monkeypatch):
    model, processor = loaded
    expected = "".join(stream(model, processor, ask(tiny.picture(0)), max_new_tokens=5))
    for name, value in settings.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert "".join(stream(model, processor, ask(tiny.picture(0)), max_new_tokens=5)) == expected


def test_generate_gets_the_tokenizer_that_stop_strings_need(loaded):
    def call(**arguments):
        arguments["streamer"].end()
        return arguments

    pieces, processor = stream_call(call, loaded[1]), loaded[1]
    with pytest.raises(StopIteration) as end:
        next(pieces)
    assert end.value.value["tokenizer"] is processor.tokenizer


def test_an_iterator_that_is_closed_stops_generation(loaded):
    model, processor = loaded
    before = threading.active_count()
    pieces = stream(model, processor, ask(tiny.picture(0)), max_new_tokens=100_000)
    next(pieces)
    start = time.monotonic()
    pieces.close()
    assert threading.active_count() == before
    assert time.monotonic() - start < 5


def test_an_error_of_generation_is_raised_where_the_answer_is_read(loaded):
    model, processor = loaded
    with pytest.raises(ValueError, match=r"7 x 7 is larger than the 6 x 6"):
        list(stream(model, processor, ask(tiny.picture(0)), pooled_grid_size=7))


def test_two_answers_at_once_do_not_mix(loaded):
    model, processor = loaded
    messages = [ask(tiny.picture(seed)) for seed in range(2)]
    alone = ["".join(stream(model, processor, one)) for one in messages]
    first, second = (stream(model, processor, one) for one in messages)
    together = [next(first), next(second)]
    assert [together[0] + "".join(first), together[1] + "".join(second)] == alone


def test_the_dtype_of_the_checkpoint_is_kept(checkpoint, tmp_path):
    model, processor = load(str(checkpoint))
    model.bfloat16().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert str(load(str(tmp_path))[0].dtype) == "torch.bfloat16"
    assert type(load(str(tmp_path))[1]) is type(AutoProcessor.from_pretrained(checkpoint))


# --- where a model goes ----------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch, checkpoint):
    """Pretend a machine; `load` then tells how the weights were loaded, and to where the model was moved."""

    def pretend(num_gpus, has_accelerate, **arguments):
        given_to = {}
        model = SimpleNamespace(to=lambda device: given_to.update(to=device) or model)
        monkeypatch.setattr("torch.cuda.is_available", lambda: num_gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
        monkeypatch.setattr(
            loading, "find_spec", lambda name: None if name == "accelerate" and not has_accelerate else 1
        )
        monkeypatch.setattr(loading, "load_model", lambda name, revision, **given: given_to.update(given) or model)
        assert load(str(checkpoint), **arguments)[0] is model
        return given_to.get("device_map"), given_to.get("to")

    return pretend


@pytest.mark.parametrize(
    ("num_gpus", "has_accelerate", "device", "placed"),
    [
        (0, False, None, (None, "cpu")),
        (0, True, None, (None, None)),
        (1, False, None, (None, "cuda")),
        (1, True, None, ({"": "cuda"}, None)),
        (4, False, None, (None, "cuda")),
        (4, True, None, ("auto", None)),
        (4, True, "cuda:3", ({"": "cuda:3"}, None)),
        (4, False, "cuda:3", (None, "cuda:3")),
        (4, False, "cpu", (None, "cpu")),
        (4, True, "cpu", ({"": "cpu"}, None)),
    ],
)
def test_a_gpu_is_used_with_and_without_accelerate(num_gpus, has_accelerate, device, placed, machine):
    assert machine(num_gpus, has_accelerate, device=device) == placed


@pytest.mark.parametrize(
    ("device", "num_gpus", "message"),
    [
        ("gpu", 1, r"The device must be cpu, cuda, cuda:N or mps, got 'gpu'"),
        ("cuda:", 1, r"The device must be .*, got 'cuda:'"),
        ("meta", 1, r"The device must be .*, got 'meta'"),
        ("cuda", 0, r"There is no device 'cuda': PyTorch finds 0 CUDA GPUs"),
        ("cuda:2", 2, r"There is no device 'cuda:2': PyTorch finds 2 CUDA GPUs"),
        ("mps", 1, r"There is no device 'mps'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, num_gpus, message, machine, monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        machine(num_gpus, True, device=device)


@pytest.mark.parametrize(("dtype", "loaded"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_dtype_that_is_asked_for_is_loaded(dtype, loaded, checkpoint):
    model, _ = load(str(checkpoint), dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {loaded}


def test_an_unknown_dtype_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"The dtype must be one of auto, float32, float16, bfloat16, got 'int8'"):
        load(str(checkpoint), dtype="int8")


def test_int8_is_what_is_loaded_in_int8(checkpoint):
    kinds = {type(module).__name__ for module in load(str(checkpoint), in_int8=True)[0].modules()}
    assert "Int8Linear" in kinds
    assert "Linear" not in kinds


# --- what is drawn, and what is refused ------------------------------------------------------------------------------


def test_a_temperature_counts_before_the_checkpoints_own(loaded):
    model, processor = loaded
    ask_once = partial(stream, model, processor, ask(tiny.picture(0)), max_new_tokens=12)
    greedy = "".join(ask_once(temperature=0))
    own = model.generation_config
    try:
        own.do_sample, own.temperature = True, 50.0
        assert "".join(ask_once(temperature=0)) == greedy
        assert "".join(ask_once(seed=1)) != greedy
        own.do_sample, own.temperature = False, 1.0
        assert "".join(ask_once(seed=1)) == greedy
        assert "".join(ask_once(seed=1, temperature=50.0)) != greedy
    finally:
        own.do_sample, own.temperature = False, 1.0


def test_the_same_seed_draws_the_same_answer(loaded):
    model, processor = loaded
    ask_once = partial(stream, model, processor, ask(tiny.picture(0)), max_new_tokens=12, temperature=5.0)
    answers = ["".join(ask_once(seed=seed)) for seed in (0, 8, 0)]
    assert answers[0] == answers[2] != answers[1]


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-9])
def test_a_temperature_of_0_is_greedy(temperature):
    assert sampling(temperature)["do_sample"] is False
    assert sampling(None) == {}
    assert sampling(0.5) == {"do_sample": True, "temperature": 0.5}


@pytest.mark.parametrize(
    ("key", "index"), [("lm_head.weight", (7, 5)), ("model.vision_tower.embeddings.class_embedding", (5,))]
)
def test_weights_that_are_no_numbers_give_no_answer(key, index, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[key][index] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"The model's logits are NaN: its weights are damaged"):
        list(stream(*load(str(folder)), ask(tiny.picture(0))))


@pytest.mark.parametrize("num_left", [1, 0])
def test_a_prompt_may_be_as_long_as_leaves_one_token(num_left, loaded):
    model, _ = loaded
    inputs = {"input_ids": torch.ones(1, model.config.text_config.max_position_embeddings - num_left)}
    if num_left:
        check_length(model, inputs)
    else:
        with pytest.raises(ValueError, match=r"has 256 tokens, but the model's context is 256; shorten it"):
            check_length(model, inputs)


def test_a_stream_refuses_a_prompt_that_leaves_no_room(loaded):
    with pytest.raises(ValueError, match=r"but the model's context is 256; shorten it"):
        list(stream(*loaded, ask(tiny.picture(0), question="what " * 300)))


def test_text_with_an_image_token_is_refused_in_any_conversation_of_a_batch(loaded):
    _, processor = loaded
    clean, spoiled = ask(tiny.picture(0)), ask(tiny.picture(0), question="what <image> ?")
    with pytest.raises(ValueError, match="The text contains '<image>'"):
        encode(processor, [clean, spoiled])


@pytest.mark.parametrize("content", [[{"type": "text", "text": "what \udcff"}], "what \ud800"])
def test_text_that_is_no_unicode_is_refused(content, loaded):
    _, processor = loaded
    with pytest.raises(ValueError, match=r"The text 'what \\ud[c8]..' is not valid Unicode; write it in UTF-8"):
        encode(processor, [{"role": "user", "content": content}])


def test_text_with_an_image_token_is_refused_in_words_of_the_question(loaded):
    model, processor = loaded
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is <image> ?"}]}]
    for conversations in (messages, [messages, messages]):
        with pytest.raises(ValueError, match=r"The text contains '<image>', which marks an image; leave it out"):
            encode(processor, conversations)


def test_a_system_message_comes_first_or_is_refused(loaded):
    _, processor = loaded
    question = ask()
    assert with_system(processor, question, None) is question
    first, *rest = with_system(processor, question, "two dog")
    assert first == {"role": "system", "content": [{"type": "text", "text": "two dog"}]}
    assert rest == question
    template = processor.chat_template
    try:
        processor.chat_template = "{% for message in messages if message['role'] == 'user' %}user {% endfor %}"
        with pytest.raises(ValueError, match=r"The chat template ignores system messages"):
            with_system(processor, question, "two dog")
        processor.chat_template = "{{ raise_exception('System role not\nsupported') }}"
        with pytest.raises(ValueError, match=r"rejects these messages: System role not supported$"):
            with_system(processor, question, "two dog")
    finally:
        processor.chat_template = template


def test_what_a_call_returns_comes_after_its_pieces(loaded):
    model, processor = loaded
    inputs = encode(processor, ask(tiny.picture(0)))
    pieces = stream_call(partial(model.generate, **inputs, max_new_tokens=4), processor)
    text = ""
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            answer = end.value[0, inputs["input_ids"].shape[1] :]
            break
    assert text == processor.decode(answer, skip_special_tokens=True)


# --- how often the tower is run --------------------------------------------------------------------------------------


@pytest.fixture
def looks(loaded):
    """A list that grows by the pictures that the tower looks at."""
    looks = []
    hook = loaded[0].model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: looks.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    yield looks
    hook.remove()


def test_each_picture_is_encoded_once_per_question(loaded, looks):
    messages = ask(tiny.picture(0), tiny.picture(1))
    list(stream(*loaded, messages, max_new_tokens=6))
    assert looks == [2]
    list(stream(*loaded, messages, max_new_tokens=6))
    assert looks == [2, 2]


def test_the_pipeline_encodes_a_picture_once(loaded, looks):
    model, processor = loaded
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    pipe(text=ask(tiny.picture(0)), max_new_tokens=6, return_full_text=False)
    assert looks == [1]
