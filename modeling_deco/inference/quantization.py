# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantization: NF4 to save memory, int8 for speed."""

import warnings
from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig


def nf4_config() -> BitsAndBytesConfig:
    """NF4 settings for bitsandbytes. Raise a ValueError if a library is missing."""
    missing = [name for name in ("accelerate", "bitsandbytes") if find_spec(name) is None]
    if missing:
        raise ValueError(f"--4bit needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    # GPUs are fastest in bfloat16, which is much finer than 4-bit weights. A CPU without bfloat16 instructions takes 2
    # to 5 times as long in it as in float32. On CPUs that have them, bitsandbytes uses bfloat16 in any case.
    compute_dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


class Int8Linear(nn.Module):
    """A linear layer on a CPU with int8 weights and one scale for each output.

    The inputs of each call are rounded to 7 bits with one scale. It does what PyTorch's deprecated `quantize_dynamic`
    does, with the same kernels (FBGEMM). On CPUs without VNNI its successor torchao is slower than float32, and
    PyTorch's `onednn.qlinear` is slower than these kernels (PyTorch 2.13 and 2.14).

    Attributes:
        nbytes: size of weights, scales and bias.

    Raises:
        ValueError: PyTorch has no `quantize_per_channel`; its removal is announced.
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
            warnings.filterwarnings("ignore", message=".*deprecated")  # in favour of torchao, see above
            weight = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, bias)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.nbytes = weight.numel() + 8 * len(weight) + 4 * (0 if bias is None else len(bias))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`, in float32."""
        # 7 bits: without VNNI, the sum of two 8-bit products overflows its 16 bits
        return torch.ops.quantized.linear_dynamic(features, self.packed, True)

    def _apply(self, fn, recurse=True):  # private, seen in torch 2.13 to 2.14
        moved = fn(torch.empty(0, dtype=torch.float32, device="cpu"))
        if (moved.device.type, moved.dtype) != ("cpu", torch.float32):
            raise RuntimeError("A model in int8 must stay on the CPU and in float32; move it before you quantize it.")
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # private, seen in torch 2.13 to 2.14
        raise RuntimeError(
            f"{prefix.rstrip('.')} is in int8 and cannot be saved; save the model before you quantize it."
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


@torch.no_grad()
def quantize_to_int8(model: nn.Module) -> nn.Module:
    """Compute a model's linear layers in int8, for speed: on a CPU of all parts, on CUDA of the vision tower.

    Convolutions are not quantized. EfficientNet, MobileNet, ResNet and RegNet have no other layers, so such a vision
    tower stays as it is. ConvNeXt does most of its work in linear layers.

    Layers that are quantized already stay as they are. On CUDA the tower is compiled at its first call, and again for
    each new number of images, which takes time. docs/speed.md says what int8 gains and loses. The language model of a
    large checkpoint may lose more, since a few of its features are far larger than the others (arXiv 2208.07339).

    Args:
        model: a LLaVA or DeCo with its weights loaded, which is changed in place. On a CPU, also a part of a model.

    Returns:
        The model, which can no longer be trained or saved. On a CPU its other parts are in float32. On CUDA parts that
        were in float32 are in bfloat16.

    Raises:
        ValueError: torchao is missing on CUDA, or the model is spread over several devices.
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
    return nn.Module.float(model).eval()  # the model's own `float` refuses to run if a part is in 4 bits


def _is_plain(module, *_) -> bool:
    # subclasses of Linear are quantized already or compute differently; torchao has subclasses of weights
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _quantize_tower_on_cuda(model):
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise ValueError("int8 on CUDA needs torchao: pip install torchao") from None
    # not all buffers: the frequencies of rotary embeddings need float32
    statistics = [module.named_buffers() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for tensor in (*model.parameters(), *(buffer for named in statistics for _, buffer in named)):
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.to(torch.bfloat16)
    tower = model.base_model.vision_tower
    quantize_(tower, Int8DynamicActivationInt8WeightConfig(), filter_fn=_is_plain)
    tower.compile()  # otherwise each step of torchao is a separate kernel, and slower than bfloat16
    return model.eval()
