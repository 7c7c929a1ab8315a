# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""From a name to a model: whether the checkpoint is there, is a DeCo, and is whole. Each error is one line."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import (
    HfApi,
    get_safetensors_metadata,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping  # private, seen in transformers 5.19 to 5.24
from transformers.core_model_loading import (  # private, seen in transformers 5.19 to 5.24
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_deco import DecoConfig
from ..modeling_deco import DecoForConditionalGeneration
from ..utils.errors import first_names, one_line
from .folders import check_fields, check_folder


def checkpoint_name(name: str | os.PathLike) -> str:
    """What transformers is to load for a model's name: the path of a folder, `~` expanded, or a Hub id.

    Raises:
        ValueError: there is no such folder, and the name is no Hub id; the Hub is not asked.
    """
    name = os.fspath(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise ValueError(f"{name} is a file; a model is a folder or a Hub id.")
    owner, separator, _ = name.partition("/")
    try:
        validate_repo_id(name)
    except HFValidationError:
        separator = ""
    if not separator:
        raise ValueError(f"There is no folder {name or repr(name)}; a Hub id would be owner/name.")
    if os.path.isdir(owner):
        raise ValueError(f"There is no folder {name}. The Hub is not asked, since {owner} is a folder here.")
    return name


def check_is_deco(model_type: str | None, name: str) -> None:
    """Raise a ValueError where the `model_type` of a config.json is not DeCo's; `name` is the model's."""
    if model_type != DecoConfig.model_type:
        raise ValueError(
            f"{name} is a {model_type!r} model, not a DeCo. deco convert makes one of a LLaVA; recipes/sft.py joins a "
            f"vision tower and a language model (--vision_model_name_or_path)."
        )


def load_config(name: str | os.PathLike, revision: str | None = None) -> DecoConfig:
    """The config of a DeCo checkpoint, a folder or Hub id; of an adapter, its base model's.

    Raises:
        ValueError: there is no such checkpoint, or it is not a DeCo.
    """
    path = checkpoint_name(name)
    if os.path.isdir(path):
        check_folder(path)
    adapter = find_adapter(name, revision)
    if adapter is not None:
        return load_config(adapter.base, adapter.base_revision)
    fields = _read_json(name, "config.json", revision)
    if fields is None:
        raise ValueError(f"{name} is no model: it has no config.json.")
    check_fields(fields, f"config.json of {name}")
    check_is_deco(fields.get("model_type"), name)
    with named_errors(name):
        return DecoConfig.from_dict(fields)


def load_model(name: str | os.PathLike, revision: str | None = None, **arguments) -> DecoForConditionalGeneration:
    """A DeCo checkpoint with all its weights. Of an adapter: its base model with the adapter merged into it or, where
    the weights are quantized, on top of it.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        arguments: of `DecoForConditionalGeneration.from_pretrained`.

    Raises:
        ValueError: there is no such checkpoint, it is not a DeCo, or its weights are not those of its config.
    """
    adapter = find_adapter(name, revision)
    if adapter is not None:
        check_adapter(adapter)
        return _with_adapter(load_model(adapter.base, adapter.base_revision, **arguments), adapter)
    config = load_config(name, revision)
    path = checkpoint_name(name)
    if os.path.isdir(path):
        check_weights(name, revision, config)  # before there is memory for what the config says
    with named_errors(name):
        model, info = DecoForConditionalGeneration.from_pretrained(
            path,
            revision=revision or "main",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # an error below
            **arguments,
        )
    is_quantized = getattr(config, "quantization_config", None) is not None
    _check_weights(
        name,
        len(model.state_dict()),
        info["missing_keys"],
        {key: shapes for key, *shapes in info["mismatched_keys"]},
        () if is_quantized else info["unexpected_keys"],
    )
    return model


def check_weights(name: str, revision: str | None, config: DecoConfig) -> None:
    """Compare the names and shapes of a checkpoint's weights with the model of its config. No weights are read.

    Raises:
        ValueError: weights are missing, have another shape, or have no place in the model.
    """
    adapter = find_adapter(name, revision)
    if adapter is not None:
        check_adapter(adapter)
        check_weights(adapter.base, adapter.base_revision, config)
        _with_adapter(empty_model(config), adapter, reads_weights=False)
        return
    shapes = _shapes_of(name, revision)
    if shapes is None:
        return
    model = empty_model(config)
    expected = model.state_dict()
    renamed, converted = _renamed(model, shapes)
    stored = renamed.keys() | converted
    names = {}  # of each parameter, which has several where weights are tied
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key)
    tied = {key for keys in names.values() for key in keys if not stored.isdisjoint(keys)}
    missing, unexpected = expected.keys() - stored - tied, stored - expected.keys()
    mismatched = {
        key: (shape, tuple(expected[key].shape))
        for key, shape in renamed.items()
        if key in expected and tuple(expected[key].shape) != shape
    }
    if getattr(config, "quantization_config", None) is not None:  # whose method gives tensors names and shapes
        modules = {key.rpartition(".")[0] for key in stored}
        missing = {key for key in missing if key.rpartition(".")[0] not in modules}
        mismatched, unexpected = {}, ()
    _check_weights(name, len(expected), missing, mismatched, unexpected)


def _check_weights(name, num_tensors, missing, mismatched, unexpected) -> None:
    if missing:
        raise ValueError(
            f"{name} has no weights for {len(missing)} of the model's {num_tensors} tensors: {first_names(missing)}."
        )
    if mismatched:
        shapes = [f"{key} is {list(stored)}, not {list(right)}" for key, (stored, right) in mismatched.items()]
        raise ValueError(
            f"{name} has {len(mismatched)} tensors of another shape than its config.json says: {first_names(shapes)}."
        )
    # a LLaVA's tower may be used as it is: it has layers that DeCo does not read
    unexpected = [key for key in unexpected if "vision_tower." not in key]
    if unexpected:
        raise ValueError(
            f"{name} has {len(unexpected)} tensors that the model of its config.json has no place for: "
            f"{first_names(unexpected)}."
        )


def empty_model(config: DecoConfig) -> DecoForConditionalGeneration:
    """The model of a config, without memory for its weights."""
    with torch.device("meta"):
        return DecoForConditionalGeneration(config)


def _renamed(model, shapes: dict[str, tuple]) -> tuple[dict[str, tuple], set[str]]:
    """Names of stored tensors as the model has them.

    Returns:
        The shapes of the tensors that are stored as the model has them, by name; and the names of those that are
        joined from several stored tensors (experts).
    """
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamed, converted = {}, set()
    for key, shape in shapes.items():
        new_key, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if new_key not in expected and key in expected:
            new_key, pattern = key, None
        if pattern is None:
            renamed[new_key] = shape
        else:
            converted.add(new_key)
    return renamed, converted


# --- files -----------------------------------------------------------------------------------------------------------


def _file(name: str | os.PathLike, filename: str, revision: str | None) -> str | None:
    """The path of a checkpoint's file, fetched from the Hub where the checkpoint is there; None where it has none."""
    path = checkpoint_name(name)
    if os.path.isdir(path):
        file = os.path.join(path, filename)
        return file if os.path.exists(file) else None
    try:
        if not is_offline_mode() and not isinstance(
            try_to_load_from_cache(path, "config.json", revision=revision), str
        ):
            HfApi().model_info(path, revision=revision, timeout=10)  # asks once, where a download tries six times
        return hf_hub_download(path, filename, revision=revision)
    except GatedRepoError:
        raise ValueError(f"{name} is gated: ask for access on its page, huggingface.co/{name}, and log in.") from None
    except RepositoryNotFoundError:
        raise ValueError(f"There is neither a folder {name} nor such a model on the Hub, or it is private.") from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision!r} on the Hub.") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if is_offline_mode() and _is_cached(path, revision):
            return None
        reason = "this is offline mode" if is_offline_mode() else "there is no connection"
        raise ValueError(f"There is no folder {name}, and the Hub cannot be asked for it: {reason}.") from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # of the Hub, or of the library that asks it, of which huggingface_hub has had several
        raise ValueError(f"There is no folder {name}, and asking the Hub for it failed: {one_line(error)}") from error


def _is_cached(repo_id: str, revision: str | None) -> bool:
    try:
        snapshot_download(repo_id, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        return False
    return True


def has_file(name: str | os.PathLike, filename: str, revision: str | None = None) -> bool:
    """Whether a checkpoint, a folder or Hub id, has a file."""
    return _file(name, filename, revision) is not None


def _read_json(name, filename: str, revision: str | None = None) -> dict | None:
    file = _file(name, filename, revision)
    if file is None:
        return None
    try:
        fields = json.loads(Path(file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{filename} of {name} is not valid JSON: {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{filename} of {name} is not a JSON object.")
    return fields


def _shapes_of(name: str, revision: str | None) -> dict[str, tuple] | None:
    """Names and shapes of a checkpoint's weights; None where they are on the Hub, which cannot be asked."""
    path = checkpoint_name(name)
    if os.path.isdir(path):
        return stored_shapes(name, path)
    snapshot = os.path.dirname(_file(name, "config.json", revision))
    with suppress(ValueError):  # not fetched, or not all of it
        return stored_shapes(name, snapshot)
    if is_offline_mode():
        return None
    with named_errors(name):
        files = get_safetensors_metadata(path, revision=revision).files_metadata.values()
    return {key: tuple(tensor.shape) for file in files for key, tensor in file.tensors.items()}


def stored_shapes(name: str, folder: str) -> dict[str, tuple]:
    """Names and shapes of the weights in a folder, from the heads of its safetensors files.

    Args:
        name: the checkpoint's, for messages.

    Raises:
        ValueError: there are no weights, a file is missing or damaged.
    """
    files = [SAFE_WEIGHTS_NAME]
    if not os.path.exists(os.path.join(folder, SAFE_WEIGHTS_NAME)):
        index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
        if not os.path.exists(index):
            raise ValueError(f"{name} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
        with named_errors(name):
            files = sorted(set(json.loads(Path(index).read_bytes())["weight_map"].values()))
            for file in files:
                if os.path.basename(file) != file:
                    raise ValueError(f"its {SAFE_WEIGHTS_INDEX_NAME} names {file!r}, which is not a file beside it.")
    absent = [file for file in files if not os.path.exists(os.path.join(folder, file))]
    if absent:
        raise ValueError(
            f"{name} lacks {len(absent)} of the {len(files)} files that its {SAFE_WEIGHTS_INDEX_NAME} names: "
            f"{first_names(absent)}."
        )
    shapes = {}
    for file in files:
        try:
            with safe_open(os.path.join(folder, file), "pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} of {name} is damaged, or not all of it is there: {one_line(error)}") from None
    return shapes


# --- adapters --------------------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """A PEFT adapter and its base model. `base` is a folder or Hub id."""

    name: str
    revision: str | None
    base: str
    base_revision: str | None


def find_adapter(name: str | os.PathLike, revision: str | None = None) -> Adapter | None:
    """The adapter that a name leads to, None where it leads to a whole model.

    Raises:
        ValueError: there is no such folder or repository, or the adapter's base model is not to be found.
    """
    if _file(name, "config.json", revision) is not None:
        if os.path.exists(os.path.join(checkpoint_name(name), "adapter_config.json")):
            raise ValueError(f"{name} has both a model (config.json) and an adapter (adapter_config.json); part them.")
        return None
    fields = _read_json(name, "adapter_config.json", revision)
    if fields is None:
        return None
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"adapter_config.json of {name} does not name its base model (base_model_name_or_path).")
    folder, base = checkpoint_name(name), os.path.expanduser(base)
    places = [os.path.join(folder, base)]
    if os.path.isabs(base):  # training saves a base beside its adapter; the folder of both may have moved since
        places += [os.path.join(folder, *up, os.path.basename(base)) for up in ([], [".."])]
    base = next((place for place in places if os.path.isdir(place)), base)
    try:
        checkpoint_name(base)
    except ValueError as error:
        raise ValueError(
            f"{name} is an adapter, and its base model is not there (base_model_name_or_path in adapter_config.json): "
            f"{error}"
        ) from None
    if _file(base, "config.json", fields.get("revision")) is None:
        raise ValueError(f"{name} is an adapter of {base}, which is no model: it has no config.json.")
    return Adapter(os.fspath(name), revision, base, fields.get("revision"))


def check_adapter(adapter: Adapter) -> None:
    """Raise a ValueError where PEFT is missing, or the kind of adapter cannot be merged."""
    if find_spec("peft") is None:
        raise ValueError(
            f"{adapter.name} is an adapter, which needs peft: pip install peft. Training with --merge_adapter true "
            f"also writes the model with the adapter merged into it."
        )
    from peft import PeftConfig

    with named_errors(adapter.name):
        config = PeftConfig.from_pretrained(checkpoint_name(adapter.name), revision=adapter.revision)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"{adapter.name} is an adapter of the kind {config.peft_type.value}, which cannot be merged.")


def _with_adapter(model: DecoForConditionalGeneration, adapter: Adapter, reads_weights: bool = True):
    """The model with an adapter: merged or, on quantized weights, as layers of its own."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    file = _file(adapter.name, "adapter_model.safetensors", adapter.revision)
    if file is None:
        raise ValueError(f"{adapter.name} has no adapter_model.safetensors.")
    path = checkpoint_name(adapter.name)
    names = set(model.state_dict())
    with named_errors(adapter.name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights, which are checked here
        config = PeftConfig.from_pretrained(path, revision=adapter.revision)
        config.inference_mode = True
        adapted = PeftModel(model, config, low_cpu_mem_usage=True)  # no memory yet for what the config says
        with safe_open(file, "pt") as tensors:
            stored = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    mismatched = {
        key: (shape, tuple(expected[key].shape))
        for key, shape in stored.items()
        if key in expected and tuple(expected[key].shape) != shape
    }
    _check_weights(
        adapter.name,
        len(expected),
        expected.keys() - stored.keys(),
        mismatched,
        [key for key in stored.keys() - expected.keys() if key.removeprefix("base_model.model.") not in names],
    )
    if not reads_weights:
        return model
    with named_errors(adapter.name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.load_adapter(path, "default", revision=adapter.revision, low_cpu_mem_usage=True)
        if getattr(model.config, "quantization_config", None) is not None:
            return adapted.get_base_model()  # merging would round again
        return adapted.merge_and_unload()


# --- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Turn libraries' errors into a ValueError of one line that names the checkpoint. They are of many kinds, and some
    name neither model nor file."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(f"{name} needs code that comes with it, and such code is not run.") from error
        raise ValueError(f"{name} cannot be loaded: {one_line(error)}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is a lack of memory, of a GPU or of this machine."""
    is_named_so = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_named_so or "can't allocate memory" in str(error)  # a plain RuntimeError, on CPUs
