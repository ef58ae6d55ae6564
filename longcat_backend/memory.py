"""What a component weighs, what ``auto`` picks for a device, and diffusers' group offload as one setting."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import precision
from .errors import LongCatError
from .modulation import is_modulation
from .precision import Preset

GIB = 2**30
MIB = 2**20
_STREAMING = ("cuda", "xpu")
# In the text of a RuntimeError: of MPS and CUDA, of cuBLAS, and of the CPU.
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
HOST_RESERVE = 4 * GIB  # for the host program and everything else that runs beside it


def size(count: int) -> str:
    """Bytes in words: GiB, or MiB below one of them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host beside it, had no memory left.

    CUDA and XPU have an exception for that; MPS, a CUDA driver without memory, cuBLAS and the CPU raise a plain
    RuntimeError, or PyTorch's AcceleratorError, which is one.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OUT_OF_MEMORY)


@dataclass(frozen=True)
class Weights:
    """Bytes of a component's weights."""

    device: int  # on the device while it works, as far as they fit
    host: int = 0  # modulation weights, which stay on the CPU

    @property
    def total(self) -> int:
        """All of them."""
        return self.device + self.host


def weigh(
    shapes: Mapping[str, torch.Size], component: str, preset: Preset, dtype: torch.dtype, tabulate: bool
) -> Weights:
    """Bytes of a component in a precision, from the shapes in its files.

    Args:
        shapes: by tensor name, official or as ComfyUI's class names them.
        dtype: of the weights that the preset leaves alone.
    """
    device = host = 0
    for key, shape in shapes.items():
        layer, _, kind = key.rpartition(".")
        packed = preset.backend and kind == "weight" and precision.is_quantised(component, layer)
        stored = shape.numel() * preset.bits // 8 if packed else shape.numel() * dtype.itemsize
        if tabulate and is_modulation(layer):
            host += stored
        else:
            device += stored
    return Weights(device, host)


def auto_precision(exact: Preset, lossy: Iterable[Preset], weights: Mapping[str, int], host_free: int) -> Preset:
    """The precision that ``auto`` takes: the exact one wherever it fits.

    A device of any size runs it, since weights that do not fit there are streamed from the host, at a cost of some
    percent (benchmarks/results/memory.json). So only a host that cannot hold them asks for a lossy one.

    Args:
        lossy: in the order of preference; only those that the device has kernels for.
        weights: bytes by precision name, of everything that the host has to hold.
        host_free: bytes that the host can still hold.
    """
    for preset in (exact, *lossy):
        if weights[preset.name] + HOST_RESERVE <= host_free:
            return preset
    return min((exact, *lossy), key=lambda preset: weights[preset.name])


@dataclass(frozen=True)
class GroupOffload:
    """diffusers' group offload: weights come to the device group by group.

    Source: ``apply_group_offloading`` in diffusers.
    """

    level: str  # "block" or "leaf"
    blocks: int = 1  # in a group, at block level
    stream: bool = True  # copy the next group while this one computes
    host: str = "pinned"  # "pinned", "low" (pinned only while copied) or "disk"

    def check(self) -> None:
        """Refuse settings that diffusers would change or fail on.

        Raises:
            LongCatError: streams were asked for with several blocks in a group.
        """
        if self.stream and self.level == "block" and self.blocks != 1:
            raise LongCatError(
                f"Group offload with a stream copies one block at a time, but {self.blocks} blocks per group are set. "
                "Set blocks_per_group to 1, or switch stream off.",
                f"使用流的分组卸载一次只复制一个块，而每组设为 {self.blocks} 块。请把每组块数设为 1，或关闭流。",
            )

    def apply(self, model: nn.Module, device: torch.device, folder: Path) -> None:
        """Hook the model, whose weights are on the CPU, so that each group is on the device while it computes.

        Args:
            folder: an empty one, for ``host`` "disk".

        Raises:
            LongCatError: see :meth:`check`; or the device has nothing to offload from, or no streams.
        """
        self.check()
        if device.type not in (_STREAMING if self.stream else (*_STREAMING, "mps")):
            kind = (" with a stream", "使用流的") if self.stream else ("", "")
            raise LongCatError(
                f"Group offload{kind[0]} does not work on this device ({device}). Switch group offload off.",
                f"此设备（{device}）不支持{kind[1]}分组卸载。请关闭分组卸载。",
            )
        from diffusers.hooks import apply_group_offloading

        settings: dict[str, Any] = {
            "offload_type": f"{self.level}_level",
            "num_blocks_per_group": self.blocks if self.level == "block" else None,
            "use_stream": self.stream,
            "record_stream": self.stream,
            "non_blocking": self.stream,
            "low_cpu_mem_usage": self.host == "low",
            "offload_to_disk_path": str(folder) if self.host == "disk" else None,
        }
        apply_group_offloading(model, onload_device=device, offload_device=torch.device("cpu"), **settings)
