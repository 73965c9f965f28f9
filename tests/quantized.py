"""Models whose linears keep their weights as 8-bit integers and scales, with nothing but PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Linear):
    """Rows of integers, each with its scale; nothing that could be trained."""

    def __init__(self, of: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        scale = of.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((of.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = of.bias

    @property
    def dense(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.dense, self.bias)


def quantized(model: Any, kind: Any = Int8Linear) -> Any:
    """``model`` with each linear of its layers replaced by one of that ``kind``, in place."""
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, kind(child))
    return model
