"""Through the real server: what LongCatSaveCheckpoint writes is listed, loads, and draws the same picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints_broken as broken
import pytest
import single_files as files
import torch
from safetensors.torch import load_file

from host.bad_input import check_alive, failed, pixels, prompt, rejected
from host.graphs import Graph
from longcat_pack.tools.host import ComfyServer

KINDS = ("longcat_image", "diffusion_models", "text_encoders", "vae")
SEED = {"5.seed": 3}
FILE = "longcat_saved.safetensors"


@pytest.fixture
def models(server: ComfyServer) -> Iterator[Path]:
    """The server's model folders, emptied afterwards."""
    root = server.base_dir / "models"
    for kind in KINDS:
        (root / kind).mkdir(parents=True, exist_ok=True)
    yield root
    for kind in KINDS:
        for entry in (root / kind).iterdir():
            broken.remove(entry)


def saving(
    layout: str, precision: str = "keep", parts: tuple[str, ...] = ("model", "clip", "vae"), **inputs: Any
) -> Graph:
    """A graph that loads LongCat-Tiny and saves it; ``loader`` sets the loader's inputs."""
    loader = prompt(**inputs.pop("loader", {}))["1"]
    values = {"name": "saved", "layout": layout, "precision": precision, "overwrite": False, **inputs}
    sockets = {name: ["1", index] for index, name in enumerate(("model", "clip", "vae")) if name in parts}
    return {"1": loader, "2": {"class_type": "LongCatSaveCheckpoint", "inputs": {**sockets, **values}}}


def picture(server: ComfyServer, checkpoint: str, **inputs: Any) -> bytes:
    """The pixels that a checkpoint draws in two steps, with the same seed each time."""
    graph = prompt(checkpoint, **{**SEED, "5.steps": 2, **inputs})
    return pixels(server, server.run(graph)).tobytes()


def written(models: Path) -> list[str]:
    """The files in the model folders."""
    return sorted(path.relative_to(models).as_posix() for kind in KINDS for path in (models / kind).rglob("*"))


def listed(server: ComfyServer, name: str = "checkpoint") -> list[str]:
    """What LongCatLoader offers."""
    inputs = server.object_info("LongCatLoader")["LongCatLoader"]["input"]
    options: list[str] = {**inputs["required"], **inputs["optional"]}[name][1]["options"]
    return options


@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_both_layouts_draw_the_same_picture(engine: str, server: ComfyServer, models: Path) -> None:
    loader = {"1.engine": engine}
    for layout in ("folder", "comfyui"):
        report = server.run(saving(layout, loader=loader)).outputs["2"]["text"][0]
        assert str(models) in report and "vision tower and output head copied" in report
    assert {"saved", FILE} <= set(listed(server))
    assert "longcat_saved_vae.safetensors" in listed(server, "vae_file")
    expected = picture(server, "LongCat-Tiny", **loader)
    for name in ("saved", FILE):
        assert picture(server, name, **loader) == expected


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_quantised_file_draws_the_picture_of_the_quantised_model(
    precision: str, server: ComfyServer, models: Path
) -> None:
    loader = {"1.engine": "core", "1.engine.precision": precision, "1.text_encoder_precision": precision}
    expected = picture(server, "LongCat-Tiny", **loader)
    server.run(saving("comfyui", loader=loader))
    assert picture(server, FILE, **loader) == expected
    for part, name in (("diffusion_models", FILE), ("text_encoders", "longcat_saved_text_encoder.safetensors")):
        stored = [value.dtype for value in load_file(models / part / name).values()]
        assert stored.count({"fp8": torch.float8_e4m3fn, "int8": torch.int8}[precision]) > 20, stored


def test_a_file_draws_the_same_with_both_engines_and_in_its_own_precision(
    server: ComfyServer, models: Path, pack_dir: Path
) -> None:
    """A file as others publish them: scaled fp8, with the prefix of a whole checkpoint, without our header's help."""
    source = pack_dir / "demo" / "LongCat-Tiny"
    weights, notes = files.tensors(source), files.headers(source)
    packed = files.as_fp8(weights["transformer"], "transformer", old=False)
    files.save(
        {f"model.diffusion_model.{key}": value for key, value in packed.items()},
        models / "diffusion_models" / "longcat_x.safetensors",
        notes["transformer"],
    )
    encoder = files.as_fp8(weights["text_encoder"], "text_encoder", old=True)
    files.save(encoder, models / "text_encoders" / "qwen_2.5_vl_7b_fp8_scaled.safetensors", notes["text_encoder"])
    files.save(weights["vae"], models / "vae" / "ae.safetensors", notes["vae"])
    server.get("/object_info")
    core, diffusers = (picture(server, "longcat_x.safetensors", **{"1.engine": name}) for name in ("core", "diffusers"))
    assert max(abs(a - b) for a, b in zip(core, diffusers, strict=True)) <= 1
    assert core != picture(server, "LongCat-Tiny", **{"1.engine": "core"})
    files.save(weights["vae"], models / "vae" / "ae_other.safetensors", notes["vae"])
    rejected(server, prompt("longcat_x.safetensors"), "1", ("2 files fit", "ae_other.safetensors", "vae_file"))
    chosen = {"1.engine": "core", "1.vae_file": "ae_other.safetensors"}
    assert picture(server, "longcat_x.safetensors", **chosen) == core


def test_a_name_that_is_taken_is_refused_unless_told(server: ComfyServer, models: Path) -> None:
    server.run(saving("comfyui", parts=("vae",)))
    path = models / "vae" / "longcat_saved_vae.safetensors"
    before = path.stat().st_mtime_ns
    failed(server, saving("comfyui", "fp16", parts=("vae",)), "2", ("is there already", "overwrite"))
    assert path.stat().st_mtime_ns == before
    server.run(saving("comfyui", "fp16", parts=("vae",), overwrite=True))
    assert path.stat().st_mtime_ns != before
    assert written(models) == ["vae/longcat_saved_vae.safetensors"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"name": "../saved"}, ("cannot be used",)),
        ({"name": "/tmp/saved"}, ("cannot be used",)),
        ({"name": ""}, ("cannot be used",)),
        ({"name": "con"}, ("cannot be used",)),
        ({"name": "saved", "layout": "folder", "precision": "fp8"}, ("fp8", "comfyui")),
        ({"layout": "zip"}, ("no such layout", "folder, comfyui")),
        ({"precision": "int4"}, ("no such layout or precision", "int8")),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_refused_before_the_queue(
    inputs: dict[str, Any], words: tuple[str, ...], server: ComfyServer, models: Path
) -> None:
    graph = saving("comfyui")
    graph["2"]["inputs"].update(inputs)
    rejected(server, graph, "2", words)
    assert written(models) == []


def test_parts_that_are_missing_are_named(server: ComfyServer, models: Path) -> None:
    failed(server, saving("folder", parts=("model", "vae")), "2", ("model, clip and vae",))
    failed(server, saving("comfyui", parts=()), "2", ("nothing to save",))
    assert written(models) == []


@pytest.mark.parametrize("precision", ["int8-quanto", "int4-quanto"])
def test_a_folder_of_quantos_weights_draws_the_picture_of_the_quantised_model(
    precision: str, server: ComfyServer, models: Path
) -> None:
    loader = {"1.engine": "auto", "1.engine.precision": precision, "1.text_encoder_precision": "int8-quanto"}
    expected = picture(server, "LongCat-Tiny", **loader)
    report = server.run(saving("folder", loader=loader)).outputs["2"]["text"][0]
    assert f"transformer: {precision}" in report and "text_encoder: int8-quanto" in report
    files_of_quanto = written(models)
    server.run(saving("folder", loader=loader, name="again"))  # from what ComfyUI still has in memory
    assert picture(server, "saved", **{"1.engine": "auto"}) == expected
    assert picture(server, "again", **loader) == expected
    assert expected != picture(server, "LongCat-Tiny", **{"1.engine": "diffusers"})
    for choice, words in (
        ({"1.engine": "core"}, (f"stored in {precision}", "core", "Set engine to auto")),
        ({"1.engine": "auto", "1.text_encoder_precision": "fp32"}, ("text_encoder", "stored in int8-quanto")),
    ):
        rejected(server, prompt("saved", **choice), "1", words)
    other = prompt("saved", **{"1.engine": "auto", "1.engine.precision": "bf16"})
    failed(server, other, "1", (f"stored in {precision}", "cannot be loaded as bf16", "Set its precision to auto"))
    assert set(files_of_quanto) < set(written(models))


def test_quantos_weights_fit_no_file_of_comfyui(server: ComfyServer, models: Path) -> None:
    words = ("int8-quanto", "ComfyUI has no file layout", "folder")
    loader = {"1.engine": "diffusers", "1.engine.precision": "int8-quanto"}
    failed(server, saving("comfyui", loader=loader), "2", ("The transformer", *words))
    failed(server, saving("comfyui", loader={"1.text_encoder_precision": "int8-quanto"}), "2", ("text_encoder", *words))
    assert written(models) == []
    check_alive(server)
