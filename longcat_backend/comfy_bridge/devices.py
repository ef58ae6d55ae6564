"""What ComfyUI knows of a device, as a policy."""

import comfy.model_management as host
import comfy_kitchen
import torch

from ..devices import DevicePolicy, multiplies_fp8_by_row

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
        products=_products(chosen, kind),
    )


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return "rocm" if torch.version.hip else "cuda"
    return device.type if device.type in ("xpu", "mps", "cpu") else "other"


def _products(device: torch.device, kind: str) -> frozenset[str]:
    runs = {
        "float8_e4m3fn": kind in ("cuda", "rocm") and host.supports_fp8_compute(device),
        "int8_tensorwise": comfy_kitchen.registry.get_capable_backend("int8_linear") != "eager",
        "float8_dynamic_rowwise": multiplies_fp8_by_row(device),
    }
    return frozenset(name for name, does in runs.items() if does and kind != "cpu")
