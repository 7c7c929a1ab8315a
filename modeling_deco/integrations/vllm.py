# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""vLLM's plug-in: if this package is installed, `vllm serve DIR` needs no `--trust-remote-code`.

vLLM (tested: 0.32) calls `register` in each of its processes: it is the entry point `deco` of the group
`vllm.general_plugins`. vLLM then runs this package's model in its Transformers backend. That backend finds config,
model and processor by the Auto classes, with which importing this package registers them.
"""

from vllm import ModelRegistry


def register() -> None:
    """Register the class of vLLM that runs DeCo.

    Without it, vLLM looks for the architecture in transformers, and then in the checkpoint's remote code. The class is
    registered by name: importing it would initialize torch's devices, and then the process could not fork.
    """
    ModelRegistry.register_model(
        "DecoForConditionalGeneration",
        "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM",
    )
