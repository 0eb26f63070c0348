"""FLOPs of a training window, peak matmul throughput of the device, and peak memory."""

import resource
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from functools import cache
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from crowdray.models.counter import Counter

_MATRIX_SIDES = {"cpu": 1024, "cuda": 8192}
"""Side of the timed square matrices: large enough that launch overhead is negligible."""
_REPEATS = 5


@cache
def peak_matmul_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Measure the FLOP/s of a large matrix product: the best of a few, once per process.

    Args:
        threads: CPU threads of torch; part of the cache key, as the result depends on it.
    """
    side = _MATRIX_SIDES.get(device.type, 1024)
    generator = torch.Generator(device).manual_seed(0)  # a product of ones draws less power and runs faster
    left, right = (torch.randn(side, side, generator=generator, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(_REPEATS):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - started)
    if device.type == "cuda":  # keep these matrices out of the training run's peak memory
        del left, right
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * side**3 / min(times)


def flops_per_window(
    counter: Counter,
    tasks: Collection[str],
    size: Sequence[int],
    *,
    frozen_encoder: bool,
    autocast: AbstractContextManager[object],
) -> int:
    """Count the FLOPs of the forward and backward pass of one window; a multiply-add is two.

    Counts the operations that torch runs on a grey window, except recomputed activations. Leaves gradients and
    random number generators untouched.

    Args:
        size: (H, W) of the window in pixels.
    """
    device = counter.mean.device
    trained = [parameter for parameter in counter.parameters() if parameter.requires_grad]
    image = torch.zeros(1, 3, *size, device=device)
    modes = {module: module.training for module in counter.modules()}
    activation_checkpointing, counter.activation_checkpointing = counter.activation_checkpointing, False
    counter.eval()
    try:
        with FlopCounterMode(display=False, custom_mapping=_CUSTOM_FLOPS) as counted:
            with autocast:
                # `forward` is never the compiled call, which hides its operations.
                outputs = counter.forward(image, tasks, None, frozen_encoder)
            total = torch.stack([output.float().sum() for output in outputs.values()]).sum()
            torch.autograd.grad(total, trained, allow_unused=True)
    finally:
        counter.activation_checkpointing = activation_checkpointing
        for module, training in modes.items():
            module.training = training
    return int(counted.get_total_flops())


def _convolution_backward(
    gradient: Sequence[int],
    inputs: Sequence[int],
    weight: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    output_mask: Sequence[bool],
    **_shapes: object,
) -> int:
    """FLOPs of a convolution's gradients: one forward pass each for its inputs and its weights.

    torch's own count ignores groups, and is 16 times too high and more for depthwise convolutions.
    """
    cells = prod((inputs if transposed else gradient)[2:])
    return 2 * gradient[0] * cells * prod(weight) * (output_mask[0] + output_mask[1])


_CUSTOM_FLOPS = {torch.ops.aten.convolution_backward: _convolution_backward}


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes in use: by torch on a GPU, by the whole process on a CPU.

    On a GPU the peak is that since the last `peak_matmul_flops` measurement.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
