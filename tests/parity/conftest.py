"""Backend objects of the demo checkpoint, in this process, on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Draw = Callable[..., torch.Tensor]


@pytest.fixture(scope="session")
def folder(pack_dir: Path) -> Path:
    """The demo checkpoint."""
    return pack_dir / "demo" / "LongCat-Tiny"


@pytest.fixture(scope="session")
def reference(folder: Path) -> Any:
    """Diffusers' pipeline at the official positions."""
    from parity import reference

    return reference.pipeline(folder)


@pytest.fixture(scope="session")
def loaded(comfy_dir: Path) -> Callable[[str], tuple[Any, Any, Any]]:
    """MODEL, CLIP and VAE of the demo checkpoint in fp32 for an engine, loaded once."""
    from longcat_pack.longcat_backend.comfy_bridge import host, loading

    host.register_model_folder()
    parts: dict[str, tuple[Any, Any, Any]] = {}

    def load(engine: str) -> tuple[Any, Any, Any]:
        if engine not in parts:
            parts[engine] = loading.load("LongCat-Tiny", engine, "fp32", "fp32")
        return parts[engine]

    return load
