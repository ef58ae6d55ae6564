"""What the model is to go on drawing as before: the base's own trajectories, from which the adapters may not lead away.

Prior preservation without pictures: before the first step the base draws the user's prompts, and every point on the way
is kept with the velocity that the base predicted there. While they learn, the adapters are held to some of them. They
are where pictures are drawn, at every noise level, and cost the base nothing any more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .. import flow, latents
from ..errors import LongCatError
from ..transformer import VelocityModel
from . import adapters, engine
from .cache import Cache, content_key
from .draws import seed_of
from .objective import Sample

# Changed whenever the same prompt and base would give other points.
VERSION = "euler, without guidance, 1"
STEPS = 8  # of a trajectory
FEWEST = 64  # trajectories; where there are fewer prompts, each is drawn several times
EVERY = 2  # so many samples are accompanied by one point, which counts for all of them


@dataclass(frozen=True)
class Subject:
    """What one trajectory draws.

    Attributes:
        identity: a hash of prompt, size and reference, and of the encoders.
        text: (length, hidden size).
        size: width and height in pixels.
        reference: (16, h, w), scaled, of the picture to edit.
    """

    identity: str
    text: torch.Tensor
    size: tuple[int, int]
    reference: torch.Tensor | None


class Data(Protocol):
    """Encoded subjects, see ``encoded.EncodedDataset``."""

    store: Cache

    @property
    def subjects(self) -> Sequence[Subject]: ...


class Preserved:
    """Points of the base's trajectories as samples, read from the cache when they are asked for."""

    def __init__(self, data: Data, keys: Sequence[tuple[str, ...]], seed: int) -> None:
        self._data = data
        self._keys = keys
        self._seed = seed

    def choose(self, step: int, place: int) -> Sample | None:
        """The point that a sample of a step is accompanied by, the same in every sitting; most samples have none.

        Raises:
            LongCatError: its file in the cache is gone or damaged.
        """
        if (step + place) % EVERY:
            return None
        number = seed_of("preservation", self._seed, step, place) % (len(self._keys) * STEPS)
        which, point = divmod(number, STEPS)
        subject = self._data.subjects[which]
        found = self._data.store.read(self._keys[which][point])
        if found is None:
            raise _gone(self._data.store)
        noisy, velocity = found["noisy"].float(), found["velocity"].float()
        return Sample(noisy, float(found["sigma"]), velocity, subject.text, subject.reference)


def rounds(prompts: Sequence[str]) -> list[tuple[int, str]]:
    """What is drawn, in order: every prompt equally often, so that there are at least FEWEST trajectories.

    The number before the prompt says which picture of the dataset lends its size: another one in each round.
    """
    times = -(-FEWEST // max(1, len(prompts)))
    return [(time + place, prompt) for time in range(times) for place, prompt in enumerate(prompts)]


def draw(
    model: VelocityModel,
    data: Data,
    model_identity: str,
    seed: int,
    device: torch.device,
    scheduler: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Preserved:
    """Let the base draw every subject, unless the cache has its trajectory already.

    Args:
        model: on its device; adapters do not count.
        model_identity: a hash of the base's weights.
        scheduler: the checkpoint's scheduler config.
        progress: called with (done, total) trajectories; may raise to stop, and what is done is kept.

    Raises:
        LongCatError: the cache cannot be written.
    """
    found = []
    for number, subject in enumerate(data.subjects):
        progress(number, len(data.subjects))
        # The base draws a subject that comes several times, each time from other noise.
        parts = (VERSION, STEPS, model_identity, str(model.dtype), dict(scheduler), subject.identity, seed, number)
        keys = tuple(content_key("preservation", *parts, point) for point in range(STEPS))
        if any(data.store.read(key) is None for key in keys):
            with torch.no_grad(), adapters.disabled(model), engine.attention(device):
                points = _trajectory(model, subject, seed_of("preserved", seed, number), device, scheduler)
                for key, tensors in zip(keys, points, strict=True):
                    data.store.write(key, tensors)
        found.append(keys)
    progress(len(found), len(found))
    return Preserved(data, found, seed)


def _trajectory(
    model: VelocityModel, subject: Subject, seed: int, device: torch.device, scheduler: Mapping[str, Any]
) -> Iterator[dict[str, torch.Tensor]]:
    """Every point but the last, where nothing is left to predict; in the dtype that the model computes in."""
    shape = latents.empty_latent(*subject.size, 1).shape
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    text = subject.text[None].to(device, model.dtype)
    references = () if subject.reference is None else (subject.reference[None].to(device, model.dtype),)
    levels = flow.sigmas(STEPS, latents.token_count(drawn), scheduler).to(device)
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        noisy = drawn.to(model.dtype)
        velocity = model(noisy, level[None], text, references)
        yield {"noisy": noisy[0].cpu(), "sigma": level.cpu(), "velocity": velocity[0].cpu()}
        drawn = drawn + (following - level) * velocity.float()


def _gone(store: Cache) -> LongCatError:
    return LongCatError(
        f"A trajectory of the preservation prompts in the training cache '{store.folder}' is gone or damaged. Queue "
        "the graph again: what is missing is drawn anew, and the training goes on from its last save.",
        f"训练缓存“{store.folder}”中保留提示词的一条轨迹丢失或损坏。"
        "请重新运行工作流：缺少的部分会重新绘制，训练从上次保存处继续。",
    )
