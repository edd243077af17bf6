"""Linear layers with weights in the order that the CPU's bfloat16 kernels want, put so once instead of at each call."""

import torch
from torch import nn

_ROWS_HINT = 32
"""Rows of input that the layout is chosen for. Measured: this one is good from 1 to 1024, layouts for 1 are not."""


class PackedLinear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """What `linear` computes, faster for few rows: its weights are read once, in the order they lie."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            hidden, self.weight, self.bias, "none", [], ""
        )
        return output


def pack_linears(model: nn.Module) -> None:
    """Replace every plain linear layer in bfloat16 by a packed one, where this CPU and build have the kernels."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16:
                setattr(module, name, PackedLinear(child))
