"""The weights of a loaded MODEL, CLIP or VAE, with the patches on them, as they would be written to a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import layouts, text_encoder, transformer, verification
from ..checkpoints import Checkpoint, differences, shapes
from ..errors import LongCatError
from ..tensor_files import dequantise
from . import formats, patchers
from .clip import Tokenizer
from .diffusers_engine import DiffusionModel

_PUBLISHED = "model."
_COMPANIONS = (".weight_scale", ".comfy_quant", ".input_scale")
_QUANTO = (".weight._data", ".weight._data._data")


@dataclass(frozen=True)
class Loaded:
    """One component: tensors in the layout in which it was loaded, and what it was loaded from."""

    part: str
    checkpoint: Checkpoint
    tensors: Mapping[str, torch.Tensor]
    patches: int  # how many tensors have patches baked in
    notes: tuple[str, ...] = field(default=())

    @property
    def formats(self) -> set[str]:
        """ComfyUI's names of the quantised formats in use."""
        return {str(_config(value).get("format")) for key, value in self.tensors.items() if _is_marker(key)}

    def plain(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors without quantisation; quantised ones are multiplied out into ``dtype``."""
        plain = {}
        for key, value in self.tensors.items():
            layer = key.removesuffix(".weight")
            marker = self.tensors.get(f"{layer}.comfy_quant")
            if layer != key and marker is not None:
                config, scale = _config(marker), self.tensors[f"{layer}.weight_scale"].to("cpu")
                group = int(config.get("convrot_groupsize", 256)) if config.get("convrot") else 0
                plain[key] = dequantise(value.to("cpu"), scale, group).to(dtype)
            elif not key.endswith(_COMPANIONS):
                plain[key] = value
        return plain


def of_model(model: comfy.model_patcher.ModelPatcher) -> Loaded:
    """The transformer of a MODEL: official keys from the diffusers engine, those of ComfyUI's class from core.

    Raises:
        LongCatError: the MODEL is not LongCatLoader's, or its precision has weights that cannot be written.
    """
    checkpoint = _source(model, "MODEL")
    diffusion_model = model.model.diffusion_model
    prefix = "diffusion_model."
    if isinstance(diffusion_model, DiffusionModel):
        diffusion_model, prefix = diffusion_model.velocity.transformer, f"{prefix}velocity.transformer."
    tensors = _state(model, diffusion_model, prefix, "MODEL")
    expected = shapes(transformer.empty_transformer(checkpoint.configs["transformer"]).state_dict())
    found = shapes(_main(tensors))
    if layouts.is_core(found):
        found = layouts.arranged_shapes(layouts.plan_official(found), found)
    _require_whole("MODEL", expected, found)
    return Loaded("transformer", checkpoint, tensors, len(model.patches))


def of_clip(clip: comfy.sd.CLIP) -> Loaded:
    """The text encoder of a CLIP under its published keys, with the parts that are not loaded from its checkpoint.

    Raises:
        LongCatError: the CLIP is not LongCatLoader's, or its precision has weights that cannot be written.
    """
    if not isinstance(clip.tokenizer, Tokenizer):
        raise _foreign("CLIP")
    checkpoint = _source(clip.patcher, "CLIP")
    model = clip.cond_stage_model.encoder.model
    state = _state(clip.patcher, model, "encoder.model.", "CLIP")
    state = {**state, "embed_tokens.weight": model.embed_tokens.weight}
    expected = shapes(text_encoder.empty_text_model(checkpoint.configs["text_encoder"]).state_dict())
    _require_whole("CLIP", expected, shapes(_main(state)))
    rest, note = _not_loaded(checkpoint)
    tensors = {**{_PUBLISHED + key: value for key, value in state.items()}, **rest}
    return Loaded("text_encoder", checkpoint, tensors, len(clip.patcher.patches), (note,))


def of_vae(vae: comfy.sd.VAE) -> Loaded:
    """A VAE under its official keys.

    Raises:
        LongCatError: the VAE is not LongCatLoader's.
    """
    checkpoint = _source(vae.patcher, "VAE")
    expected = verification.vae_shapes(checkpoint.configs["vae"])
    state = _state(vae.patcher, vae.first_stage_model, "", "VAE")
    state = layouts.vae_to_official({key: value.to("cpu") for key, value in state.items()})
    # ComfyUI's class has two identity convolutions that the checkpoint may lack.
    tensors = {key: value for key, value in state.items() if key in expected or not key.startswith(_IDENTITIES)}
    _require_whole("VAE", expected, shapes(tensors))
    return Loaded("vae", checkpoint, tensors, len(vae.patcher.patches))


_IDENTITIES = ("quant_conv.", "post_quant_conv.")


def _source(patcher: comfy.model_patcher.ModelPatcher, socket: str) -> Checkpoint:
    checkpoint = formats.source(patcher)
    if checkpoint is None:
        raise _foreign(socket)
    return checkpoint


def _state(
    patcher: comfy.model_patcher.ModelPatcher, module: torch.nn.Module, prefix: str, socket: str
) -> dict[str, torch.Tensor]:
    """The host's own view of a module for saving: each tensor is patched when it is moved to the CPU."""
    if patchers.is_group_offloaded(patcher):
        raise LongCatError(
            f"The weights of the {socket} are in the hands of group offload, maybe on the disk. Set offload to auto "
            "in LongCatLoader to save them.",
            f"{socket} 的权重由分组卸载管理，可能在磁盘上。要保存，请在 LongCatLoader 中把卸载设为 auto。",
        )
    # Clones share their weights; loading makes the patches in them this one's.
    comfy.model_management.load_models_gpu([patcher])
    state: dict[str, torch.Tensor] = patcher.model_state_dict_for_saving(module, prefix)
    if any(is_traceable_wrapper_subclass(value) or key.endswith(_QUANTO) for key, value in state.items()):
        raise _unwritable(socket, "quantised by another library", "由其他库量化")
    return state


def _main(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if not key.endswith(_COMPANIONS)}


def _require_whole(socket: str, expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
    result = differences(expected, found)
    if result is not None:
        raise _unwritable(socket, *result)


def _not_loaded(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], str]:
    """Output head and vision tower from the checkpoint's files; what there is to say about it."""
    try:
        stored = checkpoint.weights("text_encoder")
    except LongCatError:
        return {}, (
            "no vision tower and output head: the checkpoint that the CLIP was loaded from is gone "
            "不含视觉塔和输出头：CLIP 的来源已不存在"
        )
    kept = set(text_encoder.language_keys(stored).values())
    rest = {key.removeprefix(_PUBLISHED): stored[key] for key in stored if key not in kept}
    if not rest:
        return {}, (
            "no vision tower and output head: the checkpoint that the CLIP was loaded from has none "
            "不含视觉塔和输出头：CLIP 的来源中没有"
        )
    return rest, (
        "vision tower and output head copied from the checkpoint that the CLIP was loaded from "
        "视觉塔和输出头从 CLIP 的来源复制"
    )


def _is_marker(key: str) -> bool:
    return key.endswith(".comfy_quant")


def _config(marker: torch.Tensor) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(bytes(marker.tolist()))
    return config


def _foreign(socket: str) -> LongCatError:
    return LongCatError(
        f"The {socket} is not LongCatLoader's, so its configs are not known. Connect the {socket} of LongCatLoader.",
        f"该 {socket} 不是由 LongCatLoader 加载的，无法得知其配置。请连接 LongCatLoader 的 {socket}。",
    )


def _unwritable(socket: str, en: str, zh: str) -> LongCatError:
    return LongCatError(
        f"The weights of the {socket} cannot be written as they are: {en}. Choose bf16, fp16 or fp32, or fp8 or int8 "
        "of the core engine, in LongCatLoader.",
        f"{socket} 的权重无法按现状写入：{zh}。请在 LongCatLoader 中选择 bf16、fp16、fp32，或 core 引擎的 fp8、int8。",
    )
