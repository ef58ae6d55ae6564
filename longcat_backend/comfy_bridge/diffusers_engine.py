"""Engine "diffusers": the transformer of diffusers behind the contract of a ComfyUI MODEL."""

from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import torch
from torch import nn

from ..checkpoints import Checkpoint
from ..errors import LongCatError
from ..transformer import VelocityModel, load_transformer
from . import formats


class WholeModelPatcher(comfy.model_patcher.ModelPatcher):
    """Moves the model as one piece.

    The plain patcher leaves layers that are not ComfyUI's own on the CPU when memory is short, and the next
    forward fails with tensors on two devices.
    """

    def load(self, *args: Any, full_load: bool = False, **kwargs: Any) -> Any:
        """As in the base class, always in full."""
        return super().load(*args, full_load=True, **kwargs)


class DiffusionModel(nn.Module):
    """What ComfyUI calls: scaled latents, sigma and conditioning in, velocity out."""

    def __init__(self, velocity: VelocityModel) -> None:
        super().__init__()
        self.velocity = velocity

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; ComfyUI casts its inputs to it."""
        return self.velocity.dtype

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
        **kwargs: Any,
    ) -> torch.Tensor:
        if control is not None:
            raise LongCatError(
                "The diffusers engine has no ControlNet. Set the engine of LongCatLoader to core.",
                "diffusers 引擎不支持 ControlNet。请把 LongCatLoader 的引擎设为 core。",
            )
        return self.velocity(x, timestep, context, ref_latents or ())


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    """The diffusers transformer with the checkpoint's weights, as a MODEL.

    Raises:
        LongCatError: see :func:`transformer.audited_weights`.
    """
    channels = checkpoint.configs["transformer"]["in_channels"] // 4
    config = comfy.supported_models.LongCatImage(
        {"disable_unet_model_creation": True, "in_channels": channels, "out_channels": channels}
    )
    config.set_inference_dtype(dtype, None)
    formats.configure(config, checkpoint)
    model = comfy.model_base.LongCatImage(config)
    model.diffusion_model = DiffusionModel(load_transformer(checkpoint, dtype))
    return WholeModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
