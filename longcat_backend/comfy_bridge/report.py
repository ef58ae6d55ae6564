"""What was loaded, in words and numbers: where each component lives, in which format, how large, and the peak."""

from typing import Any

import comfy.sd
import torch
from torch import nn

from ..memory import size
from ..quantisation import leaves, stored_bytes
from . import patchers

SIZES = ((512, 512), (1024, 1024), (2048, 2048))
_GUIDED = 2  # conditional and unconditional in one pass


def report(model: Any, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> str:
    """One line per component, then the estimated peak on the device for some picture sizes."""
    lines = [
        _component("transformer / 扩散模型", model),
        _component("text encoder / 文本编码器", clip.patcher),
        _component("VAE", vae.patcher),
    ]
    lines += [_peak(model, vae, width, height) for width, height in SIZES]
    return "\n".join(lines)


def _component(name: str, patcher: Any) -> str:
    own = patchers.managed_size(patcher.model)
    aside = stored_bytes(patcher.model) - own
    manager = "diffusers group offload" if patchers.is_group_offloaded(patcher) else "ComfyUI"
    if manager == "ComfyUI" and patcher.is_dynamic():
        manager = "ComfyUI, dynamic VRAM"
    line = (
        f"{name}: {_formats(patcher.model)}, {size(own)}, computes on {patcher.load_device}, "
        f"rests on {patcher.offload_device}, moved by {manager}"
    )
    if patchers.get_table(patcher.model) is not None:
        line += f"; modulation / 调制: {size(aside)} on cpu, behind a table / 由查找表代替"
    return line


def _peak(model: Any, vae: comfy.sd.VAE, width: int, height: int) -> str:
    latent = (_GUIDED, vae.latent_channels, height // 8, width // 8)
    sampling = model.model.memory_required(list(latent))
    decoding = vae.memory_used_decode((1, *latent[1:]), vae.vae_dtype)
    resident = sampling + model.model_size()
    return (
        f"{width}x{height}: about {size(resident)} while sampling if the transformer is resident, "
        f"{size(sampling)} at least; {size(decoding)} while decoding / "
        f"采样约 {size(resident)}（常驻），至少 {size(sampling)}；解码约 {size(decoding)}"
    )


def _formats(model: nn.Module) -> str:
    """Dtypes as they are stored, with the share of bytes of each."""
    sizes: dict[torch.dtype, int] = {}
    # The host's quantised tensors and those of the libraries alike consist of plain ones.
    for tensor in (leaf for parameter in model.parameters() for _, leaf in leaves(parameter, "")):
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    total = sum(sizes.values()) or 1
    ranked = sorted(sizes.items(), key=lambda item: -item[1])
    shares = [(str(dtype).removeprefix("torch."), 100 * size / total) for dtype, size in ranked]
    return " + ".join(f"{name} {share:.0f} %" for name, share in shares if share >= 0.5)
