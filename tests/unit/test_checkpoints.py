"""Find, resolve, identify, audit and verify checkpoints, without a host."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import checkpoints_broken as broken
import pytest
import torch

from longcat_pack.longcat_backend import checkpoints, component_files, flavours, text_encoder, verification
from longcat_pack.longcat_backend.errors import LongCatError


@pytest.fixture(scope="module")
def sound(pack_dir: Path) -> Path:
    return pack_dir / "demo" / "LongCat-Tiny"


def index_only(folder: Path, pipeline: str = flavours.TEXT_TO_IMAGE) -> Path:
    """A folder with nothing but a model_index.json."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}', encoding="utf-8")
    return folder


def test_a_sound_checkpoint_is_verified_and_its_headers_tell_its_shapes(sound: Path) -> None:
    checkpoint = checkpoints.open_checkpoint(sound)
    verification.verify(checkpoint)
    assert checkpoint.flavour.key == "final"
    for part in broken.WEIGHTS:
        assert checkpoint.shapes(part) == checkpoints.shapes(checkpoint.weights(part))


@pytest.mark.parametrize("case", broken.CASES)
def test_verification_finds_what_is_broken(case: str, sound: Path, tmp_path: Path) -> None:
    harm, words = broken.CASES[case]
    folder = broken.copy(sound, tmp_path / "Broken")
    harm(folder)
    with pytest.raises(LongCatError) as caught:
        verification.verify(checkpoints.open_checkpoint(folder))
    assert all(word in caught.value.en for word in words), caught.value.en
    assert str(caught.value) == f"{caught.value.en}\n{caught.value.zh}"


@pytest.mark.parametrize("case", broken.TOKENIZER_CASES)
def test_a_broken_tokenizer_is_named(case: str, sound: Path, tmp_path: Path) -> None:
    harm, words = broken.TOKENIZER_CASES[case]
    folder = broken.copy(sound, tmp_path / "Broken")
    harm(folder)
    with pytest.raises(LongCatError) as caught:
        text_encoder.load_tokenizer(checkpoints.open_checkpoint(folder))
    assert all(word in caught.value.en for word in words), caught.value.en


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(sound: Path) -> None:
    checkpoint = checkpoints.open_checkpoint(sound)
    tokenizer = text_encoder.load_tokenizer(checkpoint)
    tokenizer.add_tokens([f"<more{number}>" for number in range(1000)])
    with pytest.raises(LongCatError, match="different models"):
        text_encoder.load_text_encoder(checkpoint, tokenizer, torch.float32)


def test_a_file_that_may_not_be_read_is_named(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(component_files, "safe_open", refuse)
    with pytest.raises(LongCatError, match=r"vae/diffusion_pytorch_model\.safetensors.*Permission denied"):
        checkpoints.open_checkpoint(sound).weights("vae")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(LongCatError, match=r"model_index\.json.*Permission denied"):
        checkpoints.open_checkpoint(sound)
    assert checkpoints.list_checkpoints([sound.parent]) == {}


def test_shards_hold_the_same_weights(sound: Path, tmp_path: Path) -> None:
    folder = broken.copy(sound, tmp_path / "Sharded")
    broken.sharded(folder)
    single = component_files.read_weights(sound / "transformer")
    shards = component_files.read_weights(folder / "transformer")
    assert single.keys() == shards.keys()
    assert all(torch.equal(single[key], shards[key]) for key in single)


def test_two_weight_files_without_an_index_are_named(sound: Path, tmp_path: Path) -> None:
    folder = broken.copy(sound, tmp_path / "Two")
    shutil.copy(folder / broken.WEIGHTS["vae"], folder / "vae" / "second.safetensors")
    with pytest.raises(LongCatError, match=r"found 2.*second\.safetensors"):
        component_files.read_weights(folder / "vae")


def test_the_list_has_the_names_that_resolve(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    index_only(first / "A")
    index_only(first / "deep" / "er" / "B", flavours.EDIT)
    index_only(first / "far" / "too" / "deep" / "C")
    index_only(first / ".hidden" / "D")
    index_only(first / "Flux", "FluxPipeline")
    index_only(second / "A")
    (second / "Flux").mkdir(parents=True)
    index_only(second / "Flux" / "E")
    roots = [first, second, tmp_path / "absent"]
    found = checkpoints.list_checkpoints(roots)
    assert found == {"A": first / "A", "deep/er/B": first / "deep/er/B", "Flux/E": second / "Flux/E"}
    assert {name: checkpoints.resolve_checkpoint(name, roots) for name in found} == found


def test_a_longcat_folder_goes_before_another_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "first" / "A").mkdir(parents=True)
    wanted = index_only(tmp_path / "second" / "A")
    roots = [tmp_path / "first", tmp_path / "second"]
    assert checkpoints.resolve_checkpoint("A", roots) == wanted
    shutil.rmtree(wanted)
    assert checkpoints.resolve_checkpoint("A", roots) == tmp_path / "first" / "A"


@pytest.mark.parametrize(
    "name", ["..", "a/../b", "a\\..\\b", "/a", "\\a", "C:\\a", "C:/a", "c:a", "//host/share/a", "\\\\host\\share\\a"]
)
def test_a_name_that_leaves_the_model_folders_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(LongCatError, match="outside the model folders"):
        checkpoints.resolve_checkpoint(name, [tmp_path])


@pytest.mark.parametrize("name", ["", ".", "nothing", "x" * 5000, "a\0b", None, 7, ["a"]], ids=repr)
def test_a_name_of_no_folder_is_refused_with_the_names_there_are(name: Any, tmp_path: Path) -> None:
    index_only(tmp_path / "Mine")
    with pytest.raises(LongCatError, match=r"There is no checkpoint folder.*Found: Mine\."):
        checkpoints.resolve_checkpoint(name, [tmp_path])


def test_the_fingerprint_follows_every_file(sound: Path, tmp_path: Path) -> None:
    folder = broken.copy(sound, tmp_path / "Copy")
    seen = {checkpoints.fingerprint(folder)}
    for number, name in enumerate(("model_index.json", "tokenizer/merges.txt", *broken.WEIGHTS.values())):
        (folder / name).write_bytes((folder / name).read_bytes() + b" " * (number + 1))
        seen.add(checkpoints.fingerprint(folder))
    assert len(seen) == 3 + len(broken.WEIGHTS)
    (folder / "vae" / "dangling").symlink_to(folder / "nowhere")
    assert checkpoints.fingerprint(folder) in seen


def test_an_audit_names_three_of_each_kind_and_counts_all() -> None:
    one, two = torch.Size([1]), torch.Size([2])
    expected = {f"m{i}": one for i in range(5)} | {"same": one, "s": one}
    found = {f"u{i}": one for i in range(4)} | {"same": one, "s": two}
    with pytest.raises(LongCatError) as caught:
        checkpoints.audit("vae", expected, found)
    assert "5 missing: m0, m1, m2 …" in caught.value.en
    assert "4 unknown: u0, u1, u2 …" in caught.value.en
    assert "s (2,) ≠ (1,)" in caught.value.en
    assert "same" not in caught.value.en
    checkpoints.audit("vae", expected, expected)


@pytest.mark.parametrize(
    ("pipeline", "folder", "scheduler", "key"),
    [
        (flavours.TEXT_TO_IMAGE, "LongCat-Image", {}, "final"),
        (flavours.TEXT_TO_IMAGE, "LongCat-Image-Dev", {}, "dev"),
        (flavours.TEXT_TO_IMAGE, "longcat_image_dev", {}, "dev"),
        (flavours.TEXT_TO_IMAGE, "my-device", {}, "final"),
        (flavours.EDIT, "anything-dev", {"base_shift": 0.5, "max_shift": 1.15}, "edit"),
        (flavours.EDIT, "LongCat-Image-Edit", {"base_shift": 1.15, "max_shift": 1.15}, "edit-turbo"),
    ],
)
def test_a_flavour_is_known_by_its_pipeline_scheduler_and_name(
    pipeline: str, folder: str, scheduler: dict[str, float], key: str
) -> None:
    flavour = flavours.identify(pipeline, folder, scheduler)
    assert flavour.key == key
    assert flavour.edits == key.startswith("edit")
