"""Encoding once, and the cache on disk: exact, keyed by content, and whole whatever happens to it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import cache, dataset, encoded
from longcat_pack.longcat_backend.training.cache import Cache
from longcat_pack.longcat_backend.training.dataset import Dataset, DatasetSettings
from longcat_pack.longcat_backend.training.encoded import EncodedDataset, encode


class FakeEncoders:
    """Means of pixels for latents, code points for text with equal pads; counts what it is asked."""

    def __init__(self, vae: str = "vae", encoder: str = "encoder", dtype: torch.dtype = torch.float32) -> None:
        self.vae_identity = vae
        self.encoder_identity = encoder
        self.dtype = dtype
        self.pictures = 0
        self.texts: list[tuple[str, bool]] = []

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        self.pictures += 1
        means = torch.nn.functional.avg_pool2d(pixels, 8).mean(dim=1, keepdim=True)
        return means * torch.arange(1, 17).view(1, 16, 1, 1)

    def text(self, prompt: str, reference: torch.Tensor | None) -> torch.Tensor:
        self.texts.append((prompt, reference is not None))
        embeddings = torch.full((512, 6), -0.125)
        embeddings[: len(prompt)] = torch.tensor([float(ord(letter)) for letter in prompt]).view(-1, 1) / 7
        if reference is not None:
            embeddings = torch.cat([reference.mean(dim=(0, 2, 3)).repeat(2)[None], embeddings])
        return embeddings.to(self.dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for index, size in enumerate([(64, 64), (96, 64), (64, 64), (64, 64)]):
        Image.new("RGB", size, (40 * index, 10, 20)).save(place / f"{index}.png")
        (place / f"{index}.txt").write_text(f"caption {index}", encoding="utf-8")
    return place


@pytest.fixture
def read(folder: Path) -> Callable[..., Dataset]:
    def call(**settings: Any) -> Dataset:
        values = {"folder": folder.name, "resolutions": "64", "grid": 16, "held_out": 0.25, **settings}
        return dataset.read_folder(DatasetSettings(**values), [folder.parent])

    return call


def equal(one: EncodedDataset, other: EncodedDataset) -> bool:
    """Whether all examples of two datasets are equal, bit for bit."""
    pairs = [(one[index], other[index]) for index in range(len(one))]
    return len(one) == len(other) and all(
        torch.equal(a.latent, b.latent) and torch.equal(a.text, b.text) and torch.equal(a.empty, b.empty)
        for a, b in pairs
    )


def test_examples_are_what_the_encoders_made(read: Callable[..., Dataset], tmp_path: Path) -> None:
    made, encoders = read(repeats=2), FakeEncoders()
    result = encode(made, encoders, tmp_path / "cache")
    assert len(result) == 4 and len(result.held_out) == 1 and result.dropout == 0.1
    assert sum(len(indices) for indices in result.buckets.values()) == 3 * 2
    for index, item in enumerate(made.items):
        example = result[index]
        assert torch.equal(example.latent, encoders.latents(item.pixels())[0])
        assert torch.equal(example.text, encoders.text(item.caption, None))
        assert torch.equal(example.empty, encoders.text("", None))
        assert example.reference is None and example.mask is None
        width, height = item.size
        assert example.latent.shape == (16, height // 8, width // 8) and example.latent.dtype == torch.float32


def test_pairs_and_masks_are_encoded_too(folder: Path, read: Callable[..., Dataset], tmp_path: Path) -> None:
    for index, size in enumerate([(64, 64), (96, 64), (64, 64), (64, 64)]):
        for kind in ("references", "masks"):
            (folder / kind).mkdir(exist_ok=True)
            Image.new("RGB", size, (9, 50 * index, 30)).save(folder / kind / f"{index}.png")
    made, encoders = read(), FakeEncoders()
    result = encode(made, encoders, tmp_path / "cache")
    assert set(encoders.texts) == {(text, True) for text in ("", *(f"caption {index}" for index in range(4)))}
    for index, item in enumerate(made.items):
        example, reference = result[index], item.reference_pixels()
        assert reference is not None and item.mask is not None
        assert example.reference is not None and example.mask is not None
        assert torch.equal(example.reference, encoders.latents(reference)[0])
        assert torch.equal(example.text, encoders.text(item.caption, reference))
        assert torch.equal(example.empty, encoders.text("", reference))
        assert torch.equal(example.mask, item.mask.weights(item.size))
        assert example.mask.shape[1:] == example.latent.shape[1:]


@pytest.mark.parametrize("edit", [False, True])
def test_prompts_to_preserve_are_encoded_at_the_sizes_of_the_pictures(
    edit: bool, folder: Path, read: Callable[..., Dataset], tmp_path: Path
) -> None:
    (folder / "references").mkdir()
    for index, size in enumerate([(64, 64), (96, 64), (64, 64), (64, 64)] if edit else []):
        Image.new("RGB", size, (9, 50 * index, 30)).save(folder / "references" / f"{index}.png")
    made, encoders = read(), FakeEncoders()
    result = encode(made, encoders, tmp_path / "cache", preserve=["a circle", "圆形"])
    without = encode(made, encoders, tmp_path / "cache")
    assert equal(result, without) and result.identity == without.identity and not without.subjects
    assert len(result.subjects) == 64
    references = {item.name: item.reference_pixels() for item in made.items}
    seen = set()
    for place, subject in enumerate(result.subjects):
        prompt, reference = ("a circle", "圆形")[place % 2], None
        if edit:
            latents = {name: encoders.latents(pixels)[0] for name, pixels in references.items() if pixels is not None}
            (name,) = (name for name, latent in latents.items() if torch.equal(latent, subject.reference))
            reference = references[name]
        assert edit or subject.reference is None
        assert torch.equal(subject.text, encoders.text(prompt, reference))
        seen.add(subject.identity)
    # Every prompt comes at every size, and with every picture before the edit.
    assert len(seen) == 2 * (4 if edit else len({item.size for item in made.items}))


@pytest.mark.parametrize("edit", [False, True])
def test_pictures_to_preserve_are_not_learnt_but_edited_as_before(
    edit: bool, folder: Path, read: Callable[..., Dataset], tmp_path: Path
) -> None:
    for name in ("references", "preserved"):
        (folder / name).mkdir()
    for index in range(4 if edit else 0):
        Image.new("RGB", (64, 64), (9, 50 * index, 30)).save(folder / "references" / f"{index}.png")
    alone = read()
    for index in range(3):
        Image.new("RGB", (64, 96), (200, 50 * index, 90)).save(folder / "preserved" / f"{index}.png")
    (folder / "preserved" / "broken.png").write_bytes(b"no picture")
    made, encoders = read(), FakeEncoders()
    assert [item.name for item in made.items] == [item.name for item in alone.items]
    assert [item.name for item in made.preserved] == ["preserved/0.png", "preserved/1.png", "preserved/2.png"]
    assert [problem.name for problem in made.problems if problem.skipped] == ["preserved/broken.png"]
    assert "to preserve 保留: 3" in made.report() and "to preserve" not in alone.report()
    assert made.identity() != alone.identity()
    subjects = encode(made, encoders, tmp_path / "cache", preserve=["a circle"]).subjects
    for place, subject in enumerate(subjects):
        item = made.preserved[place % 3]
        assert subject.size == item.size != made.items[0].size
        assert torch.equal(subject.text, encoders.text("a circle", item.reference_pixels()))
        assert (item.reference is not None) == edit == (subject.reference is not None)
        assert subject.reference is None or torch.equal(subject.reference, encoders.latents(item.pixels())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("real", [0, 1, 300, 511, 512])
def test_equal_pads_are_stored_once_and_come_back_exactly(real: int, dtype: torch.dtype) -> None:
    embeddings = torch.randn(512, 8).to(dtype)
    embeddings[real:] = embeddings[-1].clone()
    stored = encoded._without_pads(embeddings)
    assert len(stored["text"]) + len(stored["pad"]) == min(real, 511) + 1
    back = encoded._with_pads(stored)
    assert back.dtype == dtype and torch.equal(back, embeddings)


def test_pads_that_differ_in_a_sign_of_zero_stay_apart() -> None:
    embeddings = torch.zeros(4, 2)
    embeddings[1, 0] = -0.0
    assert len(encoded._without_pads(embeddings)["text"]) == 2
    assert torch.equal(encoded._with_pads(encoded._without_pads(embeddings)).signbit(), embeddings.signbit())


def test_nothing_is_encoded_twice(read: Callable[..., Dataset], tmp_path: Path) -> None:
    encoders, place = FakeEncoders(), tmp_path / "cache"
    first = encode(read(), encoders, place)
    assert encoders.pictures == 4 and sorted(text for text, _ in encoders.texts) == [
        "",
        *(f"caption {i}" for i in range(4)),
    ]
    assert "9 encoded 新编码, 0 reused" in first.report and "9 files" in first.report
    again = encode(read(), encoders, place)
    assert encoders.pictures == 4 and len(encoders.texts) == 5
    assert "0 encoded 新编码, 9 reused" in again.report
    assert again.identity == first.identity and equal(again, first)


def test_only_what_changed_is_encoded_again(folder: Path, read: Callable[..., Dataset], tmp_path: Path) -> None:
    encoders, place = FakeEncoders(), tmp_path / "cache"
    identities = {encode(read(), encoders, place).identity}

    def asked(made: Dataset, **changed: str) -> tuple[int, int]:
        others = FakeEncoders(**changed)
        identities.add(encode(made, others, place).identity)
        return others.pictures, len(others.texts)

    (folder / "0.txt").write_text("another caption", encoding="utf-8")
    assert asked(read()) == (0, 1)
    Image.new("RGB", (64, 64), "white").save(folder / "1.png")
    assert asked(read()) == (1, 0)
    assert asked(read(), vae="other VAE") == (4, 0)
    assert asked(read(), encoder="other encoder") == (0, 5)
    assert asked(read(resolutions="128")) == (4, 0)
    assert len(identities) == 6
    (folder / "2.png").rename(folder / "moved.png")
    (folder / "2.txt").rename(folder / "moved.txt")
    assert asked(read()) == (0, 0)


def test_another_template_is_another_text(
    read: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(read(), FakeEncoders(), tmp_path)
    monkeypatch.setattr(encoded.prompts, "SUFFIX", "other")
    encoders = FakeEncoders()
    encode(read(), encoders, tmp_path)
    assert (encoders.pictures, len(encoders.texts)) == (0, 5)


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "header": lambda data: data.replace(b'"F32"', b'"I32"'),
    "other file": lambda data: b"\xff" * len(data),
    "more": lambda data: data + b"\0" * 8,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_noticed_and_made_again(
    kind: str, read: Callable[..., Dataset], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "cache"
    first = encode(read(), FakeEncoders(), place)
    whole = encode(read(), FakeEncoders(), tmp_path / "other")
    for path in place.rglob("*.safetensors"):
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(LongCatError, match="gone or damaged"):
        first[0]
    encoders = FakeEncoders()
    again = encode(read(), encoders, place)
    # One was taken away when the example was asked for.
    assert "8 damaged and made again" in again.report and "9 encoded" in again.report
    assert "is damaged and is made again" in caplog.text
    assert encoders.pictures == 4 and equal(again, whole)


def files_below(place: Path) -> list[str]:
    return sorted(path.name for path in place.rglob("*") if path.is_file())


def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing_half_written(
    read: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, real = tmp_path / "cache", cache._write
    written = 0

    def write(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written > 3:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    monkeypatch.setattr(cache, "_write", write)
    with pytest.raises(LongCatError) as caught:
        encode(read(), FakeEncoders(), place)
    assert "No space left on device" in caught.value.en and "Free some space" in caught.value.en
    assert "请在该处腾出空间" in caught.value.zh
    assert len(files_below(place)) == 3 and not [name for name in files_below(place) if name.endswith(".partial")]
    monkeypatch.setattr(cache, "_write", real)
    assert "6 encoded 新编码, 3 reused" in encode(read(), FakeEncoders(), place).report


def test_a_cache_that_cannot_be_written_ends_in_a_sentence(read: Callable[..., Dataset], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(LongCatError, match="cannot be used: "):
        encode(read(), FakeEncoders(), tmp_path / "file")
    with pytest.raises(LongCatError, match="cannot be used: "):
        encode(read(), FakeEncoders(), tmp_path / "file" / "below")


def test_rights_that_are_missing_end_in_a_sentence(
    read: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(cache.os, "replace", refuse)
    with pytest.raises(LongCatError, match="cannot be used: Permission denied"):
        encode(read(), FakeEncoders(), tmp_path / "cache")
    assert not files_below(tmp_path / "cache")


def test_an_interruption_keeps_what_is_done(read: Callable[..., Dataset], tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        assert total == 9
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(read(), FakeEncoders(), tmp_path, progress)
    encoders = FakeEncoders()
    assert "5 encoded 新编码, 4 reused" in encode(read(), encoders, tmp_path).report
    # Pictures come before texts, so that VAE and text encoder take turns once.
    assert encoders.pictures == 0 and len(encoders.texts) == 5


def test_what_an_ended_program_left_is_swept_away_when_it_is_old(tmp_path: Path) -> None:
    store = Cache(tmp_path)
    store.write("ab12", {"x": torch.ones(1)})
    old, young = (tmp_path / "ab" / f".ab12.{name}.partial" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    past = time.time() - cache.STALE_SECONDS - 60
    os.utime(old, (past, past))
    store.sweep()
    assert not old.exists() and young.exists()
    assert store.size()[0] == 1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("latents", torch.zeros(1, 16, 7, 8)),
        ("latents", torch.full((1, 16, 8, 8), float("nan"))),
        ("text", torch.zeros(1, 512, 6)),
        ("text", torch.full((512, 6), float("inf"))),
    ],
    ids=["latent shape", "latent NaN", "text shape", "text infinity"],
)
def test_what_encoders_give_is_checked(
    name: str, wrong: torch.Tensor, read: Callable[..., Dataset], tmp_path: Path
) -> None:
    encoders = FakeEncoders()
    setattr(encoders, name, lambda *_: wrong)
    with pytest.raises(LongCatError, match=r"Encoding '\d.png' gave"):
        encode(read(), encoders, tmp_path)


TRAINER = """
import sys, time
from pathlib import Path
import torch
from longcat_backend.training.dataset import DatasetSettings, read_folder
from longcat_backend.training.encoded import encode

folder, cache = Path(sys.argv[1]), Path(sys.argv[2])

class Encoders:
    vae_identity, encoder_identity = "vae", "encoder"
    def latents(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels, 8).mean(1, keepdim=True).repeat(1, 16, 1, 1)
    def text(self, prompt, reference):
        return torch.full((512, 512), float(len(prompt))) + torch.arange(512.0)[:, None]

made = read_folder(DatasetSettings(folder=folder.name, resolutions="64", grid=16), [folder.parent])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(8):
    result = encode(made, Encoders(), cache / str(turn))
    assert result.store.rebuilt == 0
    for index, item in enumerate(made.items):
        assert torch.equal(result[index].latent, Encoders().latents(item.pixels())[0])
        assert torch.equal(result[index].text, Encoders().text(item.caption, None))
print("done", result.identity, flush=True)
"""


def test_two_trainers_at_once_on_one_cache(folder: Path, tmp_path: Path, pack_dir: Path) -> None:
    place = tmp_path / "cache"
    command = [sys.executable, "-c", TRAINER, str(folder), str(place)]
    both = [
        subprocess.Popen(command, cwd=pack_dir, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = []
    try:
        for trainer in both:
            assert trainer.stdout is not None and trainer.stdout.readline() == "ready\n"
        for trainer in both:
            assert trainer.stdin is not None
            trainer.stdin.write("go\n")
            trainer.stdin.flush()
        said = [trainer.communicate()[0] for trainer in both]
    finally:
        for trainer in both:
            trainer.kill()
            trainer.wait()
    assert [trainer.returncode for trainer in both] == [0, 0]
    assert said[0].startswith("done ") and said[0] == said[1]
    names = files_below(place)
    assert len(names) == 8 * 9 and all(name.endswith(".safetensors") for name in names)


def test_a_file_that_is_replaced_while_it_is_read_is_never_torn(tmp_path: Path) -> None:
    store, values = Cache(tmp_path), torch.randn(200_000)
    store.write("ab", {"x": values})
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            Cache(tmp_path).write("ab", {"x": values})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            tensors = store.read("ab")
            assert tensors is not None and torch.equal(tensors["x"], values)
    finally:
        stop.set()
        writer.join()
    assert store.rebuilt == 0 and files_below(tmp_path) == ["ab.safetensors"]
