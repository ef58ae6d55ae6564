"""Backend objects of the demo checkpoint, in this process, on the CPU."""

from collections.abc import Callable, Iterator
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


@pytest.fixture
def models(comfy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty models folder of ComfyUI."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for kind in ("longcat_image", "diffusion_models", "text_encoders", "vae"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
    yield tmp_path


@pytest.fixture
def places(comfy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's folders of LoRAs and outputs, in a folder of their own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path
