"""How numbers are computed: the arithmetic that a device is fastest in."""

import torch


def resolve_precision(precision: str, device: torch.device) -> str:
    """fp32 or bf16: auto takes bf16 where the device multiplies bf16 matrices natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16")) else "fp32"
