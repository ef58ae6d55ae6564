"""Where ComfyUI's weight patches for LongCat's layers go, on the models of both engines.

A patch key is the name of a tensor, or (name, rows, function): the part of a fused tensor that is patched, and what
the change goes through first. ComfyUI's LoRA loaders know LongCat by the keys of ComfyUI's own class only, so on the
diffusers engine their keys are turned into those of the official layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.utils
import comfy.weight_adapter
import torch
from torch import nn

from .. import layouts, lora_alpha
from ..errors import LongCatError

_HEADER_NAME = "LoRA"
_CORE = "diffusion_model."
_BROKEN = "("  # what ComfyUI makes of the name of a fused layer's bias
_OFFICIAL = "diffusion_model.velocity.transformer."

Patches = Mapping[Any, Any]


@dataclass(frozen=True)
class Place:
    """Where a patch for one official tensor goes."""

    key: Any
    shape: torch.Size  # of the official tensor


def is_transformer(model: nn.Module) -> bool:
    """Whether it is LongCat's transformer behind ComfyUI's MODEL, and not a text encoder or a VAE."""
    return isinstance(model, comfy.model_base.LongCatImage)


def is_official(model: nn.Module) -> bool:
    """Whether the layers of a transformer have their official names: the diffusers engine."""
    return hasattr(model.diffusion_model, "velocity")


def places(model: nn.Module) -> dict[str, Place]:
    """The places of all linear layers' weights and biases, by their official names."""
    if is_official(model):
        shapes = _linear_shapes(model.diffusion_model.velocity.transformer)
        return {name: Place(_OFFICIAL + name, shape) for name, shape in shapes.items()}
    shapes = _linear_shapes(model.diffusion_model)
    plan = layouts.plan_official(shapes)
    officials = layouts.arranged_shapes(plan, shapes)
    return {name: Place(_core_key(pieces, shapes), officials[name]) for name, pieces in plan.items()}


def translated(model: nn.Module, patches: Patches) -> dict[Any, Any]:
    """Patches by the keys that the model's layers have, from those of ComfyUI's own class.

    Raises:
        LongCatError: there are no patches at all, or some are for layers that the model does not have. ComfyUI would
            leave them out and go on.
    """
    if not patches:
        raise _nothing_matched()
    if is_official(model):
        names = _official_names(model)
        patches = {names.get(key, key): patch for key, patch in patches.items()}
    known = {place.key for place in places(model).values()} | {*model.state_dict()}
    own = [key for key in patches if _name(key).startswith((_CORE, _BROKEN))]  # the others are a text encoder's
    unknown = [_name(key) for key in own if key not in known and _name(key) not in known]
    if unknown:
        raise LongCatError(
            f"The patch does not fit this model: it has no {', '.join(unknown[:3])}"
            f"{', …' if len(unknown) > 3 else ''}. Use LongCatLoraLoader, which says what a LoRA holds and why it "
            "does not fit.",
            f"该补丁与当前模型不符：模型中没有 {', '.join(unknown[:3])}{'……' if len(unknown) > 3 else ''}。"
            "请使用 LongCatLoraLoader，它会说明 LoRA 的内容及不匹配的原因。",
        )
    return dict(patches)


def require_header(model: nn.Module, patches: Patches, header: Mapping[str, str]) -> None:
    """Refuse LoRAs that were applied in another way than the header of their file says, which core does not read.

    Args:
        patches: by the keys of the model's layers.
        header: of the file that they came from.

    Raises:
        LongCatError: they were trained at another strength than they were applied at, or on layers that core left out.
    """
    alphas = lora_alpha.from_header(header, _HEADER_NAME)
    if alphas is None:
        return
    weights = [(name, place.key) for name, place in places(model).items() if name.endswith(".weight")]
    modules = {key: name.removesuffix(".weight") for name, key in weights}
    for key, patch in patches.items():
        if isinstance(patch, comfy.weight_adapter.LoRAAdapter) and patch.weights[2] is None and key in modules:
            rank = patch.weights[1].shape[0]
            alpha = alphas.of(modules[key], rank)
            if alpha != rank:
                raise _alpha_ignored(alpha, rank)
    patched = {_name(key) for key in patches}  # a fused tensor as a whole, or only some of its rows
    for target in alphas.targets():
        named = [key for key, module in modules.items() if f".{module}".endswith(f".{target}")]
        if named and not any(_name(key) in patched for key in named):
            raise _target_ignored(target)


def names_layer(model: nn.Module, key: Any) -> bool:
    """Whether a patch's key names the tensor of a layer of the model."""
    try:
        model.get_submodule(_name(key).rpartition(".")[0])
    except AttributeError:
        return False
    return True


def _linear_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the weights and biases of linear layers, whoever made the layers and wherever the weights are."""
    shapes = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            shapes[f"{name}.weight"] = torch.Size((layer.out_features, layer.in_features))
            shapes[f"{name}.bias"] = torch.Size((layer.out_features,))
    return shapes


def _core_key(pieces: tuple[layouts.Rows, ...], shapes: Mapping[str, torch.Size]) -> Any:
    key = _CORE + pieces[0].key
    if len(pieces) > 1:
        return (key, None, comfy.utils.swap_scale_shift)
    start, stop = pieces[0].start, pieces[0].stop
    if start is None and stop is None:
        return key
    first, last = start or 0, shapes[pieces[0].key][0] if stop is None else stop
    return (key, (0, first, last - first))


def _official_names(model: nn.Module) -> dict[Any, str]:
    """The keys that ComfyUI's loaders give to LongCat's layers, to ours."""
    known = places(model)
    config = model.model_config.unet_config
    names = comfy.utils.flux_to_diffusers(config, output_prefix=_CORE)
    return {key: known[official].key for official, key in names.items() if official in known}


def _name(key: Any) -> str:
    return key if isinstance(key, str) else str(key[0])


def _nothing_matched() -> LongCatError:
    return LongCatError(
        "ComfyUI's loader found no layer of this model in the LoRA, so nothing would change. Use LongCatLoraLoader, "
        "which reads every layout that LongCat LoRAs come in.",
        "ComfyUI 的加载器在该 LoRA 中没有找到当前模型的任何层，不会产生效果。"
        "请使用 LongCatLoraLoader，它能读取 LongCat LoRA 的所有格式。",
    )


def _alpha_ignored(alpha: float, rank: int) -> LongCatError:
    return LongCatError(
        f"The LoRA's header says alpha {alpha:g} at rank {rank}, which ComfyUI's loader does not read: it would take "
        f"{rank} and give another strength. Use LongCatLoraLoader.",
        f"该 LoRA 的文件头记录 alpha 为 {alpha:g}（秩 {rank}），而 ComfyUI 的加载器不读取文件头，会按 {rank} 处理，"
        "强度因此不同。请使用 LongCatLoraLoader。",
    )


def _target_ignored(target: str) -> LongCatError:
    return LongCatError(
        f"The LoRA's header says that it changes the layer '{target}', which ComfyUI's loader did not find in the "
        "file, and the picture would be another. Use LongCatLoraLoader.",
        f"该 LoRA 的文件头记录它会修改层“{target}”，但 ComfyUI 的加载器没有在文件中找到该层，画面会因此不同。"
        "请使用 LongCatLoraLoader。",
    )
