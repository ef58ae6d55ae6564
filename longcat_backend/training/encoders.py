"""VAE and text encoder of a checkpoint for training without ComfyUI."""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from torch import nn

from .. import editing, labelled_grid, prompts, text_encoder, vision
from ..checkpoints import Checkpoint, audit, build, shapes
from ..identity import of_weights


class CheckpointEncoders:
    """See ``encoded.Encoders``; read from the checkpoint when they are made."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Of a checkpoint; an edit flavour's text encoder sees the picture too.

        Args:
            dtype: of the text encoder; the VAE is in float32.

        Raises:
            LongCatError: see :func:`text_encoder.load_text_encoder` and :func:`vision.load_vision`; or the VAE's
                weights do not fit its config.
        """
        self._device = device
        self._tokenizer = text_encoder.load_tokenizer(checkpoint)
        self._encoder = text_encoder.load_text_encoder(checkpoint, self._tokenizer, dtype).to(device)
        edits = checkpoint.flavour.edits
        self._vision = vision.load_vision(checkpoint, dtype).to(device) if edits else None
        self._vae = load_vae(checkpoint).to(device)
        config = checkpoint.configs["vae"]
        self._scale, self._shift = config["scaling_factor"], config["shift_factor"]
        self.encoder_identity = of_weights(_weights(self._encoder, self._vision), dtype)
        self.vae_identity = of_weights(_weights(self._vae), self._scale, self._shift)

    @torch.no_grad()
    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """(1, 3, height, width) in -1..1 to (1, 16, height / 8, width / 8): posterior mean, scaled, float32."""
        mean = self._vae.encode(pixels.to(self._device, torch.float32)).latent_dist.mean
        return ((mean - self._shift) * self._scale).cpu()

    @torch.no_grad()
    def text(self, prompt: str, reference: torch.Tensor | None) -> torch.Tensor:
        """A prompt, with the picture to edit (1, 3, height, width) in -1..1, to (length, hidden size)."""
        text_encoder.check_characters(prompt)
        ids = prompts.tokenize(self._tokenizer, prompt).ids
        if reference is None:
            return self._encoder.encode(ids, self._device)[0].cpu()
        editing.check_instruction(ids, editing.image_token(self._tokenizer))
        return editing.encode(self._encoder, ids, self._seen(reference), self._device)[0].cpu()

    @torch.no_grad()
    def pixels(self, latent: torch.Tensor) -> torch.Tensor:
        """(height, width, 3) in 0..1 of a scaled latent (1, 16, h, w)."""
        samples = latent.to(self._device, torch.float32) / self._scale + self._shift
        picture: torch.Tensor = self._vae.decode(samples).sample[0]
        return ((picture.clamp(-1, 1) + 1) / 2).movedim(0, -1).cpu()

    def to(self, device: torch.device) -> None:
        """Move everything, such as off the device while the transformer is trained."""
        self._device = device
        for part in (self._encoder, self._vision, self._vae):
            if part is not None:
                part.to(device)

    def _seen(self, reference: torch.Tensor) -> editing.EditInput:
        """What the encoder gets of the picture: half its size, as in the official pipeline."""
        assert self._vision is not None  # a dataset with references is refused for other flavours
        whole = labelled_grid.as_image(((reference[0] + 1) / 2).movedim(0, -1).cpu())
        half = editing.resized(whole, whole.width // 2, whole.height // 2)
        before, after = editing.split_template(self._tokenizer)
        return editing.EditInput(before, after, self._vision.encode(half, self._device))


def load_vae(checkpoint: Checkpoint) -> AutoencoderKL:
    """diffusers' VAE with the checkpoint's weights in float32, on the CPU.

    Raises:
        LongCatError: no VAE can be built from the config, or the weights do not fit it.
    """

    def empty() -> AutoencoderKL:
        with torch.device("meta"):
            return AutoencoderKL.from_config(dict(checkpoint.configs["vae"]))

    vae = build("vae", empty)
    audit("vae", shapes(vae.state_dict()), checkpoint.shapes("vae"))
    weights = checkpoint.weights("vae")
    vae.load_state_dict({key: value.to(torch.float32) for key, value in weights.items()}, assign=True)
    return vae.eval().requires_grad_(False)


def _weights(*parts: nn.Module | None) -> Iterator[tuple[str, torch.Tensor]]:
    for place, part in enumerate(parts):
        if part is not None:
            yield from ((f"{place}.{name}", tensor) for name, tensor in part.named_parameters())
