"""A random LongCat transformer that is small enough to train in seconds, and encoded pictures in memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import LongCatImageTransformer2DModel

from longcat_pack.longcat_backend.training.cache import Cache
from longcat_pack.longcat_backend.training.preservation import Subject
from longcat_pack.longcat_backend.transformer import VelocityModel

WIDTH = 32  # of the text embeddings
TOKENS = 12
CONFIG: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": [4, 6, 6],
}


def transformer(dtype: torch.dtype = torch.float32) -> LongCatImageTransformer2DModel:
    """The same random weights at every call, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LongCatImageTransformer2DModel(**CONFIG)
    return model.to(dtype).eval().requires_grad_(False)


def velocity_model(dtype: torch.dtype = torch.float32) -> VelocityModel:
    """The transformer as training takes it."""
    return VelocityModel(transformer(dtype))


@dataclass(frozen=True)
class Example:
    """One encoded picture, like ``encoded.Example``."""

    latent: torch.Tensor
    text: torch.Tensor
    empty: torch.Tensor
    reference: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def example(seed: int, height: int = 4, width: int = 4, edit: bool = False, masked: bool = False) -> Example:
    """Random numbers of a latent's and a text's shapes; sizes in latent pixels."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(16, height, width, generator=generator)
    text, empty = torch.randn(2, TOKENS, WIDTH, generator=generator)
    reference = torch.randn(16, height, width, generator=generator) if edit else None
    mask = 0.05 + 0.95 * torch.rand(1, height, width, generator=generator) if masked else None
    return Example(latent, text, empty, reference, mask)


@dataclass
class Pictures:
    """Encoded pictures in memory, like ``encoded.EncodedDataset``."""

    examples: list[Example]
    held_out: tuple[int, ...] = ()
    identity: str = "pictures"
    dropout: float = 0.0
    subjects: tuple[Subject, ...] = ()
    store: Cache = field(default_factory=lambda: Cache(Path()))
    buckets: dict[tuple[int, int], tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.buckets = {}
        for index, each in enumerate(self.examples):
            if index not in self.held_out:
                size = each.latent.shape[2] * 8, each.latent.shape[1] * 8
                self.buckets[size] = (*self.buckets.get(size, ()), index)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def pictures(count: int = 5, **settings: Any) -> Pictures:
    """Square pictures, and two of another size."""
    examples = [example(seed) for seed in range(count)] + [example(seed + 100, 4, 8) for seed in range(2)]
    return Pictures(examples, **settings)


def preserving(folder: Path, edit: bool = False, **settings: Any) -> Pictures:
    """Pictures of two sizes, and three subjects of those sizes to be drawn as before, kept in a folder."""
    examples = [example(seed, edit=edit) for seed in range(3)] + [example(9, 4, 8, edit=edit)]
    drawn = [(example(seed, 4, width, edit), (width * 8, 32)) for seed, width in ((50, 4), (51, 8), (52, 4))]
    subjects = tuple(Subject(str(place), e.text, size, e.reference) for place, (e, size) in enumerate(drawn))
    return Pictures(examples, subjects=subjects, store=Cache(folder), **settings)
