"""What LongCatTrainLora exports is what the program without ComfyUI reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longcat_pack.longcat_backend import checkpoints, flavours
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import config, dataset, sources
from longcat_pack.longcat_backend.training.dataset import Dataset, DatasetSettings
from longcat_pack.longcat_backend.training.settings import TrainSettings

# Everything that the node can set to something else than its default, of every type that JSON has.
SETTINGS = TrainSettings(
    steps=7, alpha=4.0, rank=8, targets="all", optimiser="lion", schedule="cosine", ema=0.9, base_precision="fp32",
    checkpointing="none", offload="block", offload_blocks=2, offload_stream=False, flow_shift=1.5, seed=2**64 - 1,
    preservation_prompts=("a circle", "一个圆"), preservation_weight=0.5,
)  # fmt: skip


def export(checkpoint: Any, pictures: Dataset, to: Path, **settings: Any) -> Path:
    """The node's JSON in a file."""
    from longcat_pack.longcat_backend.comfy_bridge import training_request

    request = training_request.Request("styles/佐布.safetensors", SETTINGS, **settings)
    to.write_text(training_request.export(checkpoint, pictures, request), encoding="utf-8")
    return to


@pytest.fixture(scope="module")
def zorbs(pack_dir: Path) -> Dataset:
    settings = DatasetSettings("zorb", "", "128", 16, 3, "zorb", 0.2, 0.1)
    return dataset.read_folder(settings, [pack_dir / "demo" / "datasets"])


def test_every_setting_of_the_node_arrives(folder: Path, zorbs: Dataset, comfy_dir: Path, tmp_path: Path) -> None:
    drawing = {"validation_steps": 3, "validation_guidance": 2.5, "validation_seed": 2**64 - 1}
    path = export(
        checkpoints.open_checkpoint(folder), zorbs, tmp_path / "run.json", prompts="a zorb\n\n佐布", **drawing
    )
    found = config.read(path, [folder.parent], [folder.parent / "datasets"])
    assert found.settings == SETTINGS and found.checkpoint == folder
    assert found.name == "styles/佐布" and found.file == tmp_path / "output" / "styles" / "佐布.safetensors"
    assert found.validation == config.ValidationSettings(("a zorb", "佐布"), 3, 2.5, 2**64 - 1)
    assert found.dataset == DatasetSettings.from_json(
        {**zorbs.settings.to_json(), "folder": str(folder.parent / "datasets" / "zorb")}
    )
    assert dataset.read_folder(found.dataset, found.roots).identity() == zorbs.identity()


def test_a_checkpoint_of_single_files_is_looked_for_in_the_folder_of_its_download(
    zorbs: Dataset, folder: Path, comfy_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "LongCat-Image-Edit").mkdir()
    path = export(SimpleNamespace(flavour=flavours.FLAVOURS["edit"]), zorbs, tmp_path / "run.json")
    found = config.read(path, [tmp_path], [folder.parent / "datasets"])
    assert found.checkpoint == tmp_path / "LongCat-Image-Edit"
    assert len(found.validation.prompts) == 2  # captions of the dataset


def test_pictures_of_the_graph_are_said_to_need_a_folder(folder: Path, comfy_dir: Path, tmp_path: Path) -> None:
    pixels = torch.rand(2, 64, 64, 3)
    pictures = dataset.build(DatasetSettings(resolutions="64", grid=16), sources.from_batch(pixels, "one\ntwo"))
    path = export(checkpoints.open_checkpoint(folder), pictures, tmp_path / "run.json")
    with pytest.raises(LongCatError, match="this run's pictures came from the graph.* needs a folder"):
        config.read(path, [folder.parent])
