# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Fewer bits per weight: NF4 for little memory, int8 for speed."""

import warnings
from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig


def nf4_config() -> BitsAndBytesConfig:
    """NF4 for bitsandbytes, or a ValueError that says what to install."""
    missing = [name for name in ("accelerate", "bitsandbytes") if find_spec(name) is None]
    if missing:
        raise ValueError(f"--4bit needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    # GPUs are fastest in bfloat16, which is far finer than 4-bit weights. A CPU without bfloat16 took 2 to 5 times as
    # long in it as in float32; on those that have it, bitsandbytes uses it whatever is asked for.
    compute_dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


class Int8Linear(nn.Module):
    """A linear layer on a CPU with int8 weights, one scale per output, and inputs rounded to 7 bits as they come, one
    scale for all: as PyTorch's `quantize_dynamic`, which is deprecated, by the same kernels (FBGEMM).

    torchao, its successor, computes these products of bytes on CPUs without VNNI more slowly than in float32. So does
    PyTorch's `onednn.qlinear`, which needs no quantized tensor, than these kernels (seen in PyTorch 2.13 and 2.14).

    Attributes:
        nbytes: what its weights, scales and bias take.

    Raises:
        ValueError: PyTorch has no `quantize_per_channel`, whose removal is announced; it says what to install.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        if not hasattr(torch, "quantize_per_channel"):
            raise ValueError(
                f"int8 on a CPU needs torch.quantize_per_channel, which PyTorch {torch.__version__} does not have: "
                f"pip install 'torch<=2.14.1'"
            )
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).double().clamp(min=torch.finfo(torch.float32).tiny) / 127
        zeros = torch.zeros(len(weight), dtype=torch.long)
        bias = None if linear.bias is None else linear.bias.detach().float()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deprecated")  # in favour of torchao, as said above
            weight = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, bias)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.nbytes = weight.numel() + 8 * len(weight) + 4 * (0 if bias is None else len(bias))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`, in float32."""
        # 7 bits: without VNNI, two products of 8 bits overflow the 16 bits that they are added in
        return torch.ops.quantized.linear_dynamic(features, self.packed, True)

    def _apply(self, fn, recurse=True):  # private, seen in torch 2.13 to 2.14
        moved = fn(torch.empty(0, dtype=torch.float32, device="cpu"))
        if (moved.device.type, moved.dtype) != ("cpu", torch.float32):
            raise RuntimeError("A model in int8 stays on the CPU and in float32; move it before.")
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # private, seen in torch 2.13 to 2.14
        raise RuntimeError(f"{prefix.rstrip('.')} is in int8, which is for answering only; save the model before.")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


@torch.no_grad()
def quantize_to_int8(model: nn.Module) -> nn.Module:
    """Compute a model's linear layers in int8, for speed: on a CPU of all parts, on CUDA of the vision tower.

    Layers that are quantized already stay as they are. On CUDA the tower is compiled at its first call, and again for
    each new number of images, which takes time. docs/speed.md says what int8 gains and loses. The language model of a
    large checkpoint may lose more, since a few of its features are far larger than the others (arXiv 2208.07339).

    Args:
        model: a model with its weights loaded, LLaVA or DeCo, changed in place. On a CPU also any part of one.

    Returns:
        The model. It can no longer be trained or saved. On a CPU all of it is in float32; on CUDA what was in float32
        is in bfloat16.

    Raises:
        ValueError: on CUDA torchao is missing, or the model is spread over devices.
    """
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) == 1 and min(devices).startswith("cuda"):
        return _quantize_tower_on_cuda(model)
    if devices != {"cpu"}:
        raise ValueError(f"int8 needs a model on a CPU or on one CUDA device, not on {' and '.join(sorted(devices))}.")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _is_plain(child):
                setattr(module, name, Int8Linear(child))
    return nn.Module.float(model).eval()  # not its own float, which refuses where a part is in 4 bits


def _is_plain(module, *_) -> bool:
    # subclasses are others' quantized layers, or compute in another way; torchao's are of weights
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _quantize_tower_on_cuda(model):
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise ValueError("int8 on CUDA needs torchao: pip install torchao") from None
    for parameter in model.parameters():  # not buffers: frequencies of rotary embeddings need float32
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)
    tower = model.base_model.vision_tower
    quantize_(tower, Int8DynamicActivationInt8WeightConfig(), filter_fn=_is_plain)
    tower.compile()  # without which each of torchao's steps is a kernel of its own, and slower than bfloat16
    return model.eval()
