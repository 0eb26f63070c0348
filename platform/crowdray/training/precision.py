"""Numeric precision: bf16, TensorFloat-32, compilation and compressed gradients."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from crowdray.errors import InfeasibleConfigError


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return fp32 or bf16; auto resolves to bf16 where the device multiplies bf16 matrices natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16")) else "fp32"


def set_tf32(enabled: bool, device: torch.device) -> None:
    """Allow or forbid TensorFloat-32 in the GPU convolutions and matrix products of this process.

    torch's own default allows it in cuDNN.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if enabled else "highest")
        torch.backends.cudnn.allow_tf32 = enabled


@contextmanager
def full_fp32() -> Iterator[None]:
    """Disable TensorFloat-32 within a block: for targets and for evaluation."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


def require_compiler(compile: str) -> None:
    """Raise InfeasibleConfigError if torch.compile needs a C++ compiler that is missing.

    torch itself would fail after the first batch, with a message about its internals.
    """
    named = [os.environ.get(name, "") for name in ("CXX", "CC")]
    if compile != "no" and not any(map(shutil.which, [*filter(None, named), "g++", "gcc", "clang++", "clang"])):
        raise InfeasibleConfigError(
            f"numerics.compile is {compile}, but torch.compile found no C++ compiler on this machine; install g++ or "
            "set --numerics.compile no"
        )


def bf16_allreduce_hook(group: ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average the gradients of all ranks in bf16.

    A wrapper: DDP rejects torch's own hook by its name on backends other than NCCL.
    """
    return bf16_compress_hook(group, bucket)  # type: ignore[arg-type]
