"""The frozen model that adapters are trained beside, in its base precision."""

import torch
from torch import nn

from .. import precision, quantised_state
from ..checkpoints import Checkpoint
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
            return load_transformer(checkpoint, preset.dtype or torch.bfloat16)
        model = load_quantised_transformer(checkpoint, torch.bfloat16, preset, device, progress)
        let_gradients_through(model.transformer)
        return model


def let_gradients_through(transformer: nn.Module) -> None:
    """Let products with torchao's fp8 weights take activations as they are; the fp8 product has no backward pass."""
    for layer in transformer.modules():
        if isinstance(layer, nn.Linear) and getattr(layer.weight, "act_quant_kwargs", None) is not None:
            layer.weight.act_quant_kwargs = None
