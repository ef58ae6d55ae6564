"""LongCatTrainLora in this process: what is on the device when the base comes, what is said, and what is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from longcat_pack.longcat_backend.memory import MIB
from longcat_pack.longcat_backend.training import loop
from longcat_pack.longcat_backend.training.dataset import DatasetSettings, read_folder
from longcat_pack.longcat_backend.training.settings import TrainSettings

Loaded = Callable[[str], tuple[Any, Any, Any]]
SETTINGS = TrainSettings(steps=1, rank=2, base_precision="bf16", batch=2, validate_every=0)
BOTH = {"final": "LongCat-Tiny", "dev": "LongCat-Tiny-Dev"}


class LoadedBase(Exception):
    """The base is about to be read."""


@pytest.fixture
def dataset(pack_dir: Path) -> Any:
    """The demo's pictures."""
    return read_folder(DatasetSettings(folder="zorb", resolutions="128"), [pack_dir / "demo" / "datasets"])


def test_no_model_of_the_graph_is_on_the_device_when_the_base_comes(
    loaded: Loaded, dataset: Any, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would not fit beside an encoder of 15 GB."""
    import comfy.model_management

    from longcat_pack.longcat_backend.comfy_bridge import training, training_request

    model, clip, vae = loaded("core")
    there: list[list[Any]] = []

    def note() -> list[Any]:
        there.append([each.model.model for each in comfy.model_management.current_loaded_models])
        return there[-1]

    def load_base(*args: Any) -> Any:
        note()
        raise LoadedBase

    encode = training.encoded.encode

    def encoded(*args: Any) -> Any:
        examples = encode(*args)
        note()
        return examples

    monkeypatch.setattr(training.encoded, "encode", encoded)
    monkeypatch.setattr(training.base, "load_base", load_base)
    comfy.model_management.load_models_gpu([model])
    with torch.inference_mode(), pytest.raises(LoadedBase):
        training.train(model, clip, vae, dataset, training_request.Request("mine", SETTINGS))
    encoding, training_base = there
    assert {id(clip.patcher.model), id(vae.patcher.model)} <= {id(each) for each in encoding}
    assert training_base == []


def test_advice_on_memory_stays_on_the_node_and_is_in_the_report(
    loaded: Loaded, dataset: Any, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management

    from longcat_pack.longcat_backend.comfy_bridge import formats, training

    shown: list[str] = []

    def load_base(*args: Any) -> Any:
        raise LoadedBase

    monkeypatch.setattr(training.host, "show_text", shown.append)
    monkeypatch.setattr(training.base, "load_base", load_base)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda"))
    source = formats.source(loaded("core")[0])
    place = places / "loras" / "mine.safetensors", places / "output" / "longcat_training" / "runs" / "mine"

    def said(free: int) -> tuple[str, str]:
        """On the node while the base is loaded, and in the report, with so many bytes free."""
        monkeypatch.setattr(
            comfy.model_management,
            "get_free_memory",
            lambda device, torch_free_too=False: (free, free) if torch_free_too else free,
        )
        run = training._Run(source, dataset, SimpleNamespace(report="cached"), SETTINGS, *place)
        with pytest.raises(LoadedBase):
            run.train(SimpleNamespace())
        return shown[-1], "\n".join(run.report(loop.Result((), [], [], False, 1)))

    for text in said(MIB):
        assert "1.0 MiB are free: no setting makes that fit" in text and "没有设置能满足" in text
    assert "loading the base model" in shown[-1]
    for text in said(2**40):
        assert "are free" not in text


@pytest.mark.parametrize("flavour", BOTH)
def test_the_lora_names_the_flavour_that_it_was_trained_on(
    flavour: str, loaded: Loaded, dataset: Any, places: Path, folder: Path
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import files, loading, training, training_request

    shutil.copytree(folder, places / BOTH[flavour])
    model = loading.load_model(files.Place(folder=places / BOTH[flavour]).open(), "core", "fp32")
    _, clip, vae = loaded("core")
    request = training_request.Request(
        "mine", TrainSettings(steps=1, rank=2, base_precision="fp32", validate_every=0), validation_steps=1
    )
    with torch.inference_mode():
        made = training.train(model, clip, vae, dataset, request)
    with safe_open(made.file, framework="pt") as opened:
        header = opened.metadata()
    assert header["modelspec.architecture"] == f"longcat_image-{flavour}/lora"
    assert f'"model_flavour": "{flavour}"' in header["longcat_settings"]
    assert f'"checkpoint": "{BOTH[flavour]}"' in made.config
