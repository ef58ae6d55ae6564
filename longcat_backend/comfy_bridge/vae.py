"""The checkpoint's VAE as ComfyUI's own VAE class."""

from collections.abc import Mapping
from typing import Any

import comfy.sd
import torch

from .. import latents, layouts
from ..checkpoints import Checkpoint, audit
from ..errors import LongCatError
from ..verification import vae_shapes
from . import formats

# FLUX's VAE, which the official checkpoints carry; for a VAE that core's own loader brought.
DEFAULT_SCALING = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
_SCALING = "longcat_scaling"


def load(checkpoint: Checkpoint) -> comfy.sd.VAE:
    """ComfyUI's VAE with the checkpoint's weights; its LATENTs are unscaled.

    Raises:
        LongCatError: see :func:`component_files.read_weights` and :func:`checkpoints.audit`.
    """
    config = checkpoint.configs["vae"]
    audit("vae", vae_shapes(config), checkpoint.shapes("vae"))
    converted = layouts.vae_to_single_file(checkpoint.weights("vae"))
    vae = comfy.sd.VAE(sd={**_identity_convolutions(config, converted), **converted}, config=class_config(config))
    vae.latent_channels = config["latent_channels"]
    setattr(vae, _SCALING, {key: config[key] for key in DEFAULT_SCALING})
    formats.attach_source(vae.patcher, checkpoint)
    return vae


def scaling(vae: comfy.sd.VAE) -> Mapping[str, float]:
    """``scaling_factor`` and ``shift_factor``: what the transformer sees is (LATENT - shift) * factor."""
    values: Mapping[str, float] = getattr(vae, _SCALING, DEFAULT_SCALING)
    return values


def class_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of ComfyUI's AutoencoderKL from the checkpoint's VAE config.

    Raises:
        LongCatError: the VAE's channels are no whole multiples of its first, which ComfyUI's class cannot build.
    """
    channels = config["block_out_channels"]
    if any(channel % channels[0] for channel in channels) or config["norm_num_groups"] != 32:
        raise LongCatError(
            f"ComfyUI's VAE cannot be built with channels {channels} and {config['norm_num_groups']} norm groups. "
            "Expected multiples of the first channel count and 32 groups; use the official VAE.",
            f"ComfyUI 的 VAE 无法使用通道 {channels} 和 {config['norm_num_groups']} 个归一化分组。"
            "通道数应为首个通道数的整数倍、分组数应为 32；请使用官方 VAE。",
        )
    ddconfig = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": channels[0],
        "ch_mult": [channel // channels[0] for channel in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"params": {"ddconfig": ddconfig, "embed_dim": config["latent_channels"]}}


def _identity_convolutions(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ComfyUI's configurable class always has these two 1×1 convolutions; as identities they change no bit."""
    dtype = next(iter(weights.values())).dtype
    channels = config["latent_channels"]
    sizes = {"quant_conv": 2 * channels, "post_quant_conv": channels}
    tensors: dict[str, torch.Tensor] = {}
    for name, size in sizes.items():
        tensors[f"{name}.weight"] = torch.eye(size, dtype=dtype)[:, :, None, None].clone()
        tensors[f"{name}.bias"] = torch.zeros(size, dtype=dtype)
    return tensors


def decode(
    vae: comfy.sd.VAE | None, samples: torch.Tensor, tiled: bool, width: int = 0, height: int = 0
) -> torch.Tensor:
    """Pictures (batch, height, width, 3) in 0..1 from a LATENT or from packed latents.

    Args:
        samples: (batch, 16, h, w), unscaled; or packed and scaled (batch, tokens, 64).
        width, height: of the picture, for packed latents only; 0 for a square.

    Raises:
        LongCatError: there is no VAE, the latent holds NaN or infinity or is another model's, or packed latents do
            not fit the size.
    """
    if vae is None:
        raise LongCatError(
            "There is no VAE: the loader's file holds none. Connect the VAE of LongCatLoader.",
            "没有 VAE：加载器的文件中不含 VAE。请连接 LongCatLoader 的 VAE。",
        )
    if not samples.is_nested and samples.ndim == 3:
        samples = latents.unpack_scaled(samples, scaling(vae), width, height)
    latents.check_unpacked(samples, vae.latent_channels)
    latents.check_finite(samples)
    pixels: torch.Tensor = vae.decode_tiled(samples) if tiled else vae.decode(samples)
    return pixels
