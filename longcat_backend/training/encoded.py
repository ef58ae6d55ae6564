"""A dataset after VAE and text encoder have seen it: everything is encoded once, kept on disk, and read from there."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import latents, prompts
from ..errors import LongCatError
from .buckets import Size
from .cache import Cache, content_key
from .dataset import Dataset, Item
from .pictures import MASK_FLOOR, Picture
from .preservation import Subject, rounds

# Changed whenever the same input would give other values: how pictures are cut, how text is read and stored.
PICTURE_VERSION = "cover lanczos, centre crop, posterior mean, 1"
TEXT_VERSION = "quoted text by character, 1"

Tensors = dict[str, torch.Tensor]

logger = logging.getLogger(__name__)


class Encoders(Protocol):
    """Given by the host or by the headless program."""

    vae_identity: str
    encoder_identity: str

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """(1, 3, height, width) in -1..1 to (1, 16, height / 8, width / 8): posterior mean, shifted and scaled."""

    def text(self, prompt: str, reference: torch.Tensor | None) -> torch.Tensor:
        """A prompt, with the picture to edit (1, 3, height, width) in -1..1, to (length, hidden size)."""


@dataclass(frozen=True)
class Example:
    """One encoded picture.

    Attributes:
        latent: (16, h, w), shifted and scaled, float32.
        text: (length, hidden size).
        empty: (length, hidden size) of the empty prompt, with the same reference.
        reference: (16, h, w), shifted and scaled, for editing.
        mask: (1, h, w), weights of the loss from 0.05 to 1.
    """

    latent: torch.Tensor
    text: torch.Tensor
    empty: torch.Tensor
    reference: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Keys:
    """The cache's keys of one item."""

    latent: str
    text: str
    empty: str
    reference: str | None
    mask: str | None


@dataclass(frozen=True)
class SubjectKeys:
    """The cache's keys of what the base draws for preservation."""

    text: str
    reference: str | None
    size: Size


class Subjects(Sequence[Subject]):
    """What the base draws for preservation, read from the cache when it is asked for."""

    def __init__(self, keys: Sequence[SubjectKeys], store: Cache) -> None:
        self._keys = keys
        self._store = store

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: Any) -> Any:
        """The subject of an index.

        Raises:
            LongCatError: its file in the cache is gone or damaged.
        """
        keys = self._keys[index]
        reference = _read(self._store, keys.reference)["latent"] if keys.reference else None
        identity = content_key(keys.text, keys.reference, keys.size)
        return Subject(identity, _with_pads(_read(self._store, keys.text)), keys.size, reference)


class EncodedDataset:
    """Examples by index, read from the cache when they are asked for.

    Attributes:
        store: the cache.
        subjects: what the base draws for preservation; empty where there are no prompts for it.
        buckets: width and height in pixels to the indices to train on, each as often as it comes in one epoch.
        held_out: indices that are never trained on.
        identity: a hash of everything that training sees.
        dropout: probability of the empty prompt.
        report: what was encoded, and the cache's size, in both languages.
    """

    def __init__(
        self, dataset: Dataset, keys: tuple[Keys, ...], subjects: Sequence[SubjectKeys], store: Cache, report: str
    ) -> None:
        self.buckets: Mapping[Size, tuple[int, ...]] = dataset.buckets()
        self.held_out = dataset.held_out
        self.dropout = dataset.settings.caption_dropout
        encoded = [[each.latent, each.text, each.empty, each.reference, each.mask] for each in keys]
        self.identity = content_key(dataset.identity(), encoded)
        self.report = report
        self.store = store
        self.subjects = Subjects(subjects, store)
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Example:
        """The example of an item.

        Raises:
            LongCatError: its file in the cache is gone or damaged.
        """
        keys = self._keys[index]
        return Example(
            _read(self.store, keys.latent)["latent"],
            _with_pads(_read(self.store, keys.text)),
            _with_pads(_read(self.store, keys.empty)),
            _read(self.store, keys.reference)["latent"] if keys.reference else None,
            _read(self.store, keys.mask)["mask"] if keys.mask else None,
        )


def _read(store: Cache, key: str) -> Tensors:
    tensors = store.read(key)
    if tensors is None:
        raise LongCatError(
            f"A file of the training cache '{store.folder}' is gone or damaged ({key[:12]}…). Queue "
            "the graph again: what is missing is encoded anew, and the training goes on from its last save.",
            f"训练缓存“{store.folder}”中的一个文件丢失或损坏（{key[:12]}…）。"
            "请重新运行工作流：缺少的部分会重新编码，训练从上次保存处继续。",
        )
    return tensors


def encode(
    dataset: Dataset,
    encoders: Encoders,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    preserve: Sequence[str] = (),
) -> EncodedDataset:
    """Encode what the cache does not hold yet: first all pictures, then all captions, so that models take turns once.

    Args:
        cache: the folder to keep it in; several datasets and several trainers may share it.
        progress: called with (done, total); may raise to stop, and what is done is kept.
        preserve: prompts that the base draws for preservation, at the sizes of the dataset's pictures to preserve in
            turn, or of all its pictures where there are none; for edits, they edit these, or those before the edit.

    Raises:
        LongCatError: a file of the dataset changed, the cache cannot be written, or an encoder gives other shapes than
            expected, NaN or infinity.
    """
    store = Cache(cache)
    store.sweep()
    keys = tuple(_keys(item, encoders) for item in dataset.items)
    shown = dataset.preserved or dataset.items
    drawn = [(shown[place % len(shown)], prompt) for place, prompt in rounds(preserve)]
    subjects = [_subject_keys(item, prompt, encoders) for item, prompt in drawn]
    work: dict[str, Callable[[], Tensors]] = {}
    for (item, _), each in zip(drawn, subjects, strict=True):
        if item.reference is not None and each.reference is not None:
            work[each.reference] = _latent(item.reference, item.size, encoders)
    work |= _work(dataset, keys, encoders)
    for (item, prompt), each in zip(drawn, subjects, strict=True):
        work[each.text] = _text(item, prompt, encoders)
    made = 0
    for done, (key, make) in enumerate(work.items()):
        progress(done, len(work))
        if store.read(key) is None:
            store.write(key, make())
            made += 1
    progress(len(work), len(work))
    report = _report(store, made, len(work))
    logger.info("%s", report)
    return EncodedDataset(dataset, keys, subjects, store, report)


def _keys(item: Item, encoders: Encoders) -> Keys:
    width, height = item.size

    def mask(picture: Picture) -> str:
        return content_key("mask", PICTURE_VERSION, MASK_FLOOR, picture.digest, width, height)

    return Keys(
        _latent_key(item.picture, item.size, encoders),
        _text_key(item, item.caption, encoders),
        _text_key(item, "", encoders),
        _latent_key(item.reference, item.size, encoders) if item.reference else None,
        mask(item.mask) if item.mask else None,
    )


def _subject_keys(item: Item, prompt: str, encoders: Encoders) -> SubjectKeys:
    reference = _latent_key(item.reference, item.size, encoders) if item.reference else None
    return SubjectKeys(_text_key(item, prompt, encoders), reference, item.size)


def _latent_key(picture: Picture, size: Size, encoders: Encoders) -> str:
    return content_key("latent", PICTURE_VERSION, picture.digest, *size, encoders.vae_identity)


def _text_key(item: Item, prompt: str, encoders: Encoders) -> str:
    reference = None if item.reference is None else [item.reference.digest, *item.size]
    return content_key("text", _template(item), prompt, reference, encoders.encoder_identity)


def _template(item: Item) -> str:
    """What stands around a caption, as a hash."""
    if item.reference is None:
        before = prompts.TEXT_TO_IMAGE_PREFIX
    else:
        from .. import editing  # brings transformers, which is slow to import

        before = PICTURE_VERSION + editing.PREFIX
    text = f"{TEXT_VERSION}{prompts.MAX_TOKENS}{before}{prompts.SUFFIX}"
    return hashlib.sha256(text.encode()).hexdigest()


def _work(dataset: Dataset, keys: tuple[Keys, ...], encoders: Encoders) -> dict[str, Callable[[], Tensors]]:
    """What makes each key's tensors, once for each key, pictures first."""
    images: dict[str, Callable[[], Tensors]] = {}
    texts: dict[str, Callable[[], Tensors]] = {}
    for item, each in zip(dataset.items, keys, strict=True):
        images[each.latent] = _latent(item.picture, item.size, encoders)
        if item.reference is not None and each.reference is not None:
            images[each.reference] = _latent(item.reference, item.size, encoders)
        if item.mask is not None and each.mask is not None:
            images[each.mask] = _mask(item.mask, item.size)
        for key, prompt in ((each.text, item.caption), (each.empty, "")):
            texts[key] = _text(item, prompt, encoders)
    return {**images, **texts}


def _latent(picture: Picture, size: Size, encoders: Encoders) -> Callable[[], Tensors]:
    def make() -> Tensors:
        latent = encoders.latents(picture.pixels(size)).detach().float().cpu()
        width, height = (side // latents.PIXELS_PER_LATENT for side in size)
        _check(picture.name, latent, (1, latents.CHANNELS, height, width))
        return {"latent": latent[0]}

    return make


def _mask(picture: Picture, size: Size) -> Callable[[], Tensors]:
    return lambda: {"mask": picture.weights(size)}


def _text(item: Item, prompt: str, encoders: Encoders) -> Callable[[], Tensors]:
    def make() -> Tensors:
        embeddings = encoders.text(prompt, item.reference_pixels()).detach().cpu()
        _check(item.name, embeddings, tuple(embeddings.shape) if embeddings.ndim == 2 else ("length", "hidden"))
        return _without_pads(embeddings)

    return make


def _without_pads(embeddings: torch.Tensor) -> Tensors:
    """Embeddings (length, hidden size) with the equal rows at their end stored once, bit for bit."""
    rows = embeddings.contiguous().view(torch.uint8).reshape(len(embeddings), -1)
    other = (rows != rows[-1]).any(dim=1).nonzero()
    real = int(other[-1]) + 1 if len(other) else 0
    return {
        "text": embeddings[:real].clone(),
        "pad": embeddings[-1:].clone(),
        "pads": torch.tensor(len(embeddings) - real),
    }


def _with_pads(stored: Tensors) -> torch.Tensor:
    return torch.cat([stored["text"], stored["pad"].expand(int(stored["pads"]), -1)])


def _check(name: str, values: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    if tuple(values.shape) != expected or not torch.isfinite(values).all():
        found = tuple(values.shape) if tuple(values.shape) != expected else "NaN / infinity"
        raise LongCatError(
            f"Encoding '{name}' gave {found}; expected finite values of shape {expected}. Connect the CLIP and VAE of "
            "LongCatLoader, in a precision with more range (bf16 or fp32 in place of fp16).",
            f"编码“{name}”得到 {found}，应为形状 {expected} 的有限数值。请连接 LongCatLoader 的 CLIP 和 VAE，"
            "并使用范围更大的精度（用 bf16 或 fp32 代替 fp16）。",
        )


def _report(store: Cache, made: int, total: int) -> str:
    files, size = store.size()
    return (
        f"cache 缓存: {made} encoded 新编码, {total - made} reused 沿用, {store.rebuilt} damaged and made again "
        f"损坏后重建; {files} files 文件, {size / 2**20:.1f} MiB"
    )
