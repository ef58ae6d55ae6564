"""Engine "core": official weights in ComfyUI's own LongCat class, with native memory management and patches."""

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import torch

from .. import flow, transformer
from ..checkpoints import Checkpoint
from ..errors import LongCatError
from . import formats


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's LongCat class with the checkpoint's weights, as a MODEL.

    Raises:
        LongCatError: see :func:`transformer.audited_weights`; or ComfyUI's class wants other weights.
    """
    weights = convert(transformer.audited_weights(checkpoint))
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    config = comfy.supported_models.LongCatImage(class_config(checkpoint.configs["transformer"]))
    cast = comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    formats.configure(config, checkpoint)
    model = config.get_model(weights, "")
    patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=offload)
    cast_weights = {key: value.to(dtype) for key, value in weights.items()}
    # With dynamic VRAM the class has no weights before they are loaded, so only loading tells what does not fit.
    misfits = model.diffusion_model.load_state_dict(cast_weights, strict=False, assign=patcher.is_dynamic())
    _require_fit(misfits.missing_keys, misfits.unexpected_keys)
    patcher.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "longcat_timestep", _round_timestep
    )
    return patcher


def convert(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official names and layouts to those of ComfyUI's class.

    Core's own converter fuses q, k and v and swaps the halves of ``norm_out``, but knows the time embedding only
    by Flux's name. Without the renaming it loads a model with a random time embedding.
    """
    renamed = {
        f"time_text_embed.{key.removeprefix('time_embed.')}" if key.startswith("time_embed.") else key: value
        for key, value in weights.items()
    }
    for key in ("norm_out.linear.weight", "norm_out.linear.bias"):
        renamed[key] = renamed[key].clone()  # core writes the swapped halves into the tensor it is given
    converted: dict[str, torch.Tensor] = comfy.model_detection.convert_diffusers_mmdit(renamed, "")
    return converted


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


def _round_timestep(executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Core keeps the timestep in fp32; the official pipeline rounds it in the compute dtype (DESIGN.md trap 9)."""
    rounded = (flow.model_timestep(timestep, x.dtype) * 1000).float() / 1000
    return executor(x, rounded, *args, **kwargs)
