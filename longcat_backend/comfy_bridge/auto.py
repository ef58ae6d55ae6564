"""What ``auto`` means here and now: engine, precision and residency, from the device and its free memory."""

import logging
from collections.abc import Sequence

import comfy.model_management
import torch
from comfy.cli_args import args

from .. import memory, precision, quantisation, quantised_state, text_encoder, transformer
from ..checkpoints import Checkpoint
from ..devices import DevicePolicy
from ..errors import LongCatError
from ..memory import GroupOffload
from ..precision import PRESETS, Preset
from . import devices

logger = logging.getLogger(__name__)

_LOSSY = "int8"  # the one that both the core engine and the encoder have kernels for on most cards
_PARTS = ("transformer", "text_encoder")
_SHAPES = {"transformer": transformer.audited_shapes, "text_encoder": text_encoder.audited_shapes}
_DTYPES = {"transformer": transformer.stored_dtype, "text_encoder": text_encoder.stored_dtype}


def settled(checkpoint: Checkpoint, component: str, name: str, engine: str = precision.AUTO) -> str:
    """The precision of a choice, or that in which the checkpoint holds the component quantised.

    Args:
        name: of a preset, or "auto".
        engine: the one that was chosen for the transformer.

    Raises:
        LongCatError: the checkpoint holds the component in another precision, or in one of the other engine.
    """
    stored = quantised_state.stored_preset(checkpoint, component)
    if stored is None:
        return name
    if name not in (precision.AUTO, stored.name):
        raise LongCatError(
            f"The {component} of this checkpoint is stored in {stored.name} and cannot be loaded as {name}. Set its "
            f"precision to auto or {stored.name}, or choose the checkpoint that this one was made from.",
            f"此检查点的 {component} 以 {stored.name} 存储，无法以 {name} 加载。请把它的精度设为 auto 或 "
            f"{stored.name}，或使用它的来源检查点。",
        )
    if stored.name not in precision.ENGINE_PRESETS.get(engine, (stored.name,)):
        raise LongCatError(
            f"The {component} of this checkpoint is stored in {stored.name}, which the engine {engine} does not have. "
            "Set engine to auto or diffusers.",
            f"此检查点的 {component} 以 {stored.name} 存储，{engine} 引擎没有该精度。请把引擎设为 auto 或 diffusers。",
        )
    return stored.name


def dtype(checkpoint: Checkpoint, component: str, chosen: Preset, policy: DevicePolicy) -> torch.dtype:
    """The dtype of the computation: that of the files where they are quantised, else the preset's or the device's.

    Raises:
        LongCatError: the files are quantised, and the device cannot hold their other weights.
    """
    outlines = checkpoint.packed(component)
    if outlines is None:
        return chosen.dtype or policy.compute_dtype(component)
    held = _DTYPES[component](outlines)
    if not policy.holds(held):
        stored = str(held).removeprefix("torch.")
        raise LongCatError(
            f"The {component} of this checkpoint is quantised beside weights in {stored}, which this device "
            f"({policy.device}) cannot hold. Choose the checkpoint that this one was made from.",
            f"此检查点的 {component} 含有 {stored} 权重，此设备（{policy.device}）无法存放。请使用它的来源检查点。",
        )
    return held


def engine(chosen: str, precision_name: str, offload: GroupOffload | None) -> str:
    """The engine of a choice; ``auto`` is core unless the precision or the offload belongs to diffusers (D2).

    Raises:
        LongCatError: group offload was asked of the core engine, or of weights that it cannot move.
    """
    if offload is not None and precision_name in PRESETS:
        quantisation.check_group_offload(PRESETS[precision_name], offload.host == "disk")
    if chosen == "core" and offload is not None:
        raise LongCatError(
            "Group offload belongs to the diffusers engine, but the engine is core. Set engine to auto or diffusers, "
            "or offload to auto: ComfyUI then streams what does not fit.",
            "分组卸载属于 diffusers 引擎，但当前引擎为 core。请把引擎设为 auto 或 diffusers，或把卸载设为 auto，"
            "由 ComfyUI 流式加载放不下的部分。",
        )
    if chosen != precision.AUTO:
        return chosen
    exclusive = precision_name != precision.AUTO and precision_name not in precision.ENGINE_PRESETS["core"]
    return "diffusers" if exclusive or offload is not None else "core"


def preset(
    checkpoint: Checkpoint, component: str, name: str, allowed: Sequence[str], policy: DevicePolicy, tabulate: bool
) -> Preset:
    """The precision of a choice; what ``auto`` took and why goes to the log in one line.

    Raises:
        LongCatError: the component or the device does not have it.
    """
    weight_only = component == "text_encoder"
    if name != precision.AUTO:
        chosen = precision.preset(name, allowed)
        policy.require(chosen, allowed, weight_only)
        return chosen
    dtype = _compute_dtype(component)
    exact = next(known for known in PRESETS.values() if known.dtype == dtype)
    lossy = [PRESETS[_LOSSY]] if _LOSSY in allowed and policy.supports(PRESETS[_LOSSY], weight_only) else []
    parts = {
        known.name: {part: _weigh(checkpoint, part, known, tabulate) for part in _PARTS} for known in (exact, *lossy)
    }
    totals = {known: sum(part.total for part in weights.values()) for known, weights in parts.items()}
    host_free = comfy.model_management.get_free_memory(torch.device("cpu"))
    taken = memory.auto_precision(exact, lossy, totals, host_free)
    _log(component, taken, parts[taken.name][component], policy.device, host_free)
    return taken


def keeps_stored(name: str, dtype: torch.dtype) -> bool:
    """Whether the encoder's 16-bit weights stay as they are stored: ``auto`` on a device that computes in fp32.

    Widened when they are used they give the same bits as widened once, in half the memory.
    """
    return name == precision.AUTO and dtype is torch.float32


def _weigh(checkpoint: Checkpoint, part: str, known: Preset, tabulate: bool) -> memory.Weights:
    """What a part will weigh in a precision, or in that which its files have settled."""
    outlines = checkpoint.packed(part)
    held = _stored_dtype(checkpoint, part) if outlines is None else _DTYPES[part](outlines)
    stored = quantised_state.stored_preset(checkpoint, part) or known
    return memory.weigh(_SHAPES[part](checkpoint), part, stored, held, tabulate)


def _stored_dtype(checkpoint: Checkpoint, part: str) -> torch.dtype:
    """The dtype in which a part's weights will lie in memory if ``auto`` takes the exact precision."""
    dtype = _compute_dtype(part)
    if part != "text_encoder" or not keeps_stored(precision.AUTO, dtype):
        return dtype
    stored = next(iter(checkpoint.weights(part).values())).dtype
    return stored if stored.itemsize < dtype.itemsize else dtype


def _compute_dtype(part: str) -> torch.dtype:
    """What ``auto`` computes a part in: what ComfyUI was told, else what the part's device is best in."""
    management = comfy.model_management
    device = management.text_encoder_device() if part == "text_encoder" else management.get_torch_device()
    return _flagged(part) or devices.policy(device).compute_dtype(part)


def _flagged(component: str) -> torch.dtype | None:
    """The dtype that ComfyUI was started with, such as --fp16-unet or --fp32-text-enc."""
    suffix = {"transformer": "unet", "text_encoder": "text_enc"}[component]
    names = (name for name in precision.PLAIN if getattr(args, f"{name}_{suffix}"))
    return next((PRESETS[name].dtype for name in names), None)


def _log(component: str, taken: Preset, weights: memory.Weights, device: torch.device, host_free: int) -> None:
    free = comfy.model_management.get_free_memory(device)
    residency = "resident" if weights.device <= free else "as much resident as fits, the rest streamed"
    aside = f", {memory.size(weights.host)} of modulation weights on the host behind a table" if weights.host else ""
    logger.info(
        "LongCat-Image auto: %s in %s (%s): %s for %s with %s free, %s%s; the host has %s free",
        component,
        taken.name,
        "exact" if taken.exact else "the host cannot hold more" if taken.backend else "what this device computes in",
        memory.size(weights.device),
        device,
        memory.size(free),
        residency,
        aside,
        memory.size(host_free),
    )
