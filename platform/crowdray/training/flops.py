"""FLOPs of a training window, peak matmul throughput of the device, and peak memory."""

import resource
import time
from collections.abc import Collection, Sequence
from functools import cache

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


def flops_per_window(counter: Counter, tasks: Collection[str], size: Sequence[int], *, frozen_encoder: bool) -> int:
    """Count the FLOPs of the forward and backward pass of one window; a multiply-add is two.

    The encoder's backward pass counts as twice its forward pass (Chowdhery et al. 2022, appendix B), recomputed
    activations do not count: torch takes the backward pass of a grouped convolution for that of a full one. Decoders
    have none; with a frozen encoder, their first layers need no gradient of their inputs. Leaves the counter in
    evaluation mode, and gradients untouched.

    Args:
        size: (H, W) of the window in pixels.
    """
    counter.eval()
    image = torch.zeros(1, 3, *size, device=counter.mean.device)
    # Its methods are never the compiled call, which hides its operations.
    with torch.no_grad(), FlopCounterMode(display=False) as encoder:
        features = counter.features(image)
    features.requires_grad_(not frozen_encoder)
    differentiated = [tensor for tensor in (features, *counter.decoders.parameters()) if tensor.requires_grad]
    with FlopCounterMode(display=False) as decoders:
        outputs = counter.decode(features.clone(), tasks, size)  # torch's counter rejects a leaf
        total = torch.stack([output.sum() for output in outputs.values()]).sum()
        torch.autograd.grad(total, differentiated, allow_unused=True)
    return int((1 if frozen_encoder else 3) * encoder.get_total_flops() + decoders.get_total_flops())


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
