"""Places for training pictures that the machine's owner listed."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import sources


@pytest.fixture
def bridge(comfy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that knows ComfyUI, with an input folder of the test's own."""
    folder_paths = importlib.import_module("folder_paths")
    (tmp_path / "input").mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.delenv("LONGCAT_DATASET_ROOTS", raising=False)
    return importlib.import_module("longcat_pack.longcat_backend.comfy_bridge.datasets")


@pytest.fixture
def demo(pack_dir: Path) -> Path:
    """The datasets that come with the pack."""
    return pack_dir / "demo" / "datasets"


def test_only_the_input_folder_and_the_demo_are_read_unless_the_owner_lists_more(
    bridge: Any, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name / "pictures").mkdir(parents=True)
    assert bridge.roots() == [tmp_path / "input", demo]
    with pytest.raises(LongCatError):
        sources.resolve_folder(str(tmp_path / "one"), bridge.roots())
    listed = os.pathsep.join(str(tmp_path / name) for name in ("one", "two"))
    monkeypatch.setenv("LONGCAT_DATASET_ROOTS", listed)
    assert sources.resolve_folder(str(tmp_path / "two"), bridge.roots()) == (tmp_path / "two").resolve()
    assert sources.resolve_folder("pictures", bridge.roots()) == (tmp_path / "one" / "pictures").resolve()
    with pytest.raises(LongCatError):
        sources.resolve_folder(str(tmp_path / "three"), bridge.roots())


def test_a_listed_place_that_is_none_is_named(
    bridge: Any, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LONGCAT_DATASET_ROOTS", os.pathsep.join(["here", str(tmp_path / "gone")]))
    with caplog.at_level(logging.WARNING):
        assert bridge.roots() == [tmp_path / "input", tmp_path / "gone", demo]
    assert "'here' in LONGCAT_DATASET_ROOTS" in caplog.text and "gone' in LONGCAT_DATASET_ROOTS" in caplog.text
