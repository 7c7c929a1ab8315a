# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""4 and 8 bits by bitsandbytes: the language model's linears and nothing else, without a list from the user.

On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks 4-bit weights at the first inference, for which their widths must be
multiples of 64, and `state_dict` then does not give back what was loaded. So the language model here is wider than
`tiny`'s, and models are saved before they are run.
"""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from fresh_process import FreshProcesses
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GPTQConfig,
    QuantoConfig,
    pipeline,
)
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT, DecoConfig, DecoForConditionalGeneration, DecoModel
from modeling_deco.cli import app
from modeling_deco.inference import generation as inference
from modeling_deco.modeling_deco import _with_modules_to_skip
from modeling_deco.worlds.digits.evaluate import accuracy_by_kind
from modeling_deco.worlds.digits.scenes import render

pytest.importorskip("accelerate")
bnb = pytest.importorskip("bitsandbytes")

TEXT_CONFIG = {
    **tiny.TEXT_CONFIGS["llama"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NUM_TEXT_LINEARS = 2 * 7  # q, k, v, o, gate, up and down in each layer
BITS = {"4": {"load_in_4bit": True}, "8": {"load_in_8bit": True}}
LINEARS = {"4": "Linear4bit", "8": "Linear8bitLt"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WHOLE = {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}


def build_model(vision, tied):
    config = DecoConfig(
        vision_config=tiny.VISION_CONFIGS[vision],
        text_config={**TEXT_CONFIG, "tie_word_embeddings": tied},
        image_token_id=tiny.IMAGE_TOKEN_ID,
        pooled_grid_size=3,
    )
    return tiny.randomize(DecoForConditionalGeneration(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Unquantized checkpoints, by vision tower and by whether the head is tied."""
    folders = {}
    for vision in ("clip", "siglip"):
        for tied in (False, True):
            folders[vision, tied] = tmp_path_factory.mktemp(f"{vision}{'_tied' * tied}")
            build_model(vision, tied).save_pretrained(folders[vision, tied])
            tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE).save_pretrained(folders[vision, tied])
    return folders


@pytest.fixture(scope="module")
def folder(folders):
    return folders["clip", False]


@pytest.fixture(scope="module")
def inputs():
    return {**tiny.batch(tiny.prompt(9, "what is this ?")), "pixel_values": tiny.pixels(1)}


def load(folder, config, auto_class=AutoModelForImageTextToText, **kwargs):
    return auto_class.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**config), **kwargs)


def linears(model):
    """The class of each linear layer, by name."""
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@torch.no_grad()
def output(model, inputs):
    """Logits, or the hidden state of the model without a head."""
    return model(**inputs)[0]


# --- what is quantized -----------------------------------------------------------------------------------------------


def load_and_report(folder, auto_class, bits, trust_remote_code):
    """What a quantized model is made of, against the weights in the folder. For this process and fresh ones."""
    import torch
    import transformers
    from safetensors.torch import load_file

    quantization_config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    auto_class = getattr(transformers, auto_class)
    model = auto_class.from_pretrained(
        folder, quantization_config=quantization_config, trust_remote_code=trust_remote_code == "True"
    )
    prefix = "" if hasattr(model, "lm_head") else "model."
    saved = {name.removeprefix(prefix): tensor for name, tensor in load_file(f"{folder}/model.safetensors").items()}
    if prefix:
        saved.pop("lm_head.weight", None)
    state = model.state_dict()
    return {
        "class": f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}",
        "linears": {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)},
        "changed": [n for n in saved if state[n].dtype != saved[n].dtype or not torch.equal(state[n], saved[n])],
        "tied": bool(not prefix and model.lm_head.weight is model.get_input_embeddings().weight),
    }


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """Fresh processes where the package cannot be imported."""
    processes = FreshProcesses(
        modules=[
            "torch",
            "transformers.models.auto.modeling_auto",
            "transformers.integrations.bitsandbytes",
            *(f"transformers.models.{name}.modeling_{name}" for name in ("clip", "siglip", "llama")),
        ],
        blocked=["modeling_deco"],
        environment={"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))},
    )
    yield processes
    processes.close()


def assert_language_model_alone_is_quantized(report, bits):
    quantized = {name for name, linear in report["linears"].items() if linear == LINEARS[bits]}
    assert quantized == {name for name in report["linears"] if "language_model." in name}
    assert len(quantized) == NUM_TEXT_LINEARS
    assert {report["linears"][name] for name in report["linears"].keys() - quantized} == {"Linear"}
    assert {name.rpartition(".")[0] for name in report["changed"]} == quantized


@pytest.mark.parametrize(
    ("auto_class", "name", "bits", "vision", "tied"),
    [
        ("AutoModelForImageTextToText", "DecoForConditionalGeneration", "4", "clip", False),
        ("AutoModelForImageTextToText", "DecoForConditionalGeneration", "8", "siglip", True),
        ("AutoModelForImageTextToText", "DecoForConditionalGeneration", "4", "siglip", True),
        ("AutoModel", "DecoModel", "8", "clip", False),
        ("AutoModel", "DecoModel", "4", "siglip", True),
    ],
)
def test_the_linears_of_the_language_model_alone_are_quantized(auto_class, name, bits, vision, tied, folders):
    report = load_and_report(folders[vision, tied], auto_class, bits, "False")
    assert report["class"] == f"modeling_deco.{name}"
    assert_language_model_alone_is_quantized(report, bits)
    assert report["tied"] == (tied and auto_class == "AutoModelForImageTextToText")


@pytest.mark.parametrize(
    ("auto_class", "name", "bits", "tied"),
    [
        ("AutoModelForImageTextToText", "DecoForConditionalGeneration", "4", True),
        ("AutoModelForImageTextToText", "DecoForConditionalGeneration", "8", False),
        ("AutoModel", "DecoModel", "4", False),
    ],
)
def test_so_it_is_without_the_package(auto_class, name, bits, tied, folders, remote):
    report = remote.run(load_and_report, folders["clip", tied], auto_class, bits, "True")
    assert report["class"] == f"transformers_modules.{name}"
    assert_language_model_alone_is_quantized(report, bits)
    assert report["tied"] == (tied and auto_class == "AutoModelForImageTextToText")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("deco_class", [DecoForConditionalGeneration, DecoModel])
def test_so_it_is_for_the_classes_themselves(deco_class, bits, folder):
    layers = linears(load(folder, BITS[bits], deco_class))
    quantized = {name for name, linear in layers.items() if linear.__name__ == LINEARS[bits]}
    assert quantized == {name for name in layers if "language_model." in name}
    assert len(quantized) == NUM_TEXT_LINEARS


def test_the_newline_of_a_4_bit_model_has_the_compute_dtype(tmp_path):
    config = DecoConfig(
        vision_config=tiny.VISION_CONFIGS["clip"],
        text_config=TEXT_CONFIG,
        image_token_id=tiny.IMAGE_TOKEN_ID,
        pooled_grid_size=3,
        **tiny.FAMILIES["llava_next"],
    )
    wide = tiny.randomize(DecoForConditionalGeneration(config))
    wide.save_pretrained(tmp_path)
    loaded = load(tmp_path, WHOLE, dtype=torch.bfloat16)
    assert loaded.model.image_newline.dtype == torch.bfloat16
    assert torch.equal(loaded.model.image_newline, wide.model.image_newline.bfloat16())
    inputs = tiny.build_family_processor(config)(images=[tiny.picture(0)], text="<image> what", return_tensors="pt")
    assert output(loaded, inputs.to(dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_image_features_of_any_grid_are_the_unquantized_models(bits, folder):
    plain, model = AutoModelForImageTextToText.from_pretrained(folder), load(folder, BITS[bits])
    images = {"pixel_values": tiny.pixels(2), "pooled_grid_sizes": torch.tensor([[2, 3], [6, 6]])}
    with torch.no_grad():
        expected, features = (each.get_image_features(**images).pooler_output for each in (plain, model))
    assert [len(each) for each in features] == [6, 36]
    assert all(torch.equal(*pair) for pair in zip(features, expected, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_answers_take_any_grid_per_call(bits, folder):
    processor, model = tiny.build_processor(), load(folder, BITS[bits])
    for grid, num_tokens in ((2, 4), ([3, 5], 15), (None, 9)):
        encoded = processor(
            images=tiny.picture(0), text="<image> what is this ?", pooled_grid_size=grid, return_tensors="pt"
        )
        assert (encoded["input_ids"] == tiny.IMAGE_TOKEN_ID).sum() == num_tokens
        generated = model.generate(**encoded, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert generated.shape[1] == encoded["input_ids"].shape[1] + 3


@pytest.mark.parametrize("bits", BITS)
def test_quantized_logits_are_near_the_unquantized(bits, folder, inputs):
    plain = output(AutoModelForImageTextToText.from_pretrained(folder), inputs)
    logits = output(load(folder, NF4 if bits == "4" else BITS[bits]), inputs)
    correlation = torch.corrcoef(torch.stack([plain.flatten(), logits.flatten()]))[0, 1]
    assert {"4": 0.9, "8": 0.99}[bits] < correlation < 1


# --- what the user says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "skipped"),
    [("4", ["model.language_model.layers.0", "lm_head"]), ("8", ["model.vision_tower"]), ("4", [])],
)
def test_a_list_of_modules_from_the_user_is_the_whole_list(skipped, bits, folder):
    model = load(folder, {**BITS[bits], "llm_int8_skip_modules": skipped})
    left_alone = {name for name, linear in linears(model).items() if linear is torch.nn.Linear}
    assert left_alone == {name for name in linears(model) if name.startswith(tuple(skipped))}
    assert model.config.quantization_config.llm_int8_skip_modules == skipped


def test_a_list_of_modules_in_a_dict_is_the_whole_list(folder):
    config = {"load_in_4bit": True, "llm_int8_skip_modules": ["model.vision_tower"]}
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
    assert Counter(linears(model).values())[bnb.nn.Linear4bit] == NUM_TEXT_LINEARS + 2 + 1  # projector and head


@pytest.mark.parametrize(
    "config", [BitsAndBytesConfig(load_in_4bit=True), {"load_in_4bit": True}], ids=["object", "dict"]
)
def test_the_users_config_stays_as_it_is(config, folder):
    before = dict(config if isinstance(config, dict) else vars(config))
    for deco_class in (DecoForConditionalGeneration, DecoModel, AutoModel):  # an Auto class passes a copy on
        model = deco_class.from_pretrained(folder, quantization_config=config)
        assert Counter(linears(model).values())[bnb.nn.Linear4bit] == NUM_TEXT_LINEARS
        assert model.config.quantization_config is not config
    assert (config if isinstance(config, dict) else vars(config)) == before


@pytest.mark.parametrize(
    ("device_map", "as_dict"), [(None, False), (None, True), ("auto", False), ({"": "cpu"}, True)], ids=str
)
def test_all_else_that_the_user_asks_for_is_done(device_map, as_dict, folder):
    config = BitsAndBytesConfig(**WHOLE)
    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        quantization_config=config.to_dict() if as_dict else config,
        device_map=device_map,
        dtype=torch.bfloat16,
        attn_implementation="eager",
    )
    linear = model.model.language_model.layers[0].mlp.up_proj
    assert type(linear) is bnb.nn.Linear4bit
    assert (linear.compute_dtype, linear.weight.quant_type) == (torch.bfloat16, "nf4")
    assert linear.weight.quant_state.nested
    assert model.lm_head.weight.dtype == model.model.multi_modal_projector.linear_1.weight.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_methods_with_a_list_of_their_own_get_the_same_and_others_nothing():
    expected = _with_modules_to_skip(BitsAndBytesConfig(load_in_8bit=True)).llm_int8_skip_modules
    assert _with_modules_to_skip(QuantoConfig(weights="int8")).modules_to_not_convert == expected
    assert _with_modules_to_skip(QuantoConfig(modules_to_not_convert=["a"])).modules_to_not_convert == ["a"]
    gptq = GPTQConfig(bits=4)
    assert vars(_with_modules_to_skip(gptq)) == vars(gptq)


def test_a_config_without_bits_is_refused_as_by_transformers(folder):
    with pytest.raises(ValueError, match="has no `quant_method` attribute"):
        AutoModelForImageTextToText.from_pretrained(folder, quantization_config={"bits": 4})


# --- save and reload -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["4 fp4", "4 nf4 nested bf16", "8"])
def quantized(request, folders, tmp_path_factory):
    """A quantized model with tied head, not run before it was saved, and its folder."""
    config = {"4 fp4": BITS["4"], "4 nf4 nested bf16": WHOLE, "8": BITS["8"]}[request.param]
    model, target = load(folders["siglip", True], config), tmp_path_factory.mktemp("quantized")
    model.save_pretrained(target)
    tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE).save_pretrained(target)
    return model, target


@pytest.fixture(scope="module")
def expected(quantized, inputs, tmp_path_factory):
    """Inputs, logits and hidden state of the quantized model, in a file."""
    model, _ = quantized
    file = tmp_path_factory.mktemp("expected") / "outputs.pt"
    torch.save({"inputs": inputs, "logits": output(model, inputs), "hidden_state": output(model.model, inputs)}, file)
    return file


def reload_and_compare(folder, file, auto_class, trust_remote_code):
    """Whether the output of a saved quantized model is the same bits. For this process and fresh ones."""
    import torch
    import transformers

    expected = torch.load(file)
    auto_class = getattr(transformers, auto_class)
    model = auto_class.from_pretrained(folder, trust_remote_code=trust_remote_code == "True")
    with torch.no_grad():
        output = model(**expected["inputs"])[0]
    return torch.equal(output, expected["logits" if hasattr(model, "lm_head") else "hidden_state"])


@pytest.mark.parametrize("auto_class", ["AutoModelForImageTextToText", "AutoModel"])
def test_a_saved_model_gives_the_same_bits(auto_class, quantized, expected):
    assert reload_and_compare(quantized[1], expected, auto_class, "False")


@pytest.mark.parametrize("auto_class", ["AutoModelForImageTextToText", "AutoModel"])
def test_a_saved_model_gives_the_same_bits_without_the_package(auto_class, quantized, expected, remote):
    assert remote.run(reload_and_compare, quantized[1], expected, auto_class, "True")


def test_a_saved_model_is_smaller_by_the_language_model(quantized, folders):
    whole, saved = (load_file(path / "model.safetensors") for path in (folders["siglip", True], quantized[1]))
    linear = "model.language_model.layers.1.mlp.down_proj.weight"
    bits = 8 if saved[linear].dtype == torch.int8 else 4
    assert saved[linear].numel() * 8 == whole[linear].numel() * bits
    others = [name for name in whole if not (name.startswith("model.language_model") and "_proj" in name)]
    assert all(torch.equal(saved[name], whole[name]) for name in others)


def test_a_model_without_head_is_saved_for_the_model_with_one(folders, inputs, tmp_path):
    base_model = load(folders["clip", True], NF4, AutoModel)
    base_model.save_pretrained(tmp_path)
    reloaded = {
        auto_class: auto_class.from_pretrained(tmp_path) for auto_class in (AutoModel, DecoForConditionalGeneration)
    }
    expected = output(base_model, inputs)
    assert torch.equal(output(reloaded[AutoModel], inputs), expected)
    assert torch.equal(output(reloaded[DecoForConditionalGeneration].model, inputs), expected)


def test_a_saved_model_stays_as_it_was_saved_whatever_is_asked_for(quantized, expected, inputs):
    asked = BitsAndBytesConfig(**NF4)
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = AutoModelForImageTextToText.from_pretrained(quantized[1], quantization_config=asked)
    assert torch.equal(output(model, inputs), torch.load(expected)["logits"])


def test_a_folder_with_a_quantized_tower_keeps_it(folder, tmp_path):
    model = load(folder, {**NF4, "llm_int8_skip_modules": ["lm_head"]})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = None  # as transformers' default saves it
    (tmp_path / "config.json").write_text(json.dumps(config))
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert linears(reloaded) == linears(model)
    assert linears(reloaded)["model.multi_modal_projector.linear_1"] is bnb.nn.Linear4bit
    expected, state = model.state_dict(), reloaded.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


# --- pipeline and command --------------------------------------------------------------------------------------------


def test_the_pipeline_takes_the_config(folder):
    model_kwargs = {"quantization_config": BitsAndBytesConfig(**NF4)}
    pipe = pipeline("image-text-to-text", model=str(folder), model_kwargs=model_kwargs)
    assert Counter(linears(pipe.model).values())[bnb.nn.Linear4bit] == NUM_TEXT_LINEARS
    text = {"type": "text", "text": "what is this ?"}
    messages = [{"role": "user", "content": [{"type": "image", "image": tiny.picture(0)}, text]}]
    (answer,) = pipe(text=messages, return_full_text=False, max_new_tokens=4)
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    generated = load(folder, NF4).generate(**inputs, max_new_tokens=4)
    assert answer["generated_text"].strip() == pipe.processor.decode(generated[0, inputs["input_ids"].shape[1] :])


@pytest.mark.newest
def test_the_pipeline_reads_a_saved_model(quantized):
    pipe = pipeline("image-text-to-text", model=str(quantized[1]))
    assert linears(pipe.model) == linears(quantized[0])


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """`deco ask` about a picture of digits: its result, and the model that it used."""
    used, stream = [], inference.stream

    def spy(model, *arguments, **kwargs):
        used.append(model)
        return stream(model, *arguments, **kwargs)

    monkeypatch.setattr(inference, "stream", spy)
    scene = render("test", index=10, seed=2026, min_digits=4)
    scene.image.save(tmp_path / "digits.png")

    def ask(*arguments):
        digit = scene.digits[0]
        question = f"What colour is the {digit.value}?"
        result = CliRunner().invoke(app, ["ask", str(tmp_path / "digits.png"), question, *arguments])
        assert (result.exit_code, result.stdout) == (0, f"{digit.value} {digit.colour}.\n")
        return used.pop()

    return ask


def test_deco_ask_answers_in_4_bits(ask):
    model = ask("--4bit")
    assert Counter(linears(model).values())[bnb.nn.Linear4bit] == 4 * 7
    assert model.model.language_model.layers[0].mlp.up_proj.weight.quant_type == "nf4"
    assert Counter(linears(ask()).values())[bnb.nn.Linear4bit] == 0


@pytest.mark.parametrize("arguments", [[], ["--4bit"]], ids=["plain", "4bit"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_deco_ask_takes_a_checkpoint_that_is_already_in_4_bits(arguments, ask, tmp_path):
    load(SHIPPED_CHECKPOINT, BITS["4"]).save_pretrained(tmp_path / "quantized")
    AutoProcessor.from_pretrained(SHIPPED_CHECKPOINT).save_pretrained(tmp_path / "quantized")
    model = ask("--model", str(tmp_path / "quantized"), *arguments)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.quant_type == "fp4"


@pytest.mark.slow
@pytest.mark.parametrize("grid", [3, 6, 12])
@pytest.mark.parametrize("config", [BITS["4"], NF4, BITS["8"]], ids=["fp4", "nf4", "int8"])
def test_the_digits_checkpoint_loses_at_most_one_point(config, grid):
    processor = AutoProcessor.from_pretrained(SHIPPED_CHECKPOINT)
    plain, quantized = (
        accuracy_by_kind(model, processor, "test", num_pictures=1000, pooled_grid_size=grid)
        for model in (
            AutoModelForImageTextToText.from_pretrained(SHIPPED_CHECKPOINT),
            load(SHIPPED_CHECKPOINT, config),
        )
    )
    lost = {kind: plain[kind]["accuracy"] - quantized[kind]["accuracy"] for kind in plain}
    assert max(lost.values()) <= 1


# --- QLoRA -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def qlora(request, folders, inputs, tmp_path_factory):
    """A 4-bit model after two steps of LoRA and projector: its weights before and after, and its adapter's folder."""
    peft = pytest.importorskip("peft")
    folder, adapter = folders["clip", request.param], tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(load(folder, NF4), config).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    labels = inputs["input_ids"].where(inputs["input_ids"] != tiny.IMAGE_TOKEN_ID, -100)
    for _ in range(2):  # in the first, B is zero and A has no gradient
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(adapter)
    return SimpleNamespace(model=model.eval(), before=before, after=after, folder=folder, adapter=adapter)


def test_qlora_adapts_every_linear_of_the_language_model_and_no_other(qlora):
    from peft.tuners.lora.bnb import Linear4bit

    adapted = [name for name, module in qlora.model.named_modules() if isinstance(module, Linear4bit)]
    assert len(adapted) == NUM_TEXT_LINEARS
    assert all("language_model.layers" in name for name in adapted)


def test_qlora_moves_adapters_and_projector_and_all_else_is_bit_equal(qlora):
    before, after = qlora.before, qlora.after
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".lora_" in name or ".modules_to_save." in name}
    assert {name.split(".")[3] for name in moved} == {"language_model", "multi_modal_projector"}
    assert len(moved) == 2 * NUM_TEXT_LINEARS + 4  # A and B of each; two linears with bias


def test_a_saved_adapter_on_the_4_bit_model_gives_the_same_bits(qlora, inputs):
    from peft import PeftModel

    reloaded = PeftModel.from_pretrained(load(qlora.folder, NF4), qlora.adapter).eval()
    assert torch.equal(output(reloaded, inputs), output(qlora.model, inputs))
    with reloaded.disable_adapter():
        assert not torch.equal(output(reloaded, inputs), output(qlora.model, inputs))


def test_the_folder_of_an_adapter_is_loaded_by_the_auto_class_in_4_bits(qlora, inputs):
    reloaded = load(qlora.adapter, NF4)
    assert Counter(type(module) for module in reloaded.modules())[bnb.nn.Linear4bit] == NUM_TEXT_LINEARS
    assert torch.equal(output(reloaded, inputs), output(qlora.model, inputs))
