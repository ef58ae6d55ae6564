"""The diffusers engine: ``LongCatImageTransformer2DModel`` behind latents in and velocity out."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import LongCatImageTransformer2DModel
from torch import nn
from torch.nn import functional

from . import flow, latents, quantisation, quantised_state, rotary
from .checkpoints import Checkpoint, audit, build, shapes
from .component_files import Outlines
from .modulation import ModulationTable
from .precision import Preset
from .quantisation import Progress


class VelocityModel(nn.Module):
    """Latents, noise level and text to velocity; packing, positions and reference images are done here."""

    def __init__(self, transformer: LongCatImageTransformer2DModel, table: ModulationTable | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        self.table = table
        self.dtype: torch.dtype = transformer.dtype  # quantised layers would hide it
        rotary.install(transformer)

    def forward(
        self,
        samples: torch.Tensor,
        sigma: torch.Tensor,
        text: torch.Tensor,
        references: Sequence[torch.Tensor] = (),
        schedule: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity (noise minus image) of scaled latents.

        Args:
            samples: (batch, 16, h, w), scaled; odd sides are padded to a whole patch and cut again.
            sigma: (batch,) in 0..1.
            text: (batch, length, hidden size).
            references: scaled latents of reference images; they get the modalities 2, 3, …
            schedule: (steps,), the noise levels to come, for the modulation table.

        Returns:
            (batch, 16, h, w).
        """
        height, width = samples.shape[-2:]
        images = [_whole_patches(image) for image in (samples, *references)]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        text_ids, image_ids = latents.position_ids(text.shape[1], sizes)
        rotary.install(self.transformer).device = samples.device
        tokens = torch.cat([latents.pack(image) for image in images], dim=1)
        timestep = flow.model_timestep(sigma, tokens.dtype)
        with self._tabulated(timestep, schedule, tokens):
            velocity = self.transformer(
                hidden_states=tokens,
                timestep=timestep,
                encoder_hidden_states=text,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
        drawn = latents.token_count(samples)
        return latents.unpack(velocity[:, :drawn], *sizes[0])[..., :height, :width]

    def _tabulated(
        self, timestep: torch.Tensor, schedule: torch.Tensor | None, tokens: torch.Tensor
    ) -> AbstractContextManager[None]:
        if self.table is None:
            return nullcontext()
        levels = None if schedule is None else flow.model_timestep(schedule, tokens.dtype)

        def embed(timesteps: torch.Tensor) -> torch.Tensor:
            return functional.silu(self.transformer.time_embed(timesteps * 1000, tokens.dtype))

        return self.table.at(timestep, levels, tokens, embed)


def empty_transformer(config: Mapping[str, Any]) -> LongCatImageTransformer2DModel:
    """A transformer without storage, from the checkpoint's own config (the class defaults are Flux's).

    Raises:
        LongCatError: no transformer can be built from the config.
    """

    def empty() -> LongCatImageTransformer2DModel:
        with torch.device("meta"):
            return LongCatImageTransformer2DModel.from_config(dict(config))

    return build("transformer", empty)


def audited_shapes(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """The shapes of the transformer's weights, of quantised ones too, after the files were checked against its config.

    Raises:
        LongCatError: see :func:`empty_transformer`, :func:`component_files.read_outlines`, :func:`checkpoints.audit`
            and :func:`quantised_state.audit_quantised`.
    """
    model = empty_transformer(checkpoint.configs["transformer"])
    expected = shapes(model.state_dict())
    outlines = checkpoint.packed("transformer")
    if outlines is None:
        audit("transformer", expected, checkpoint.shapes("transformer"))
    else:
        quantised_state.audit_quantised(model, "transformer", outlines.tensors, outlines.packed)
    return expected


def audited_weights(checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """The transformer's tensors under their official names; audited before the first one is read.

    Raises:
        LongCatError: see :func:`audited_shapes`, :func:`quantised_state.require_plain` and
            :func:`component_files.read_weights`.
    """
    audited_shapes(checkpoint)
    quantised_state.require_plain(checkpoint, "transformer")
    return checkpoint.weights("transformer")


def load_transformer(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    table: ModulationTable | None = None,
    prepare: Callable[[nn.Module], None] = lambda transformer: None,
) -> VelocityModel:
    """The diffusers transformer with the checkpoint's weights in ``dtype``, on the CPU.

    Args:
        table: answers the modulation layers that ``prepare`` put in.
        prepare: exchanges layers of the transformer while it has no weights yet.

    Raises:
        LongCatError: see :func:`audited_weights`.
    """
    transformer = empty_transformer(checkpoint.configs["transformer"])
    weights = audited_weights(checkpoint)
    prepare(transformer)
    transformer.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
    return VelocityModel(transformer.eval().requires_grad_(False), table)


def stored_dtype(outlines: Outlines) -> torch.dtype:
    """The dtype of the weights that are not quantised in a file of the transformer; its layers compute in it."""
    return outlines.tensors["x_embedder.weight"].dtype


def load_quantised_transformer(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    preset: Preset,
    device: torch.device,
    progress: Progress,
    table: ModulationTable | None = None,
    prepare: Callable[[nn.Module], None] = lambda transformer: None,
) -> VelocityModel:
    """The diffusers transformer in a preset of :mod:`quantisation`, on the CPU.

    Layers that the checkpoint holds in that preset are taken as they are, and ``dtype`` has to be that of its files;
    others are quantised here.

    Args:
        device: where the model will run; layers are quantised there.
        progress: called with (layers quantised, layers in all).
        table, prepare: see :func:`load_transformer`.

    Raises:
        LongCatError: see :func:`load_transformer`, :func:`quantisation.quantise`,
            :func:`quantised_state.load_quantised` and :func:`quantised_state.require_plain`.
    """
    outlines = checkpoint.packed("transformer")
    if outlines is None or quantised_state.stored_preset(checkpoint, "transformer") != preset:
        model = load_transformer(checkpoint, dtype, table, prepare)
        quantisation.quantise(model.transformer, "transformer", preset, device, progress)
        return model
    transformer = empty_transformer(checkpoint.configs["transformer"])
    weights = checkpoint.weights("transformer")
    quantised_state.load_quantised(transformer, "transformer", weights, outlines.packed, device, prepare)
    return VelocityModel(transformer.eval(), table)


def _whole_patches(samples: torch.Tensor) -> torch.Tensor:
    """Wrap odd sides around to the next even size, as ComfyUI does, so that both engines draw the same."""
    height, width = samples.shape[-2:]
    return functional.pad(samples, (0, width % latents.PATCH, 0, height % latents.PATCH), mode="circular")
