"""Depthwise convolution whose gradients are fast in bfloat16 on CPUs.

oneDNN, which computes PyTorch's convolutions on CPUs, has fast bfloat16 kernels for the weight gradients of depthwise
convolutions with 3x3 kernels and for the input gradients of those with stride 1. Others take up to 20 times as long
(benchmarks/depthwise.py), so they are expressed by the fast ones here.

Shape legend: B batch, C channels, H W input, h w output, k side of the kernel.
"""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolve each channel with its own kernel, as `torch.nn.functional.conv2d` with as many groups as channels.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k), k odd.
        stride: Stride of both axes.
        padding: Zeros on each side, less than k.

    Returns:
        (B, C, h, w).
    """
    if torch.is_autocast_enabled("cpu"):
        x, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight))
    if not (x.device.type == "cpu" and x.dtype == torch.bfloat16 and torch.is_grad_enabled()):
        return F.conv2d(x, weight, None, stride, padding, 1, len(weight))
    result: Tensor = _DepthwiseConv2d.apply(x, weight, stride, padding)  # type: ignore[no-untyped-call]
    return result


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight, *_ = ctx.needs_input_grad
        grad_x = _input_gradient(gradient, x, weight, ctx.stride, ctx.padding) if wanted_x else None
        grad_weight = _weight_gradient(gradient, x, weight, ctx.stride, ctx.padding) if wanted_weight else None
        return grad_x, grad_weight, None, None


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The transposed convolution, of stride 1: with a larger one, of the gradient with zeros between its elements."""
    side = weight.shape[2]
    if stride > 1:
        spaced_size = [length + 2 * padding - side + 1 for length in x.shape[2:]]
        shape = (*gradient.shape[:2], *spaced_size)
        spaced = torch.empty(shape, dtype=gradient.dtype, memory_format=torch.channels_last).zero_()
        rows, columns = (slice(0, stride * (length - 1) + 1, stride) for length in gradient.shape[2:])
        spaced[:, :, rows, columns] = gradient
        gradient = spaced
    return F.conv2d(gradient, weight.flip(2, 3), None, 1, side - 1 - padding, 1, len(weight))


def _weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The gradients of overlapping 3x3 parts of the kernel: each is that of a 3x3 convolution of the shifted input."""
    side = weight.shape[2]
    if side > 3 and padding:
        x, padding = F.pad(x, (padding,) * 4), 0
    height, width = (stride * (length - 1) + 3 for length in gradient.shape[2:])
    result = torch.empty_like(weight)
    for top, left in product(range(0, max(side - 2, 1), 2), repeat=2):
        part = weight[:, :, top : top + 3, left : left + 3]
        shifted = x if side <= 3 else x[:, :, top : top + height, left : left + width]
        result[:, :, top : top + 3, left : left + 3] = torch.ops.aten.convolution_backward(
            gradient, shifted, part, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight),
            [False, True, False],
        )[1]  # fmt: skip
    return result
