"""Models whose linears are quantized: by a module that takes PyTorch alone, and by libraries where there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Linear):
    """Rows of 8-bit integers, each with its scale; nothing that could be trained."""

    def __init__(self, of: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        scale = of.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((of.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = of.bias

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(self.scale.dtype) * self.scale, self.bias)


def int8(model: Any, kind: Callable[[nn.Linear], nn.Module] = Int8Linear) -> Any:
    """``model`` with each linear of its layers replaced, in place."""
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, kind(child))
    return model


def nf4(model: Any) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def made(of: nn.Linear) -> nn.Module:
        linear = bitsandbytes.nn.Linear4bit(of.in_features, of.out_features, bias=False, quant_type="nf4")
        linear.load_state_dict(of.state_dict())
        return linear.to("cpu")

    return int8(model, made)


def llm_int8(model: Any) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def made(of: nn.Linear) -> nn.Module:
        linear = bitsandbytes.nn.Linear8bitLt(of.in_features, of.out_features, bias=False, has_fp16_weights=False)
        linear.load_state_dict(of.state_dict())
        return linear.to("cpu")

    return int8(model, made)


def torchao_int8(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model.layers, quantization.Int8WeightOnlyConfig())
    return model


QUANTIZERS = (int8, nf4, llm_int8, torchao_int8)


def bits(model: Any) -> dict[str, Tensor]:
    """All that a model keeps, copied; those of torchao dequantized, as they cannot be compared."""
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    plain = {name: x.dequantize() if hasattr(x, "qdata") else x for name, x in kept.items()}
    return {name: x.detach().clone() for name, x in plain.items()}


def same(model: Any, before: dict[str, Tensor]) -> bool:
    now = bits(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], x) for name, x in before.items())
