"""The graph's CLIP and VAE as the trainer's encoders: what it learns from is what the other nodes would give."""

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from PIL import Image
from torch import nn

from .. import identity, labelled_grid
from . import clip as clip_bridge
from . import editing
from . import vae as vae_bridge


class GraphEncoders:
    """See ``training.encoded.Encoders``."""

    def __init__(self, clip: comfy.sd.CLIP | None, vae: comfy.sd.VAE | None, node: str) -> None:
        """Of the CLIP and VAE of LongCatLoader.

        Args:
            node: the one that asks, for the message.

        Raises:
            LongCatError: they are others.
        """
        self.clip = clip_bridge.require_longcat(clip, node)
        self.vae = editing.require_vae(vae, node)
        scaling = vae_bridge.scaling(self.vae)
        self._scale, self._shift = scaling["scaling_factor"], scaling["shift_factor"]
        encoder = self.clip.cond_stage_model
        self.encoder_identity = identity.of_weights(
            _tensors(encoder.encoder), encoder.encoder.dtype, _patches(self.clip.patcher)
        )
        self.vae_identity = identity.of_weights(
            _tensors(self.vae.first_stage_model), self.vae.vae_dtype, _patches(self.vae.patcher), scaling
        )

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """(1, 3, height, width) in -1..1 to (1, 16, height / 8, width / 8): posterior mean, scaled, float32."""
        samples = self.vae.encode((pixels.movedim(1, -1) + 1) / 2)
        return (samples.float() - self._shift) * self._scale

    def text(self, prompt: str, reference: torch.Tensor | None) -> torch.Tensor:
        """(length, hidden size), as LongCatTextEncode gives it; with a reference as LongCatEditEncode does."""
        if reference is not None:
            return editing.embed(self.clip, _picture(reference), prompt)
        embeddings: torch.Tensor = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))[0][0]
        return embeddings[0]

    def pixels(self, latent: torch.Tensor) -> torch.Tensor:
        """(height, width, 3) in 0..1 of a scaled latent (1, 16, h, w)."""
        samples = latent.float().cpu() / self._scale + self._shift
        picture: torch.Tensor = self.vae.decode(samples.to(comfy.model_management.intermediate_device()))
        return picture[0].float().cpu()


def _picture(pixels: torch.Tensor) -> Image.Image:
    return labelled_grid.as_image((pixels[0].movedim(0, -1) + 1) / 2)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _patches(patcher: Any) -> str:
    """What is laid over the weights, as far as ComfyUI tells one set of patches from another."""
    return str(patcher.patches_uuid) if patcher.patches else ""
