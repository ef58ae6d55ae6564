"""What the DiT is trained on: latents of the training scenes, with and without a character, and rows of captions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import LongCatImagePipeline

from tests.scoring.characters import CHARACTERS
from tests.scoring.scenes import CHARACTER_SIZE, LANGUAGES, PALETTE, Scene, caption, ink_colour, training_scenes
from tools.tiny.conditioning import TokenRows, tokenize
from tools.tiny.pictures import LARGE, PLACEMENTS, paint, palette
from tools.tiny.sampling import pack
from tools.tiny.vae import encode_means

PROMPT_WIDTH = 48  # tokens of prompt and pads in a training row; the longest caption has 35


@dataclass(frozen=True)
class Sizes:
    """How many pictures and captions there are of each scene."""

    captions: int = 12  # for each scene and language
    character_captions: int = 1  # for each large scene, character and language
    character_pictures: int = 3  # jitters of each large scene and character
    scene_limit: int | None = None  # fewer scenes, to try the program out


@dataclass
class Examples:
    """What the device holds. Row i shows one of the pictures `first[i]` to `first[i] + count[i] - 1`.

    The first `plain` rows are of scenes without a character, the others of scenes with one. The last row is the empty
    prompt.
    """

    latents: torch.Tensor  # (pictures, 64 tokens, 64 channels) bf16, scaled
    spread: torch.Tensor  # (pictures, 64 tokens) bf16, how much the characters of a scene differ there; 1 at the most
    rows: TokenRows
    first: torch.Tensor  # (N,) int64
    count: torch.Tensor  # (N,) int64
    plain: int


@torch.no_grad()
def _latents(pipeline: LongCatImagePipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Scaled tokens (B, 64, 64) bf16 of pictures (B, 3, 128, 128) in -1..1."""
    config = pipeline.vae.config
    return pack((encode_means(pipeline.vae, pictures) - config.shift_factor) * config.scaling_factor).bfloat16()


def _picture_latents(
    pipeline: LongCatImagePipeline, scenes: Sequence[Scene], masks: torch.Tensor, inks: torch.Tensor, pictures: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and spread of every scene in every jitter, then of every large scene with every character in some."""
    device = pipeline.vae.device
    masks, inks, colours = masks.to(device), inks.to(device), palette(device)
    plain: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    spread: list[torch.Tensor] = []
    for index, scene in enumerate(scenes):
        placement = PLACEMENTS.index((scene.shape, scene.size, scene.place))
        names = (scene.background, scene.colour, ink_colour(scene.background, scene.colour))
        ground, colour, ink = (colours[tuple(PALETTE).index(name)][None] for name in names)
        shown = paint(masks[placement], ground, colour)
        plain.append(_latents(pipeline, shown))
        if scene.size != CHARACTER_SIZE:
            continue
        drawn = []
        for jitter in ((index * pictures + k) % len(shown) for k in range(pictures)):
            bare = shown[jitter][None] / 2 + 0.5
            drawn.append(_latents(pipeline, paint(inks[:, LARGE.index(placement), jitter], bare, ink)))
        together = torch.stack(drawn, dim=1)
        written.append(together.flatten(0, 1))
        differ = together.float().std(dim=0).mean(-1)
        spread.append((differ / differ.amax(-1, keepdim=True)).bfloat16().repeat(len(together), 1))
    bare = torch.cat(plain)
    return torch.cat([bare, *written]), torch.cat([bare.new_zeros(bare.shape[:2]), *spread])


def prepare_examples(pipeline: LongCatImagePipeline, masks: torch.Tensor, inks: torch.Tensor, sizes: Sizes) -> Examples:
    """Encode the training scenes with the pipeline's VAE.

    `masks` come from `placement_masks`, `inks` from `ink_masks`, both with the same number of jitters.
    """
    device, scenes = pipeline.vae.device, training_scenes()[: sizes.scene_limit]
    rng, jitters = random.Random("training captions"), masks.shape[1]
    texts = [caption(s, lang, rng) for s in scenes for lang in LANGUAGES for _ in range(sizes.captions)]
    first = [scene * jitters for scene in range(len(scenes)) for _ in range(len(LANGUAGES) * sizes.captions)]
    count = [jitters] * len(texts)
    plain, base = len(texts), len(scenes) * jitters
    for scene in scenes:
        for character in CHARACTERS if scene.size == CHARACTER_SIZE else "":
            written = replace(scene, character=character)
            own = [caption(written, lang, rng) for lang in LANGUAGES for _ in range(sizes.character_captions)]
            texts += own
            first += [base] * len(own)
            count += [sizes.character_pictures] * len(own)
            base += sizes.character_pictures
    rows = tokenize(pipeline, [*texts, ""], PROMPT_WIDTH).to(device)
    latents, spread = _picture_latents(pipeline, scenes, masks, inks, sizes.character_pictures)
    if len(latents) != base:
        raise ValueError(f"expected {base} pictures, made {len(latents)}")
    return Examples(
        latents, spread, rows, torch.tensor(first, device=device), torch.tensor(count, device=device), plain
    )
