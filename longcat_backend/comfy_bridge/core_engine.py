"""Engine "core": official weights in ComfyUI's own LongCat class, with native memory management and patches."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.layers import timestep_embedding
from torch.nn import functional

from .. import flow, layouts, transformer
from ..checkpoints import Checkpoint
from ..errors import LongCatError
from ..modulation import ModulationTable, is_modulation
from ..precision import Preset
from . import formats, host, kitchen, patchers
from .castable import TabulatedLinear


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    preset: Preset,
    tabulate: bool = True,
    dynamic: bool = True,
    offload: None = None,
) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's LongCat class with the checkpoint's weights, as a MODEL.

    Args:
        dtype: of the computation, and of every weight that is not quantised.
        tabulate: keep the modulation weights on the CPU, behind a :class:`modulation.ModulationTable`.
        dynamic: let ComfyUI use dynamic VRAM where it is on.
        offload: none; :func:`auto.engine` gives group offload to the other engine.

    Raises:
        LongCatError: see :func:`transformer.audited_weights` and :mod:`kitchen`; or ComfyUI's class wants other
            weights.
    """
    # Core's own converter knows the time embedding only by Flux's name, and so loads a model with a random one.
    weights = layouts.to_core(transformer.audited_weights(checkpoint))
    device = comfy.model_management.get_torch_device()
    model = _empty_model(checkpoint, dtype, preset, device)
    table = _tabulate(model, dtype) if tabulate else None
    if preset.backend:
        stored = checkpoint.quantised("transformer", preset.format)
        weights = kitchen.quantise(weights, "transformer", preset, dtype, stored, host.progress())
    else:
        weights = {key: value.to(dtype) for key, value in weights.items()}
    # Assigned, not copied: with dynamic VRAM the layers have no storage yet, and the others need none of their own.
    misfits = model.diffusion_model.load_state_dict(weights, strict=False, assign=True)
    _require_fit(misfits.missing_keys, misfits.unexpected_keys)
    if preset.backend:
        kitchen.verify(model.diffusion_model, "transformer", preset)
    patcher = patchers.castable_patcher(model, device, comfy.model_management.unet_offload_device(), dynamic)
    wrapper = partial(_prepare_step, table)
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "longcat_timestep", wrapper)
    return patcher


def _empty_model(
    checkpoint: Checkpoint, dtype: torch.dtype, preset: Preset, device: torch.device
) -> comfy.model_base.LongCatImage:
    config = comfy.supported_models.LongCatImage(class_config(checkpoint.configs["transformer"]))
    cast = comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    if preset.backend:
        config.custom_operations = kitchen.operations(dtype, preset)
    formats.configure(config, checkpoint)
    return config.get_model({}, "")


def _tabulate(model: comfy.model_base.LongCatImage, dtype: torch.dtype) -> ModulationTable:
    table = ModulationTable()
    for name, layer in list(model.diffusion_model.named_modules()):
        if is_modulation(name):
            comfy.utils.set_attr(model.diffusion_model, name, TabulatedLinear(name, table, layer, dtype))
    patchers.set_table(model, table)
    return table


def class_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of ComfyUI's class from the checkpoint's transformer config.

    Not left to ComfyUI's detection, which knows one size only and guesses what the config says.
    """
    channels = config["in_channels"] // 4
    return {
        "image_model": "flux",
        "patch_size": 2,
        "in_channels": channels,
        "out_channels": channels,
        "vec_in_dim": None,
        "context_in_dim": config["joint_attention_dim"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "mlp_ratio": 4.0,
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": False,
        "txt_ids_dims": [1, 2],
    }


def _require_fit(missing: Sequence[str], unknown: Sequence[str]) -> None:
    """ComfyUI itself would log the difference and go on with random weights."""
    if missing or unknown:
        raise LongCatError(
            f"The weights do not fit this ComfyUI's LongCat class: {len(missing)} missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}. Update the pack, or set the engine of LongCatLoader to diffusers.",
            f"权重与当前 ComfyUI 的 LongCat 类不匹配：缺少 {len(missing)} 个 {missing[:3]}，"
            f"多余 {len(unknown)} 个 {unknown[:3]}。请更新本节点包，或把 LongCatLoader 的引擎设为 diffusers。",
        )


def _prepare_step(
    table: ModulationTable | None, executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Round the timestep as the official pipeline does, and let the table answer at this noise level.

    Core keeps the timestep in fp32; the pipeline rounds it in the compute dtype (DESIGN.md trap 9).
    """
    rounded = _rounded(timestep, x.dtype)
    if table is None:
        return executor(x, rounded, *args, **kwargs)
    model = executor.class_obj
    options = next((value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)), None)
    schedule = formats.schedule(options)

    def embed(timesteps: torch.Tensor) -> torch.Tensor:
        return functional.silu(model.time_in(timestep_embedding(timesteps, 256).to(x.dtype)))

    with table.at(rounded, None if schedule is None else _rounded(schedule, x.dtype), x, embed):
        return executor(x, rounded, *args, **kwargs)


def _rounded(timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (flow.model_timestep(timestep, dtype) * 1000).float() / 1000
