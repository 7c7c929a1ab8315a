# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""vLLM's door: with this package installed, `vllm serve DIR` needs no `--trust-remote-code`.

vLLM (tested: 0.32) calls `register` in each of its processes, by the entry point `deco` of the group
`vllm.general_plugins`. The model code that it runs is ours, in its Transformers backend; the importing of this package
has registered config, model and processor with the Auto classes, which that backend asks for all three.
"""

from vllm import ModelRegistry


def register() -> None:
    """Tell vLLM which of its classes runs DeCo. Without this it looks for the architecture in transformers' own
    namespace, and then in the checkpoint's remote code."""
    ModelRegistry.register_model(  # by name: what imports torch's devices here could not be forked
        "DecoForConditionalGeneration",
        "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM",
    )
