"""Training pictures, composed on the device from masks that are rendered once."""

from __future__ import annotations

import multiprocessing
import random
from itertools import product

import numpy as np
import torch

from tests.scoring.characters import CHARACTERS, character_mask
from tests.scoring.scenes import (
    CHARACTER_SIZE,
    IMAGE_SIZE,
    PALETTE,
    PLACES,
    RADII,
    SHAPES,
    Jitter,
    coverage,
    ink_mask,
    shape_mask,
)

PLACEMENTS = tuple(product(SHAPES, RADII, PLACES))
LARGE = tuple(i for i, (_, size, _) in enumerate(PLACEMENTS) if size == CHARACTER_SIZE)


def _jitter(shape: str, size: str, place: str, variant: int) -> Jitter:
    return Jitter.sample(random.Random(f"{shape}/{size}/{place}/{variant}"))


def _placement_mask(task: tuple[str, str, str, int]) -> np.ndarray:
    shape, size, place, _ = task
    return np.rint(shape_mask(shape, size, place, _jitter(*task)) * 255).astype(np.uint8)


def _ink_mask(task: tuple[str, str, str, str, int]) -> np.ndarray:
    character, *placement, variant = task
    shape, size, place = placement
    return np.rint(ink_mask(character, place, _jitter(shape, size, place, variant)) * 255).astype(np.uint8)


def _turned_mask(rng: random.Random) -> np.ndarray:
    inside = SHAPES[rng.choice(list(SHAPES))]
    angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(8, 50)
    c, s = np.cos(angle), np.sin(angle)
    centre = (rng.uniform(0, IMAGE_SIZE), rng.uniform(0, IMAGE_SIZE))
    return coverage(lambda x, y: inside(c * x - s * y, s * x + c * y), centre, radius)


def _character_mask(rng: random.Random) -> np.ndarray:
    place = (rng.uniform(16, IMAGE_SIZE - 16), rng.uniform(16, IMAGE_SIZE - 16))
    return character_mask(rng.choice(CHARACTERS), place, rng.uniform(20, 80), IMAGE_SIZE)


def _free_mask(index: int) -> np.ndarray:
    rng = random.Random(f"free/{index}")
    mask = _character_mask(rng) if rng.random() < 0.3 else _turned_mask(rng)
    return np.rint(mask * 255).astype(np.uint8)


def placement_masks(variants: int) -> torch.Tensor:
    """Masks (placements, variants, 128, 128) uint8: each PLACEMENTS entry, jittered `variants` times."""
    tasks = [(*placement, variant) for placement in PLACEMENTS for variant in range(variants)]
    with multiprocessing.Pool() as pool:
        masks = np.stack(pool.map(_placement_mask, tasks, chunksize=16))
    return torch.from_numpy(masks).unflatten(0, (len(PLACEMENTS), variants))


def ink_masks(variants: int) -> torch.Tensor:
    """Masks (46, large placements, variants, 128, 128) uint8 of the characters, each jittered as its shape."""
    places = [PLACEMENTS[index] for index in LARGE]
    tasks = [(c, *place, variant) for c in CHARACTERS for place in places for variant in range(variants)]
    with multiprocessing.Pool() as pool:
        masks = np.stack(pool.map(_ink_mask, tasks, chunksize=16))
    return torch.from_numpy(masks).unflatten(0, (len(CHARACTERS), len(LARGE), variants))


def free_masks(count: int) -> torch.Tensor:
    """Masks (count, 128, 128) uint8 of turned shapes and characters anywhere: the VAE is to draw more than scenes."""
    with multiprocessing.Pool() as pool:
        return torch.from_numpy(np.stack(pool.map(_free_mask, range(count), chunksize=16)))


def palette(device: torch.device) -> torch.Tensor:
    """The palette (8, 3) in 0..1, in the order of PALETTE."""
    return torch.tensor(list(PALETTE.values()), device=device) / 255


def paint(masks: torch.Tensor, background: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, 128, 128) in -1..1: `colour` (B, 3) through uint8 masks (B, 128, 128) over `background`.

    `background` is (B, 3) or already a picture (B, 3, 128, 128); both are in 0..1. A batch of one fits any.
    """
    alpha = masks[:, None] / 255
    background = background[:, :, None, None] if background.ndim == 2 else background
    return (background * (1 - alpha) + colour[:, :, None, None] * alpha) * 2 - 1


class VaePictures:
    """An endless stream of pictures for the VAE: scenes, and scenes with free colours, slopes and a second layer.

    The second layer is a character on a large shape, or anything anywhere.
    """

    def __init__(self, placements: torch.Tensor, inks: torch.Tensor, free: torch.Tensor, device: torch.device) -> None:
        self.masks = torch.cat([placements.flatten(0, 1), free]).to(device)
        self.large = placements[list(LARGE)].flatten(0, 1).to(device)
        self.inks = inks.flatten(1, 2).to(device)
        self.palette = palette(device)
        ramp = torch.linspace(-1, 1, IMAGE_SIZE, device=device)
        self.plane = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"))

    def _colours(self, count: int) -> torch.Tensor:
        device = self.palette.device
        fixed = self.palette[torch.randint(len(self.palette), (count,), device=device)]
        free = torch.rand(count, 3, device=device)
        return torch.where(torch.rand(count, 1, device=device) < 0.6, fixed, free)

    def _layers(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two masks (count, 128, 128) for each picture; the second is often empty."""
        device = self.palette.device
        chance = torch.rand(count, 1, 1, device=device)
        large = torch.randint(len(self.large), (count,), device=device)
        ink = self.inks[torch.randint(len(self.inks), (count,), device=device), large]
        first, second = (self.masks[torch.randint(len(self.masks), (count,), device=device)] for _ in range(2))
        written = chance < 0.5
        return torch.where(written, self.large[large], first), torch.where(written, ink, second * (chance > 0.85))

    def batch(self, count: int) -> torch.Tensor:
        """`count` fresh pictures (count, 3, 128, 128) in -1..1."""
        device = self.palette.device
        sloped = torch.rand(count, 1, 1, 1, device=device) < 0.15
        slope = torch.einsum("bcd,dhw->bchw", torch.randn(count, 3, 2, device=device) * 0.15, self.plane)
        ground = (self._colours(count)[:, :, None, None] + slope * sloped).clamp(0, 1)
        first, second = self._layers(count)
        picture = paint(first, ground, self._colours(count)) / 2 + 0.5
        return paint(second, picture, self._colours(count))
