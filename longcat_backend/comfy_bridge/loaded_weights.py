"""The weights of a loaded MODEL, CLIP or VAE, with the patches on them, as they would be written to a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import layouts, quantisation, quantised_state, text_encoder, transformer, verification
from ..checkpoints import Checkpoint, differences, shapes
from ..errors import LongCatError
from ..precision import Preset
from ..tensor_files import dequantise, rotation_group
from . import formats, patchers
from .clip import Tokenizer
from .diffusers_engine import DiffusionModel

_PUBLISHED = "model."
_COMPANIONS = (".weight_scale", ".comfy_quant", ".input_scale")


@dataclass(frozen=True)
class Quantised:
    """What another library quantised in a component, see :mod:`quantised_state`."""

    preset: Preset
    layers: Mapping[str, str]
    weights: Mapping[str, Any]  # by the keys that they would have as plain tensors

    def plain(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The component's tensors with the weights multiplied out in the place of their parts."""
        library = quantisation.backend(self.preset)
        with torch.inference_mode(False):
            plain = {key: library.dequantised(weight).to("cpu", dtype) for key, weight in self.weights.items()}
        return {**self.rest(tensors), **plain}

    def rest(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The component's tensors without the parts of quantised weights."""
        parts = tuple(f"{key}." for key in self.weights)
        return {key: value for key, value in tensors.items() if not key.startswith(parts)}


@dataclass(frozen=True)
class Loaded:
    """One component: tensors in the layout in which it was loaded, and what it was loaded from."""

    part: str
    checkpoint: Checkpoint
    tensors: Mapping[str, torch.Tensor]
    patches: int  # how many tensors have patches baked in
    notes: tuple[str, ...] = field(default=())
    quantised: Quantised | None = None

    @property
    def formats(self) -> set[str]:
        """The quantised formats in use: ComfyUI's names, or the preset of another library."""
        if self.quantised is not None:
            return {self.quantised.preset.name}
        return {str(_config(value).get("format")) for key, value in self.tensors.items() if _is_marker(key)}

    def plain(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors without quantisation; quantised ones are multiplied out into ``dtype``."""
        if self.quantised is not None:
            return self.quantised.plain(self.tensors, dtype)
        plain = {}
        for key, value in self.tensors.items():
            layer = key.removesuffix(".weight")
            marker = self.tensors.get(f"{layer}.comfy_quant")
            if layer != key and marker is not None:
                scale = self.tensors[f"{layer}.weight_scale"].to("cpu")
                plain[key] = dequantise(value.to("cpu"), scale, rotation_group(_config(marker))).to(dtype)
            elif not key.endswith(_COMPANIONS):
                plain[key] = value
        return plain


def of_model(model: comfy.model_patcher.ModelPatcher) -> Loaded:
    """The transformer of a MODEL: official keys from the diffusers engine, those of ComfyUI's class from core.

    Raises:
        LongCatError: the MODEL is not LongCatLoader's, or its weights cannot be written, see :func:`_state`.
    """
    checkpoint = _source(model, "MODEL")
    diffusion_model = model.model.diffusion_model
    prefix = "diffusion_model."
    if isinstance(diffusion_model, DiffusionModel):
        diffusion_model, prefix = diffusion_model.velocity.transformer, f"{prefix}velocity.transformer."
    tensors, quantised = _state(model, diffusion_model, prefix, "MODEL")
    expected = shapes(transformer.empty_transformer(checkpoint.configs["transformer"]).state_dict())
    found = shapes(_main(tensors, quantised))
    if layouts.is_core(found):
        found = layouts.arranged_shapes(layouts.plan_official(found), found)
    _require_whole("MODEL", expected, found)
    return Loaded("transformer", checkpoint, tensors, len(model.patches), quantised=quantised)


def of_clip(clip: comfy.sd.CLIP) -> Loaded:
    """The text encoder of a CLIP under its published keys, with the parts that are not loaded from its checkpoint.

    Raises:
        LongCatError: the CLIP is not LongCatLoader's, or its weights cannot be written, see :func:`_state`.
    """
    if not isinstance(clip.tokenizer, Tokenizer):
        raise _foreign("CLIP")
    checkpoint = _source(clip.patcher, "CLIP")
    model = clip.cond_stage_model.encoder.model
    state, quantised = _state(clip.patcher, model, "encoder.model.", "CLIP")
    state = {**state, "embed_tokens.weight": model.embed_tokens.weight}
    expected = shapes(text_encoder.empty_text_model(checkpoint.configs["text_encoder"]).state_dict())
    _require_whole("CLIP", expected, shapes(_main(state, quantised)))
    rest, note = _not_loaded(checkpoint)
    tensors = {**{_PUBLISHED + key: value for key, value in state.items()}, **rest}
    if quantised is not None:
        published = {_PUBLISHED + key: value for key, value in quantised.weights.items()}
        quantised = replace(quantised, weights=published)
    return Loaded("text_encoder", checkpoint, tensors, len(clip.patcher.patches), (note,), quantised)


def of_vae(vae: comfy.sd.VAE) -> Loaded:
    """A VAE under its official keys.

    Raises:
        LongCatError: the VAE is not LongCatLoader's.
    """
    checkpoint = _source(vae.patcher, "VAE")
    expected = verification.vae_shapes(checkpoint.configs["vae"])
    state, _ = _state(vae.patcher, vae.first_stage_model, "", "VAE")
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
) -> tuple[dict[str, torch.Tensor], Quantised | None]:
    """The host's own view of a module for saving: each tensor is patched when it is moved to the CPU.

    Weights that another library quantised come as their parts, and with what is needed to tell them.

    Raises:
        LongCatError: group offload owns the weights, there are patches beside quantised ones, or a node has put in
            weights of a kind that is not known here.
    """
    if patchers.is_group_offloaded(patcher):
        raise LongCatError(
            f"The weights of the {socket} are in the hands of group offload, maybe on the disk. Set offload to auto "
            "in LongCatLoader to save them.",
            f"{socket} 的权重由分组卸载管理，可能在磁盘上。要保存，请在 LongCatLoader 中把卸载设为 auto。",
        )
    preset = formats.preset(patcher)
    if preset is not None and preset.backend in quantisation.BACKENDS:
        return _quantised_state(patcher, module, preset, socket)
    # Clones share their weights; loading makes the patches in them this one's.
    comfy.model_management.load_models_gpu([patcher])
    state: dict[str, torch.Tensor] = patcher.model_state_dict_for_saving(module, prefix)
    if any(is_traceable_wrapper_subclass(value) for value in state.values()):
        raise _unwritable(socket, "quantised by another library", "由其他库量化")
    return state, None


def _quantised_state(
    patcher: comfy.model_patcher.ModelPatcher, module: torch.nn.Module, preset: Preset, socket: str
) -> tuple[dict[str, torch.Tensor], Quantised]:
    if patcher.patches:
        raise LongCatError(
            f"The {socket} has LoRAs on {len(patcher.patches)} weights beside those in {preset.name}, and they cannot "
            "be merged into these. Save it without LoRAs and apply them after loading, or load in bf16 to have them "
            "baked in.",
            f"{socket} 在 {preset.name} 权重旁带有 {len(patcher.patches)} 个 LoRA 补丁，无法合并进去。"
            "请先不接 LoRA 保存，加载后再应用；或以 bf16 加载以便合并。",
        )
    tensors, layers = quantised_state.quantised_state(module, preset)
    weights = {f"{name}.weight": module.get_submodule(name).weight for name in layers}
    return tensors, Quantised(preset, layers, weights)


def _main(tensors: Mapping[str, torch.Tensor], quantised: Quantised | None) -> dict[str, torch.Tensor]:
    if quantised is not None:
        return {**quantised.rest(tensors), **quantised.weights}
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
            "no vision tower and output head: the checkpoint that the CLIP was loaded from cannot be read now "
            "不含视觉塔和输出头：CLIP 的来源现已无法读取"
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
