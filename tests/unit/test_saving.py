"""Files are written whole or not at all, under names that are names everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from longcat_pack.longcat_backend import layouts, saving
from longcat_pack.longcat_backend.errors import LongCatError

TENSORS = {
    "byte": torch.arange(3, dtype=torch.uint8),
    "number": torch.tensor(1.5),
    "bf16": torch.randn(3, 5).bfloat16(),
    "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "turned": torch.randn(4, 6).T,
    "empty": torch.zeros(0, 3),
    "part": torch.randn(6, 2)[2:4],
    "int8": torch.arange(5, dtype=torch.int8),
    "fp64": torch.randn(3, dtype=torch.float64),
}


def nothing(size: int) -> None:
    """No progress."""


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    path, seen = tmp_path / "x.safetensors", []
    contents = saving.entries(TENSORS)
    saving.write_file(path, contents, {"note": '猫 "quoted"'}, seen.append)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        assert loaded[key].dtype == value.dtype and loaded[key].shape == value.shape
        assert torch.equal(loaded[key].float(), value.float())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"note": '猫 "quoted"'}
    assert sum(seen) == saving.total([contents]) == sum(value.nbytes for value in TENSORS.values())


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    """Unaligned ones cannot be used as they lie in the file."""
    path = tmp_path / "x.safetensors"
    saving.write_file(path, saving.entries(TENSORS), {"odd": "length"}, nothing)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for key, value in TENSORS.items():
        assert (8 + length + header[key]["data_offsets"][0]) % value.itemsize == 0, key


def test_numbers_are_cast_and_integers_are_not() -> None:
    contents = saving.entries(TENSORS, dtype=torch.float16)
    assert {key: entry.dtype for key, entry in contents.items() if entry.dtype != torch.float16} == {
        "byte": torch.uint8,
        "int8": torch.int8,
    }
    assert contents["bf16"].read().dtype == torch.float16


def test_a_plan_is_carried_out_on_what_moving_to_the_cpu_gives() -> None:
    """ComfyUI bakes a patch in when a weight is moved, and a piece of the weight would not have it."""

    class Patched(torch.nn.Parameter):
        def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((4,), 7.0)

    tensors = {"x": Patched(torch.zeros(4), requires_grad=False)}
    plan = {"a": (layouts.Rows("x", None, 2),), "b": (layouts.Rows("x", 2), layouts.Rows("x", 0, 1))}
    contents = saving.entries(tensors, plan)
    assert contents["a"].read().tolist() == [7.0, 7.0]
    assert contents["b"].read().tolist() == [7.0, 7.0, 7.0]
    assert contents["b"].shape == (3,)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_write_leaves_everything_as_it_was(kind: str, overwrite: bool, tmp_path: Path) -> None:
    old = tmp_path / "old.safetensors"
    old.write_text("old")
    stopped = 0

    def stop(size: int) -> None:
        nonlocal stopped
        stopped += 1
        if stopped == 3:
            raise OSError(28, "No space left on device")

    with pytest.raises(LongCatError, match="No space left on device"), saving.staged(overwrite) as staging:
        first = staging.place(tmp_path / "a" / "first.safetensors")
        saving.write_file(first, saving.entries({"x": torch.ones(2)}), {}, stop)
        if kind == "folder":
            second = staging.place(tmp_path / "second")
            second.mkdir()
            second /= "weights.safetensors"
        else:
            second = staging.place(old if overwrite else tmp_path / "second.safetensors")
        saving.write_file(second, saving.entries(TENSORS), {}, stop)
    assert stopped == 3
    assert list(tmp_path.rglob("*")) == [old]
    assert old.read_text() == "old"


def test_an_interruption_leaves_nothing_and_keeps_its_name(tmp_path: Path) -> None:
    def interrupt(size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), saving.staged(False) as staging:
        saving.write_file(staging.place(tmp_path / "x"), saving.entries(TENSORS), {}, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_its_name_before_all_is_written(tmp_path: Path) -> None:
    with saving.staged(False) as staging:
        for name in ("x", "y"):
            saving.write_file(staging.place(tmp_path / name), saving.entries({"a": torch.ones(1)}), {}, nothing)
        assert not {"x", "y"} & {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def test_a_name_that_is_taken_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(LongCatError, match="is there already"), saving.staged(False) as staging:
        staging.place(tmp_path / "x")
    with pytest.raises(LongCatError, match="is there already"), saving.staged(False) as staging:
        staging.place(tmp_path / "y").write_text("new")
        (tmp_path / "y").write_text("someone else's")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "old", "y": "someone else's"}


def test_overwriting_replaces_files_and_checkpoint_folders_whole(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    (tmp_path / "folder").mkdir()
    for name in ("model_index.json", "stale.safetensors"):
        (tmp_path / "folder" / name).write_text("old")
    with saving.staged(True) as staging:
        staging.place(tmp_path / "x").write_text("new")
        folder = staging.place(tmp_path / "folder")
        folder.mkdir()
        (folder / "model_index.json").write_text("new")
    files = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"x": "new", "folder/model_index.json": "new"}


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.jpg").write_text("cat")
    with pytest.raises(LongCatError, match="something else"), saving.staged(True) as staging:
        staging.place(tmp_path / "pictures")
    assert (tmp_path / "pictures" / "cat.jpg").read_text() == "cat"


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model_index.json").write_text("old")
    replace, calls = saving.os.replace, []

    def fail_once(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise PermissionError(13, "in use")
        replace(source, target)

    with pytest.raises(LongCatError, match="in use"), saving.staged(True) as staging:
        staging.place(tmp_path / "folder").mkdir()
        monkeypatch.setattr(saving.os, "replace", fail_once)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "model_index.json").read_text() == "old"


@pytest.mark.parametrize("name", ["a", "a/b", "a\\b", "LongCat-Image_2.1", "我的 模型", "x.safetensors"])
def test_names_of_files_and_subfolders(name: str) -> None:
    assert saving.check_name(name).as_posix() == name.replace("\\", "/")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../b",
        "/a",
        "\\a",
        "C:\\a",
        "c:a",
        "//host/share/a",
        ".hidden",
        "a/.b",
        "a.",
        "a ",
        " a",
        "con",
        "NUL.txt",
        "a/com1",
        "a:b",
        "a?",
        "a*",
        'a"',
        "a<b",
        "a|b",
        "a\nb",
        "a\0b",
        "\ud800",
        "x" * 101,
    ],
    ids=ascii,
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(LongCatError, match="cannot be used"):
        saving.check_name(name)


def test_a_full_disk_is_seen_before(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    saving.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(LongCatError, match="The checkpoint needs .* Free some space, or choose a smaller") as caught:
        saving.require_space(tmp_path / "not" / "yet", free)
    assert "检查点需要" in caught.value.zh and caught.value.zh.endswith("请腾出空间，或选择更小的精度。")
