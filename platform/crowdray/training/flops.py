"""How near a training comes to what its device can do: operations, matrix rate and memory, counted and measured."""

import resource
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from functools import cache
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from crowdray.models.counter import Counter

_SIDES = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices whose product is timed: large enough that starting it costs nothing."""
_REPEATS = 5


@cache
def peak_matmul_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of the product of two large matrices: the best of a few, measured once per process.

    `threads` is what torch uses on a CPU; it is here because the answer depends on it.
    """
    side = _SIDES.get(device.type, 1024)
    generator = torch.Generator(device).manual_seed(0)  # a product of ones takes less power, and so less time
    left, right = (torch.randn(side, side, generator=generator, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(_REPEATS):
        wait(device)
        started = time.perf_counter()
        left @ right
        wait(device)
        times.append(time.perf_counter() - started)
    if device.type == "cuda":  # what the training takes is measured on, without these matrices
        del left, right
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * side**3 / min(times)


def operations_per_window(
    counter: Counter,
    tasks: Collection[str],
    size: Sequence[int],
    *,
    frozen_encoder: bool,
    autocast: AbstractContextManager[object],
) -> int:
    """FLOPs (a multiplication and an addition are two) of training on one window of size (H, W), backward pass too.

    Counts what torch really runs, on a grey window, but for activations that are computed twice; no parameter gets a
    gradient, and no random number is drawn.
    """
    device = counter.mean.device
    trained = [parameter for parameter in counter.parameters() if parameter.requires_grad]
    image = torch.zeros(1, 3, *size, device=device)
    modes = {module: module.training for module in counter.modules()}
    activation_checkpointing, counter.activation_checkpointing = counter.activation_checkpointing, False
    counter.eval()
    try:
        with FlopCounterMode(display=False, custom_mapping=_COUNTED_HERE) as counted:
            with autocast:
                # Never the compiled one, which hides its operations.
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
    wanted: Sequence[bool],
    **_shapes: object,
) -> int:
    """FLOPs of a convolution's gradients, from shapes: those of its inputs and of its weights cost a forward pass each.

    torch's own count forgets that a group sees its own channels alone, sixteenfold and more for depthwise ones.
    """
    cells = prod((inputs if transposed else gradient)[2:])
    return 2 * gradient[0] * cells * prod(weight) * (wanted[0] + wanted[1])


_COUNTED_HERE = {torch.ops.aten.convolution_backward: _convolution_backward}


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: by torch on a GPU, since `matrix_rate` there, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
