"""Loads the pack the way ComfyUI does, and makes ComfyUI itself importable, on the CPU, for the tests.

Run through `python run.py test`, or with the `pytest` of an environment that has the requirements and
COMFYUI_PATH set to a ComfyUI checkout.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
ALIAS = "longcat_pack"

# Before torch is imported, and for the servers as well: on a small model several threads gain nothing, and on
# a machine that is busy otherwise they wait for each other up to ten times as long as the work takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _load_pack() -> None:
    """Import the repository as the package `longcat_pack`, by file location, once."""
    if ALIAS in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(ALIAS, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[ALIAS] = module
    spec.loader.exec_module(module)


def _find_comfy() -> Path | None:
    """COMFYUI_PATH, else the tree that `run.py` keeps in its cache, else None."""
    environment = importlib.import_module(f"{ALIAS}.tools.environment")
    given = os.environ.get("COMFYUI_PATH")
    folder = Path(given) if given else environment.cached_host(environment.cache_dir())
    return folder.resolve() if (folder / "main.py").is_file() else None


def _prepare_paths(comfy: Path | None) -> None:
    # The repository root holds a folder called `nodes`, which would hide ComfyUI's nodes.py.
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
    sys.path.append(str(TESTS))
    if comfy is not None:
        sys.path.insert(0, str(comfy))
        # comfy reads this when it is first imported; it parses no command line unless main.py asks it to.
        importlib.import_module("comfy.cli_args").args.cpu = True


_load_pack()
COMFY = _find_comfy()
_prepare_paths(COMFY)


@pytest.fixture(scope="session")
def comfy_dir() -> Path:
    """The ComfyUI checkout to test against; a test that asks for it fails when there is none."""
    if COMFY is None:
        pytest.fail("no ComfyUI found: set COMFYUI_PATH to a checkout, or use `python run.py test`")
    return COMFY


@pytest.fixture(scope="session")
def pack_dir() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture
def fp8_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a device with fp8 products: weights can be made on it, not multiplied."""
    layers = importlib.import_module(f"{ALIAS}.longcat_backend.torchao_layers")
    api = importlib.import_module("torchao.quantization.quant_api")
    monkeypatch.setattr(layers, "multiplies_fp8_by_row", lambda device: True)
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)
