"""Linear layers of torchao with fp8 weights, and activations scaled to fp8 row by row as they come.

Imported when a preset asks for it, so that the pack runs without the package. The product is one fp8 kernel
(``torch._scaled_mm``), which either runs or raises. Dynamic scaling is fast only when it is compiled.
"""

import torch
from torch import nn
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8Tensor, PerRow, quantize_
from torchao.quantization.quantize_.common import KernelPreference

from .devices import multiplies_fp8_by_row
from .errors import LongCatError
from .precision import Preset

# torch's kernel, so that an installed kernel package changes no result; and none of torchao's compiler settings,
# which hold for the whole process (before 0.18 they lowered the precision of every float32 product in it).
_CONFIG = Float8DynamicActivationFloat8WeightConfig(
    granularity=PerRow(), kernel_preference=KernelPreference.TORCH, set_inductor_config=False
)


def require(preset: Preset, device: torch.device) -> None:
    """Refuse a device without fp8 products that are scaled by row; a CPU has none.

    Raises:
        LongCatError: the device is none of NVIDIA Ada or newer, AMD MI300 or newer.
    """
    if multiplies_fp8_by_row(device):
        return
    raise LongCatError(
        f"The precision '{preset.name}' needs a GPU that multiplies in fp8 (NVIDIA Ada or newer, AMD MI300 or newer), "
        f"which '{device}' is not. Choose bf16 or int8-quanto, or fp8 or int8 of the core engine.",
        f"精度“{preset.name}”需要支持 fp8 乘法的 GPU（NVIDIA Ada 或更新，AMD MI300 或更新），而“{device}”不支持。"
        "请选择 bf16、int8-quanto，或 core 引擎的 fp8、int8。",
    )


def quantised(layer: nn.Linear, preset: Preset) -> nn.Linear:
    """``layer`` with an fp8 weight in its place, on its device.

    Raises:
        LongCatError: the layer is not bf16, the only dtype that the product gives.
    """
    if layer.weight.dtype is not torch.bfloat16:
        found = str(layer.weight.dtype).removeprefix("torch.")
        raise LongCatError(
            f"The precision '{preset.name}' quantises bf16 weights, but they are {found} here.",
            f"精度“{preset.name}”只能量化 bf16 权重，而此处为 {found}。",
        )
    quantize_(layer, _CONFIG)
    return layer


def outline(layer: nn.Linear, preset: Preset) -> torch.Tensor:
    """The weight that :func:`quantised` gives, without storage as that of ``layer``; no kernel is needed for it."""
    weight: torch.Tensor = Float8Tensor.from_hp(layer.weight, torch.float8_e4m3fn, PerRow())
    return weight


def took(layer: nn.Module, preset: Preset) -> bool:
    """Whether the weight is fp8 with a scale for each row, and activations are scaled to fp8 as well."""
    weight = layer.weight
    return (
        isinstance(weight, Float8Tensor)
        and weight.qdata.dtype is torch.float8_e4m3fn
        and weight.scale.shape == (weight.shape[0], 1)
        and weight.act_quant_kwargs is not None
    )


def dequantised(weight: Float8Tensor) -> torch.Tensor:
    """A weight in bf16."""
    plain: torch.Tensor = weight.dequantize()
    return plain
