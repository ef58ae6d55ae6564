"""A training dataset: which pictures, at which sizes, with which captions; nothing of it is encoded yet."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import prompts
from ..errors import LongCatError
from . import buckets, captions, pictures, sources
from .buckets import Size
from .pictures import Picture
from .problems import Problem, UnusablePicture, listed
from .sources import Content, Source

# Above these a picture is left out, or named: how many times larger it becomes, and what is left of it.
MOST_ENLARGEMENT, NAMED_ENLARGEMENT = 4.0, 1.25
LEAST_KEPT, NAMED_KEPT = 0.25, 0.75
RATIO_TOLERANCE = 0.02
FEWEST_TO_HOLD_OUT = 4
MOST_HELD_OUT = 0.5
MOST_REPEATS = 1000

CountTokens = Callable[[str], int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DatasetSettings:
    """What the user sets; with a folder it is all that is needed to read the dataset again.

    Attributes:
        folder: as the user wrote it; empty for pictures that came from the graph.
        reference_folder: the pictures before the edit; empty for the folder ``references`` in the folder, if any.
        resolutions: see :func:`buckets.parse`.
        repeats: how often each picture comes in one epoch.
        caption_dropout: probability that a picture is trained with the empty prompt.
        held_out: share of the pictures that is never trained on, 0 to 0.5.
    """

    folder: str = ""
    reference_folder: str = ""
    resolutions: str = "1024"
    grid: int = buckets.GRIDS[0]
    repeats: int = 1
    trigger_word: str = ""
    caption_dropout: float = 0.1
    held_out: float = 0.0

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            LongCatError: see :func:`buckets.parse`; or a number is out of its range.
        """
        buckets.parse(self.resolutions, self.grid)
        _check_range("repeats", self.repeats, 1, MOST_REPEATS)
        _check_range("caption_dropout", self.caption_dropout, 0, 1)
        _check_range("held_out", self.held_out, 0, MOST_HELD_OUT)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DatasetSettings":
        """Settings from plain values; what is missing keeps its default.

        Raises:
            LongCatError: a key is unknown or a value is of another kind.
        """
        known = {each.name: type(each.default) for each in fields(cls)}
        for key, value in values.items():
            if key not in known:
                names = ", ".join(known)
                raise LongCatError(
                    f"The dataset has no setting '{key}'. There are: {names}.",
                    f"数据集没有设置项“{key}”。可用的有：{names}。",
                )
            fits = (int, float) if known[key] is float else known[key]
            if isinstance(value, bool) or not isinstance(value, fits):
                raise LongCatError(
                    f"The dataset's setting '{key}' is {value!r}; expected {known[key].__name__}.",
                    f"数据集设置项“{key}”为 {value!r}，应为 {known[key].__name__}。",
                )
        return cls(**values)


@dataclass(frozen=True)
class Item:
    """One picture, at one size, with one caption, not yet encoded."""

    name: str
    picture: Picture
    size: Size
    caption: str
    reference: Picture | None = None
    mask: Picture | None = None

    def image(self) -> Image.Image:
        """The picture as it is trained, RGB."""
        return self.picture.cut(self.size)

    def pixels(self) -> torch.Tensor:
        """(1, 3, height, width) in -1..1."""
        return self.picture.pixels(self.size)

    def reference_pixels(self) -> torch.Tensor | None:
        """The picture to edit, cut to the same size: (1, 3, height, width) in -1..1."""
        return None if self.reference is None else self.reference.pixels(self.size)

    def identity(self) -> list[Any]:
        """What it is by content, for a hash."""
        digests = [picture and picture.digest for picture in (self.picture, self.reference, self.mask)]
        return [digests, list(self.size), self.caption]


@dataclass(frozen=True)
class Dataset:
    """Travels along the LONGCAT_DATASET link.

    Attributes:
        held_out: indices of items that are never trained on.
        problems: of every picture that was found, those that were left out included.
        preserved: pictures without captions, which the preservation prompts edit, or are drawn in the sizes of.
    """

    items: tuple[Item, ...]
    held_out: tuple[int, ...]
    problems: tuple[Problem, ...]
    settings: DatasetSettings
    preserved: tuple[Item, ...] = ()

    @property
    def edits(self) -> bool:
        """Whether the pictures have references, as the edit flavours need."""
        return self.items[0].reference is not None

    @property
    def largest_size(self) -> Size:
        """Width and height of the largest picture of all; a pair counts side by side, since both become tokens."""
        sizes = (item.size for item in (*self.items, *self.preserved))
        width, height = max(sizes, key=lambda size: size[0] * size[1])
        return (2 * width, height) if self.edits else (width, height)

    def buckets(self) -> dict[Size, tuple[int, ...]]:
        """Width and height to the indices to train on, each as often as it comes in one epoch."""
        held_out = set(self.held_out)
        found: dict[Size, list[int]] = {}
        for index, item in enumerate(self.items):
            if index not in held_out:
                found.setdefault(item.size, []).extend([index] * self.settings.repeats)
        return {size: tuple(indices) for size, indices in found.items()}

    def identity(self) -> str:
        """A hash of the content: pixels, captions, sizes and settings, but no names or places."""
        settings = (self.settings.repeats, self.settings.caption_dropout)
        content = [[item.identity() for item in self.items], list(self.held_out), settings]
        content += [[item.identity() for item in self.preserved]] if self.preserved else []
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def report(self) -> str:
        """Counts for each bucket, then what was noticed, in both languages; up to 200 lines of it."""
        held_out = set(self.held_out)
        trained = Counter(item.size for index, item in enumerate(self.items) if index not in held_out)
        skipped = sum(problem.skipped for problem in self.problems)
        kind = "edit pairs 编辑图像对" if self.edits else "pictures 图像"
        distinct = len({item.name for item in self.items})
        masks = sum(item.mask is not None for item in self.items)
        lines = [
            f"{kind}: {distinct}   skipped 已跳过: {skipped}   items an epoch 每轮样本: "
            f"{sum(trained.values()) * self.settings.repeats}   held out 留出: {len(held_out)}   masks 遮罩: {masks}"
            + (f"   to preserve 保留: {len(self.preserved)}" if self.preserved else ""),
            *(f"{width}x{height}: {count}" for (width, height), count in sorted(trained.items())),
            *self._notes(),
        ]
        return "\n".join([*lines, *listed(self.problems)])

    def _notes(self) -> list[str]:
        if not self.settings.held_out or self.held_out:
            return []
        return [
            f"nothing is held out: that takes {FEWEST_TO_HOLD_OUT} different pictures "
            f"没有留出图像：至少需要 {FEWEST_TO_HOLD_OUT} 张不同的图像"
        ]


def read_folder(
    settings: DatasetSettings,
    roots: Sequence[Path],
    count_tokens: CountTokens | None = None,
    progress: Progress = lambda done, total: None,
) -> Dataset:
    """The dataset of a folder.

    Args:
        roots: folders below which may be read, see :func:`sources.resolve_folder`; also for relative names.
        count_tokens: how many tokens a caption has; without it long captions are not noticed.

    Raises:
        LongCatError: see :meth:`DatasetSettings.check`, :func:`sources.scan` and :func:`build`.
    """
    settings.check()
    folder = sources.resolve_folder(settings.folder, roots)
    references = sources.resolve_folder(settings.reference_folder, roots) if settings.reference_folder else None
    found, problems = sources.scan(folder, roots, references)
    learnt = build(settings, found, problems, count_tokens, progress)
    kept, outside = sources.preserved(folder, roots)
    items, unusable = _preserved(settings, kept, learnt.edits)
    return replace(learnt, preserved=items, problems=(*learnt.problems, *outside, *unusable))


def build(
    settings: DatasetSettings,
    found: Sequence[Source],
    problems: Sequence[Problem] = (),
    count_tokens: CountTokens | None = None,
    progress: Progress = lambda done, total: None,
) -> Dataset:
    """Open every picture once, choose its sizes, and note what is wrong.

    Raises:
        LongCatError: see :meth:`DatasetSettings.check`; a caption lacks its trigger word; or nothing is left.
    """
    settings.check()
    builder = _Builder(settings, any(source.reference is not None for source in found), count_tokens)
    builder.problems += problems
    for index, source in enumerate(found):
        progress(index, len(found))
        try:
            builder.add(source)
        except UnusablePicture as error:
            builder.problems.append(Problem(source.name, error.kind, error.detail))
    progress(len(found), len(found))
    if not builder.items:
        raise _nothing_left(builder.problems)
    held_out = _hold_out(builder.items, settings.held_out)
    return Dataset(tuple(builder.items), held_out, tuple(builder.problems), settings)


def _preserved(
    settings: DatasetSettings, found: Sequence[Source], edits: bool
) -> tuple[tuple[Item, ...], list[Problem]]:
    """Pictures to be edited as before, each at the first of its sizes, and what was noticed."""
    passes = buckets.parse(settings.resolutions, settings.grid)
    items, problems = [], []
    for source in found:
        try:
            picture, noticed = pictures.read(source.name, source.picture)
        except UnusablePicture as error:
            problems.append(Problem(source.name, error.kind, error.detail))
            continue
        problems += [Problem(source.name, kind) for kind in noticed]
        size = buckets.choose(passes, picture.width, picture.height)[0]
        items.append(Item(source.name, picture, size, "", reference=picture if edits else None))
    return tuple(items), problems


class _Builder:
    """Items and problems of one dataset."""

    def __init__(self, settings: DatasetSettings, edits: bool, count_tokens: CountTokens | None) -> None:
        self._settings = settings
        self._passes = buckets.parse(settings.resolutions, settings.grid)
        self._edits = edits
        self._count_tokens = count_tokens
        self._seen: dict[tuple[str, str], str] = {}
        self.items: list[Item] = []
        self.problems: list[Problem] = []

    def add(self, source: Source) -> None:
        """A picture at each of its sizes.

        Raises:
            UnusablePicture: it is left out.
        """
        caption = self._caption(source)
        if self._edits and source.reference is None:
            raise UnusablePicture("no reference")
        picture, noticed = pictures.read(source.name, source.picture)
        sizes = buckets.choose(self._passes, picture.width, picture.height)
        notes = self._check_sizes(picture, sizes)
        reference = _companion(source.name, source.reference, "bad reference")
        mask = _companion(source.name, source.mask, "bad mask")
        if mask is not None and not _same_ratio(mask, picture):
            raise UnusablePicture("bad mask", f"{mask.width}x{mask.height} ≠ {picture.width}x{picture.height}")
        if reference is not None and not _same_ratio(reference, picture):
            notes.append(Problem(source.name, "other ratio", f"{reference.width}x{reference.height}"))
        self.problems += [Problem(source.name, kind) for kind in noticed] + notes
        self.problems += self._check_caption(source, caption) + self._check_duplicate(source.name, picture, reference)
        self.items += [Item(source.name, picture, size, caption, reference, mask) for size in sizes]

    def _caption(self, source: Source) -> str:
        caption = captions.with_trigger(source.caption, self._settings.trigger_word.strip())
        if not caption:
            raise UnusablePicture("no caption")
        return caption

    def _check_sizes(self, picture: Picture, sizes: Sequence[Size]) -> list[Problem]:
        largest = max(sizes, key=lambda size: size[0] * size[1])
        place = largest, picture.width, picture.height
        factor, share = buckets.enlargement(*place), buckets.kept(*place)
        found = f"{picture.width}x{picture.height} → {largest[0]}x{largest[1]}"
        if share < LEAST_KEPT:
            raise UnusablePicture("too long", f"{found}, {share:.1%} < {LEAST_KEPT:.0%}")
        if factor > MOST_ENLARGEMENT:
            raise UnusablePicture("too small", f"{found}, x{factor:.1f} > x{MOST_ENLARGEMENT:.0f}")
        notes = []
        if factor > NAMED_ENLARGEMENT:
            notes.append(Problem(picture.name, "enlarged", f"{found}, x{factor:.1f}"))
        if share < NAMED_KEPT:
            notes.append(Problem(picture.name, "cropped", f"{found}, {share:.0%}"))
        return notes

    def _check_caption(self, source: Source, caption: str) -> list[Problem]:
        found = captions.inspect(source.name, caption)
        if not source.caption:
            found.append(Problem(source.name, "only trigger"))
        tokens = self._count_tokens(caption) if self._count_tokens else 0
        if tokens > prompts.MAX_TOKENS:
            found.append(Problem(source.name, "cut", f"{tokens}"))
        return found

    def _check_duplicate(self, name: str, picture: Picture, reference: Picture | None) -> list[Problem]:
        key = (picture.digest, reference.digest if reference else "")
        first = self._seen.setdefault(key, name)
        return [] if first == name else [Problem(name, "duplicate", first)]


def _companion(name: str, content: Content | None, kind: str) -> Picture | None:
    if content is None:
        return None
    try:
        return pictures.read(content.name if isinstance(content, Path) else name, content)[0]
    except UnusablePicture as error:
        raise UnusablePicture(kind, f"{error.kind}: {error.detail}") from error


def _same_ratio(one: Picture, other: Picture) -> bool:
    """Whether two pictures have one ratio, but for the rounding of their sides."""
    return abs(math.log(one.width * other.height / (one.height * other.width))) <= RATIO_TOLERANCE


def _hold_out(items: Sequence[Item], share: float) -> tuple[int, ...]:
    """Items of the pictures whose hashes come first: the same ones whatever the order and the names."""
    digests = sorted({item.picture.digest for item in items})
    if not share or len(digests) < FEWEST_TO_HOLD_OUT:
        return ()
    chosen = set(digests[: max(1, round(share * len(digests)))])
    return tuple(index for index, item in enumerate(items) if item.picture.digest in chosen)


def _nothing_left(problems: Sequence[Problem]) -> LongCatError:
    lines = "\n".join(listed(problems, 10))
    return LongCatError(
        "No picture of the dataset can be trained on. Mend what is listed here, and queue again.",
        f"数据集中没有可用于训练的图像。请处理以下问题后重新运行。\n{lines}",
    )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise LongCatError(
            f"{name} is {value}. Set it between {low} and {high}.",
            f"{name} 为 {value}。请设为 {low} 到 {high}。",
        )
