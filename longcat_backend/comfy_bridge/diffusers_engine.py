"""Engine "diffusers": the transformer of diffusers behind the contract of a ComfyUI MODEL."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models
import torch
from torch import nn

from ..checkpoints import Checkpoint
from ..errors import LongCatError
from ..memory import GroupOffload
from ..modulation import ModulationTable, is_modulation
from ..precision import Preset
from ..transformer import VelocityModel, load_quantised_transformer, load_transformer
from . import core_engine, formats, host, patchers
from .castable import TabulatedLinear, castable, replace_linears


class DiffusionModel(nn.Module):
    """What ComfyUI calls: scaled latents, sigma and conditioning in, velocity out."""

    def __init__(self, velocity: VelocityModel) -> None:
        super().__init__()
        self.velocity = velocity

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; ComfyUI casts its inputs to it."""
        return self.velocity.dtype

    @torch.inference_mode(False)
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; quantised tensors could not be detached in the inference mode of nodes."""
        return super().state_dict(*args, **kwargs)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run through the wrappers that other nodes put on the MODEL, then the transformer."""
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, kwargs.get("transformer_options", {})
        )
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        velocity: torch.Tensor = executor.execute(x, timestep, context, *args, **kwargs)
        return velocity

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        ref_latents: list[torch.Tensor] | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if control is not None:
            raise LongCatError(
                "The diffusers engine has no ControlNet. Set the engine of LongCatLoader to core.",
                "diffusers 引擎不支持 ControlNet。请把 LongCatLoader 的引擎设为 core。",
            )
        return self.velocity(x, timestep, context, ref_latents or (), formats.schedule(transformer_options))


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    preset: Preset,
    tabulate: bool = True,
    dynamic: bool = True,
    offload: GroupOffload | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """The diffusers transformer with the checkpoint's weights, as a MODEL.

    Args:
        dtype: of the computation, and of every weight that is not quantised.
        tabulate: keep the modulation weights on the CPU, behind a :class:`modulation.ModulationTable`.
        dynamic: let ComfyUI use dynamic VRAM where it is on.
        offload: let diffusers' group offload move the weights, in the place of ComfyUI's memory manager.

    Raises:
        LongCatError: see :func:`transformer.load_transformer`, :func:`transformer.load_quantised_transformer` and
            :meth:`memory.GroupOffload.apply`.
    """
    # ComfyUI takes latent channels from it, and its LoRA loaders the number and size of the blocks.
    outline = core_engine.class_config(checkpoint.configs["transformer"])
    config = comfy.supported_models.LongCatImage({"disable_unet_model_creation": True, **outline})
    config.set_inference_dtype(dtype, None)
    formats.configure(config, checkpoint)
    model = comfy.model_base.LongCatImage(config)
    device, unload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    table = ModulationTable() if tabulate else None
    plain = bool(preset.backend or offload)  # layers that other libraries quantise or move
    prepare = partial(_prepare, dtype=dtype, plain=plain, table=table)
    # Other libraries exchange storage and pack weights, which the tensors of inference mode do not allow.
    with torch.inference_mode(torch.is_inference_mode_enabled() and not plain):
        if preset.backend:
            place = (device, host.progress())
            velocity = load_quantised_transformer(checkpoint, dtype, preset, *place, table, prepare)
        else:
            velocity = load_transformer(checkpoint, dtype, table, prepare)
    model.diffusion_model = DiffusionModel(velocity)
    if table is not None:
        patchers.set_table(model, table)
    if offload is not None:
        _offload_groups(velocity.transformer, device, offload)
        return patchers.group_patcher(model, device, unload)
    if preset.backend:
        return patchers.whole_patcher(model, device, unload)
    return patchers.castable_patcher(model, device, unload, dynamic)


def _offload_groups(transformer: nn.Module, device: torch.device, offload: GroupOffload) -> None:
    for layer in transformer.modules():
        if isinstance(layer, TabulatedLinear):
            layer.keep_aside()
    with torch.inference_mode(False):  # the hooks exchange the storage of parameters
        offload.apply(transformer, device, host.offload_folder())


def _prepare(transformer: nn.Module, dtype: torch.dtype, plain: bool, table: ModulationTable | None) -> None:
    def build(name: str, layer: nn.Linear) -> nn.Module:
        if table is not None and is_modulation(name):
            return TabulatedLinear(name, table, layer, dtype)
        return layer if plain else castable(comfy.ops.manual_cast, layer, dtype)

    replace_linears(transformer, build)
