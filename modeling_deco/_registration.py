# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Registration with transformers' Auto classes, without importing torch, and with lmms-eval.

`AutoModel.register` needs the class, and the class needs torch, which takes seconds to import even for a program that
only prints its help. So each class is registered when the module of its Auto class is imported, or at once if it has
been imported already.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

_AUTO = "transformers.models.auto"  # private, seen in transformers 5.19 to 5.24
# (module of the Auto class, Auto class, our module, our class)
_REGISTRATIONS = [
    (f"{_AUTO}.configuration_auto", "AutoConfig", f"{__package__}.configuration_deco", "DecoConfig"),
    (f"{_AUTO}.modeling_auto", "AutoModel", f"{__package__}.modeling_deco", "DecoModel"),
    (
        f"{_AUTO}.modeling_auto",
        "AutoModelForImageTextToText",
        f"{__package__}.modeling_deco",
        "DecoForConditionalGeneration",
    ),
    (
        f"{_AUTO}.modeling_auto",
        "AutoModelForMultimodalLM",
        f"{__package__}.modeling_deco",
        "DecoForConditionalGeneration",
    ),
    (f"{_AUTO}.processing_auto", "AutoProcessor", f"{__package__}.processing_deco", "DecoProcessor"),
]


def _register(auto_module: str, auto_class: str, module: str, name: str) -> None:
    """Register one class. If a module of the two is still being imported, its loader calls this again at the end."""
    if not hasattr(sys.modules.get(auto_module), auto_class):
        return
    if module in sys.modules and not hasattr(sys.modules[module], name):
        return
    config_class = import_module(f"{__package__}.configuration_deco").DecoConfig
    key = config_class.model_type if name == "DecoConfig" else config_class
    getattr(sys.modules[auto_module], auto_class).register(key, getattr(import_module(module), name), exist_ok=True)


class _RegisteringLoader(Loader):
    """Executes a module with the wrapped loader, then makes the registrations that wait for it."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        for registration in _REGISTRATIONS:
            if module.__name__ in (registration[0], registration[2]):
                _register(*registration)


class _RegisteringFinder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if not any(fullname in (auto_module, module) for auto_module, _, module, _ in _REGISTRATIONS):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_with_auto_classes() -> None:
    """Register DeCo with AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM and
    AutoProcessor."""
    sys.meta_path.insert(0, _RegisteringFinder())
    for registration in _REGISTRATIONS:
        _register(*registration)


def lmms_eval_manifest():
    """The entry point `lmms_eval.models`. lmms-eval imports the class when `--model deco` is chosen."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="deco", chat_class_path=f"{__package__}.integrations.lmms_eval.Deco")
