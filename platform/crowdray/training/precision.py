"""How numbers are computed: the arithmetic that a device is fastest in."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from crowdray.errors import InfeasibleConfigError


def resolve_precision(precision: str, device: torch.device) -> str:
    """fp32 or bf16: auto takes bf16 where the device multiplies bf16 matrices natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16")) else "fp32"


def set_products(tf32: bool, device: torch.device) -> None:
    """Let fp32 convolutions and matrix products of a GPU round their factors to TensorFloat-32, or not, in this
    process. torch's own default is to let cuDNN do so."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def full_products() -> Iterator[None]:
    """Whatever `set_products` allows, full fp32 for a block: for targets and for what is told of a counter."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


def require_compiler(compile: str) -> None:
    """Raise SettingsError where torch.compile would find no compiler, after the first batch and in words of its own."""
    named = [os.environ.get(name, "") for name in ("CXX", "CC")]
    if compile != "no" and not any(map(shutil.which, [*filter(None, named), "g++", "gcc", "clang++", "clang"])):
        raise InfeasibleConfigError(
            f"numerics.compile is {compile}, and torch.compile calls a C++ compiler that this machine does not have; "
            "install g++, or give --numerics.compile no"
        )


def bf16_allreduce_hook(group: ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The mean of the ranks' gradients, each rounded to bf16 on the way. torch's own hook, under a name by which it is
    not refused where another library than NCCL sums."""
    return bf16_compress_hook(group, bucket)  # type: ignore[arg-type]
