"""The frozen model that adapters are trained beside, in its base precision."""

import torch
from torch import nn

from .. import precision, quantised_state
from ..checkpoints import Checkpoint
from ..precision import Preset
from ..quantisation import Progress
from ..transformer import VelocityModel, load_quantised_transformer, load_transformer


def check(checkpoint: Checkpoint, base_precision: str) -> None:
    """Refuse a base precision other than that in which the checkpoint holds the transformer quantised.

    To be called early: everything is encoded before :func:`load_base` would refuse it.

    Raises:
        LongCatError: it is another one.
    """
    if quantised_state.stored_preset(checkpoint, "transformer") != precision.PRESETS[base_precision]:
        quantised_state.require_plain(checkpoint, "transformer")


def load_base(
    checkpoint: Checkpoint, base_precision: str, device: torch.device, progress: Progress = lambda done, total: None
) -> VelocityModel:
    """The transformer of a checkpoint for :func:`loop.train`, on the CPU.

    Args:
        base_precision: one of ``settings.BASE_PRECISIONS``.
        device: where the model will be trained; layers are quantised there, one at a time.
        progress: called with (layers quantised, layers in all).

    Raises:
        LongCatError: see :func:`transformer.load_transformer` and :func:`transformer.load_quantised_transformer`.
    """
    preset = precision.PRESETS[base_precision]
    with torch.inference_mode(False):
        if not preset.backend:
            return load_transformer(checkpoint, compute_dtype(preset, device))
        model = load_quantised_transformer(checkpoint, compute_dtype(preset, device), preset, device, progress)
        let_gradients_through(model.transformer)
        return model


def compute_dtype(preset: Preset, device: torch.device) -> torch.dtype:
    """What a base computes in on a device: the preset's own dtype; where that is the device's choice, mostly bf16.

    A CPU draws in fp32, so it trains in it, and in bf16 a step takes it twice as long. torchao's layers are bf16's.
    """
    if device.type == "cpu" and preset.backend == "quanto":
        return torch.float32
    return preset.dtype or torch.bfloat16


def let_gradients_through(transformer: nn.Module) -> None:
    """Let products with torchao's fp8 weights take activations as they are; the fp8 product has no backward pass."""
    for layer in transformer.modules():
        if isinstance(layer, nn.Linear) and getattr(layer.weight, "act_quant_kwargs", None) is not None:
            layer.weight.act_quant_kwargs = None
