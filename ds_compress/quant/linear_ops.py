"""The linear ops inside the layers that can be quantized, with their gradients written out.

Written out because forward does not save the quantized input and weight: backward makes them again, one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F


class LinearOp(Protocol):
    """`forward(x, weight, bias)` and its gradients, all tensors in one dtype.

    `input_gradient` gets the shape of x; of its weight, `weight_gradient` reads the shape only.
    """

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...

    def input_gradient(self, grad: torch.Tensor, shape: torch.Size, weight: torch.Tensor) -> torch.Tensor: ...

    def weight_gradient(self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...

    def bias_gradient(self, grad: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class DenseOp:
    """x `[..., in]`, weight `[out, in]`."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, grad: torch.Tensor, shape: torch.Size, weight: torch.Tensor) -> torch.Tensor:
        return _as_rows(grad).mm(weight).view(shape)

    def weight_gradient(self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _as_rows(grad).t().mm(_as_rows(x))

    def bias_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        return _as_rows(grad).sum(0)


@dataclass(frozen=True)
class Conv1dOp:
    """x `[..., in]`, weight `[in, out]`: the Conv1D of GPT-2."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = _as_rows(x)
        y = rows.mm(weight) if bias is None else torch.addmm(bias, rows, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    def input_gradient(self, grad: torch.Tensor, shape: torch.Size, weight: torch.Tensor) -> torch.Tensor:
        return _as_rows(grad).mm(weight.t()).view(shape)

    def weight_gradient(self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _as_rows(x).t().mm(_as_rows(grad))

    def bias_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        return _as_rows(grad).sum(0)


@dataclass(frozen=True)
class Conv2dOp:
    """x `[N, in, H, W]` or `[in, H, W]`, weight `[out, in / groups, kh, kw]`.

    `extra_padding`: zeros (left, right, top, bottom) beyond the symmetric `padding`, for padding="same".
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    extra_padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv2d(self._padded(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, grad: torch.Tensor, shape: torch.Size, weight: torch.Tensor) -> torch.Tensor:
        x = self._padded(grad.new_empty(1).expand(shape))  # only its shape is read
        grad_x = self._backward(grad, x, weight, (True, False, False))[0]
        if any(self.extra_padding):
            grad_x = F.pad(grad_x, tuple(-extra for extra in self.extra_padding))
        return grad_x.view(shape)

    def weight_gradient(self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._backward(grad, self._padded(x), weight.to(grad.dtype), (False, True, False))[1]

    def bias_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        return grad.sum((0, 2, 3) if grad.dim() == 4 else (1, 2))

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, self.extra_padding) if any(self.extra_padding) else x

    def _backward(
        self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor, ...]:
        if grad.dim() == 3:
            grad, x = grad.unsqueeze(0), x.unsqueeze(0)
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, (0, 0), self.groups, mask
        )


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
