"""What ComfyUI knows of a device, as a policy."""

from functools import lru_cache

import comfy.model_management as host
import torch

from ..devices import DevicePolicy

_TORCHAO_ROCM = ("gfx94", "gfx95")  # MI300 and MI350
_TORCHAO_CUDA = (8, 9)
_MACOS_WITH_BF16 = (14,)


def policy(device: torch.device | None = None) -> DevicePolicy:
    """The policy of a device, by default the one that ComfyUI computes on."""
    chosen = host.get_torch_device() if device is None else device
    kind = _kind(chosen)
    return DevicePolicy(
        device=chosen,
        kind=kind,
        bf16=bool(host.should_use_bf16(chosen)),
        fp16=bool(host.should_use_fp16(chosen, prioritize_performance=False)),
        bf16_storage=not (kind == "other" or (kind == "mps" and host.mac_version() < _MACOS_WITH_BF16)),
        float64=bool(host.supports_fp64(chosen)),
        fp8_products=kind in ("cuda", "rocm") and bool(host.supports_fp8_compute(chosen)),
        int8_products=_multiplies_int8(chosen),
        torchao_fp8=_runs_torchao_fp8(chosen, kind),
        non_blocking=kind != "cpu" and bool(host.device_supports_non_blocking(chosen)),
    )


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return "rocm" if torch.version.hip else "cuda"
    return device.type if device.type in ("xpu", "mps", "cpu") else "other"


@lru_cache
def _multiplies_int8(device: torch.device) -> bool:
    """Asked of torch itself: MPS and some old cards have no kernel, and later releases of torch bring more."""
    matrix = torch.zeros(32, 32, dtype=torch.int8, device=device)
    try:
        torch._int_mm(matrix, matrix)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _runs_torchao_fp8(device: torch.device, kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= _TORCHAO_CUDA
    if kind == "rocm":
        architecture: str = torch.cuda.get_device_properties(device).gcnArchName
        return architecture.startswith(_TORCHAO_ROCM)
    return kind == "xpu"
