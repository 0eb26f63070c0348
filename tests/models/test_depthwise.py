"""Gradients of the depthwise convolution against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crowdray.models.depthwise import depthwise_conv2d


def integers(*shape: int, seed: int) -> Tensor:
    """Integers from -1 to 1: their sums in the tests are exact in bfloat16."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [(9, 8), (12, 7)])
def test_gradients_are_those_of_conv2d(size: tuple[int, int], side: int, stride: int, padded: bool) -> None:
    x = integers(2, 3, *size, seed=0).contiguous(memory_format=torch.channels_last)
    weight, padding = integers(3, 1, side, side, seed=1), side // 2 if padded else 0
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        if dtype == torch.bfloat16:
            y = depthwise_conv2d(leaves[0], leaves[1], stride, padding)
            assert y.grad_fn is not None and "Depthwise" in y.grad_fn.name()
        else:
            y = F.conv2d(leaves[0], leaves[1], None, stride, padding, 1, 3)
        gradient = integers(*y.shape, seed=2).to(dtype)
        results.append([y, *torch.autograd.grad(y, leaves, gradient)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0)


def test_autocast_computes_in_bfloat16_and_returns_float32_gradients() -> None:
    x, weight = integers(1, 4, 6, 6, seed=3).requires_grad_(), integers(4, 1, 5, 5, seed=4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = depthwise_conv2d(x, weight, 2, 2), F.conv2d(x, weight, None, 2, 2, 1, 4)
    assert y.dtype == expected.dtype == torch.bfloat16 and y.equal(expected)
    for actual, wanted in zip(*(torch.autograd.grad(z.sum(), (x, weight)) for z in (y, expected)), strict=True):
        assert actual.dtype == torch.float32 and actual.equal(wanted)


def test_without_gradients_it_is_conv2d_for_export() -> None:
    x, weight = integers(1, 4, 6, 6, seed=5).bfloat16(), integers(4, 1, 3, 3, seed=6).bfloat16().requires_grad_()
    with torch.no_grad():
        assert depthwise_conv2d(x, weight, 1, 1).equal(F.conv2d(x, weight, None, 1, 1, 1, 4))
