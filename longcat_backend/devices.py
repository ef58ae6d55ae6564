"""One policy for each device: what it can hold, what it computes in, and what it must be spared."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .errors import LongCatError
from .precision import PRESETS, Preset

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
DOUBLE = frozenset({torch.float64, torch.complex128})
# What products in a format need.
_KERNELS = {
    "float8_e4m3fn": (
        "products of 8-bit floats need NVIDIA Ada or newer, or AMD RDNA4 or MI350",
        "8 位浮点乘法需要 NVIDIA Ada 或更新的显卡，或 AMD RDNA4、MI350",
    ),
    "int8_tensorwise": (
        "comfy-kitchen's int8 kernels need PyTorch for CUDA 13, or ComfyUI's --enable-triton-backend",
        "comfy-kitchen 的 int8 内核需要 CUDA 13 版 PyTorch，或 ComfyUI 的 --enable-triton-backend",
    ),
    "float8_dynamic_rowwise": (
        "products of 8-bit floats scaled by row need NVIDIA Ada or newer, or AMD MI300 or newer",
        "按行缩放的 8 位浮点乘法需要 NVIDIA Ada 或更新的显卡，或 AMD MI300 或更新的显卡",
    ),
}
_ADA = (8, 9)
_INSTINCT = ("gfx94", "gfx95")  # MI300 and MI350


def multiplies_fp8_by_row(device: torch.device) -> bool:
    """Whether the device has fp8 products with a scale for each row: NVIDIA Ada or newer, AMD MI300 or newer."""
    if device.type != "cuda":
        return False
    if torch.version.hip:
        architecture: str = torch.cuda.get_device_properties(device).gcnArchName
        return architecture.startswith(_INSTINCT)
    return torch.cuda.get_device_capability(device) >= _ADA


@dataclass(frozen=True)
class DevicePolicy:
    """What is known of one device; everything that depends on it is answered here.

    Positions are float32 and rotary tables are made on the host (:mod:`rotary`) whatever the device, so that
    ``float64`` decides nothing but what may be moved there.
    """

    device: torch.device
    kind: str  # "cuda", "rocm", "xpu", "mps", "cpu" or "other"
    bf16: bool  # computes in it, and not only through another dtype
    fp16: bool
    bf16_storage: bool  # tensors of it can exist there
    float64: bool
    products: frozenset[str]  # the formats of presets that it multiplies in, see precision.Preset.format

    def compute_dtype(self, component: str) -> torch.dtype:
        """The dtype that the device computes a component in, if nothing else is asked for: bf16 where it can.

        Without bf16 the transformer takes fp16, as the class that diffusers has for it clips to fp16's range.
        The text encoder takes fp32: it was trained in bf16, nothing clips it, and a NaN blackens the picture.
        """
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 and component == "transformer" else torch.float32

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether a tensor of that dtype can exist on the device."""
        if dtype in DOUBLE:
            return self.float64
        if dtype in FLOAT8:
            return self.kind not in ("mps", "other")
        return dtype != torch.bfloat16 or self.bf16_storage

    def supports(self, preset: Preset, weight_only: bool = True) -> bool:
        """Whether a component can be loaded and run in a preset; see :meth:`require`."""
        return self._obstacle(preset, weight_only) is None

    def require(self, preset: Preset, among: Iterable[str], weight_only: bool = True) -> None:
        """Refuse a preset that the device cannot hold or run.

        Args:
            among: names of the presets that the component has, to name those that the device can run.
            weight_only: weights of ComfyUI's formats are unpacked when they are used, so that the device needs no
                products of them.

        Raises:
            LongCatError: with the reason and the alternatives.
        """
        obstacle = self._obstacle(preset, weight_only)
        if obstacle is None:
            return
        others = ", ".join(name for name in among if self.supports(PRESETS[name], weight_only))
        raise LongCatError(
            f"The precision '{preset.name}' cannot be used on this device ({self.device}): {obstacle[0]}. "
            f"Choose one of: {others}.",
            f"此设备（{self.device}）不能使用精度“{preset.name}”：{obstacle[1]}。请选择：{others}。",
        )

    def _obstacle(self, preset: Preset, weight_only: bool) -> tuple[str, str] | None:
        """Why a preset cannot be used, in both languages."""
        if preset.dtype is not None and not self.holds(preset.dtype):
            return f"it has no {preset.name}", f"该设备没有 {preset.name}"
        if preset.format.startswith("float8") and not self.holds(torch.float8_e4m3fn):
            return "it cannot hold 8-bit floats", "该设备不能存放 8 位浮点数"
        if preset.format == "qint4" and self.kind == "mps":
            return "quanto would have to compile its 4-bit kernel with Xcode", "quanto 需要用 Xcode 编译 4 位内核"
        # ComfyUI's formats have reference kernels for the CPU; elsewhere they would be slower than plain weights.
        optional = preset.backend == "kitchen" and (weight_only or self.kind == "cpu")
        if preset.format in _KERNELS and preset.format not in self.products and not optional:
            return _KERNELS[preset.format]
        return None
