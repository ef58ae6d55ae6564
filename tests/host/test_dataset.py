"""LongCatDataset in real ComfyUI: folders and batches, the sheet and the report, and folders that may not be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from host.bad_input import GOOD, Graph, check_sentence, pixels
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import NodeFailed, PromptRejected

SETTINGS = {
    "resolutions": "128",
    "grid": "16",
    "repeats": 2,
    "trigger_word": "佐布",
    "caption_dropout": 0.1,
    "held_out": 0.25,
}


def graph(**inputs: Any) -> Graph:
    """The node with its sheet saved and its report shown; ``inputs`` on top of the settings."""
    return {
        "data": {"class_type": "LongCatDataset", "inputs": {**SETTINGS, **inputs}},
        "sheet": {"class_type": "PreviewImage", "inputs": {"images": ["data", 1]}},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["data", 2]}},
    }


def from_folder(name: str, **inputs: Any) -> Graph:
    return graph(source="folder", **{"source.folder": name}, **inputs)


def write_pictures(folder: Path, count: int = 4) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (160, 120 + 40 * (index % 2)), (60 * index, 90, 200)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a sign that says NUMBER{index}", encoding="utf-8")


@pytest.fixture
def folder(server: ComfyServer, request: pytest.FixtureRequest) -> Path:
    """A folder of pictures in the server's input folder, one for each test."""
    place = server.base_dir / "input" / f"pictures_{request.node.name.partition('[')[0]}"
    write_pictures(place)
    return place


def test_a_folder_becomes_a_dataset_a_sheet_and_a_report(server: ComfyServer, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    result = server.run(from_folder(folder.name))
    text = result.outputs["report"]["text"][0]
    assert "pictures 图像: 4" in text and "skipped 已跳过: 1" in text and "held out 留出: 1" in text
    assert "items an epoch 每轮样本: 6" in text
    assert "128x128: " in text and "144x112: " in text
    assert "SKIPPED 已跳过: broken.png cannot be read" in text
    assert "NUMBER0" in text and "not quoted" not in text and "put it in quotes" in text
    assert "佐布, a sign that says NUMBER0" in text
    sheet = pixels(server, result)
    # Five tiles in one row: pictures and the one left out.
    assert sheet.shape[1] == 5 * 248 + 8 and sheet.shape[0] > 200
    assert result.outputs["data"]["images"] and result.outputs["data"]["text"][0] == text


def test_the_folder_is_read_again_when_a_file_changed_and_only_then(server: ComfyServer, folder: Path) -> None:
    assert "data" in server.run(from_folder(folder.name)).executed_nodes
    assert "data" not in server.run(from_folder(folder.name)).executed_nodes
    (folder / "0.txt").write_text("another caption, longer", encoding="utf-8")
    result = server.run(from_folder(folder.name))
    assert "another caption" in result.outputs["report"]["text"][0]


def test_with_a_clip_long_captions_are_found(server: ComfyServer, folder: Path) -> None:
    (folder / "0.txt").write_text("a red circle beside a blue square, " * 100, encoding="utf-8")
    loader = {"class_type": "LongCatLoader", "inputs": {**GOOD["1"]["inputs"], "checkpoint": "LongCat-Tiny"}}
    result = server.run({"1": loader, **from_folder(folder.name, clip=["1", 1])})
    text = result.outputs["report"]["text"][0]
    assert text.count("over 512 tokens") == 1 and "0.png has a caption over 512 tokens" in text


def batch(count: int = 2) -> Graph:
    """EmptyImage nodes of different colours as one batch."""
    nodes: Graph = {
        f"picture{index}": {
            "class_type": "EmptyImage",
            "inputs": {"width": 160, "height": 128, "batch_size": 1, "color": 0x3000 * (index + 1)},
        }
        for index in range(count)
    }
    nodes["batch"] = {"class_type": "ImageBatch", "inputs": {"image1": ["picture0", 0], "image2": ["picture1", 0]}}
    return nodes


def test_a_batch_becomes_a_dataset_with_captions_references_and_a_mask(server: ComfyServer) -> None:
    made = graph(
        source="images",
        **{
            "source.images": ["batch", 0],
            "source.captions": "一个圆\na star of {trigger}",
            "source.references": ["batch", 0],
            "source.masks": ["mask", 0],
        },
    )
    mask = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 160, "height": 128}}
    result = server.run({**batch(), "mask": mask, **made})
    text = result.outputs["report"]["text"][0]
    assert "edit pairs 编辑图像对: 2" in text and "masks 遮罩: 2" in text and "144x112: 2" in text
    assert "1: #1: 佐布，一个圆" in text and "2: #2: a star of 佐布" in text


def test_a_batch_with_too_few_captions_fails_with_a_sentence(server: ComfyServer) -> None:
    inputs = {"source.images": ["batch", 0], "source.captions": "one\ntwo\nthree"}
    with pytest.raises(NodeFailed) as caught:
        server.run({**batch(), **graph(source="images", **inputs)})
    check_sentence(caught.value.exception_message, ("3 captions for 2 pictures",))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"resolutions": "1000x1000"}, ("1000x1000", "multiples of the grid (16)", "992x992")),
        ({"resolutions": "big"}, ("'big' is no list of resolutions",)),
        ({"source.folder": "there_is_none"}, ("There is no folder 'there_is_none'",)),
        ({"source.folder": ""}, ("There is no folder ''",)),
        ({"source.folder": "../models"}, ("There is no folder '../models'",)),
        ({"source.folder": os.sep}, ("There is no folder",)),
        ({"source.folder": "a\0b"}, ("There is no folder",)),
        ({"source.reference_folder": "../output"}, ("There is no folder '../output'",)),
        ({"grid": "7"}, ("The grid is 7", "64, 32, 16")),
        ({"grid": "fine"}, ("The grid is 0",)),
        ({"repeats": 0}, ("repeats is 0", "between 1 and 1000")),
        ({"held_out": 0.9}, ("held_out is 0.9", "between 0 and 0.5")),
        ({"source": "camera"}, ("There is no such source", "images")),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_the_queue(
    inputs: dict[str, Any], words: tuple[str, ...], server: ComfyServer
) -> None:
    place = server.base_dir / "input" / "pictures_refused"
    if not place.is_dir():
        write_pictures(place)
    with pytest.raises(PromptRejected) as caught:
        server.queue(graph(**{"source": "folder", "source.folder": place.name, **inputs}))
    errors = caught.value.node_errors["data"]["errors"]
    assert {error["type"] for error in errors} == {"custom_validation_failed"}, errors
    check_sentence("\n".join(error["details"] for error in errors), words)


def test_the_server_goes_on_after_refusals(server: ComfyServer, folder: Path) -> None:
    with pytest.raises(PromptRejected):
        server.queue(from_folder("\0"))
    assert server.run(from_folder(folder.name)).outputs["report"]["text"]


def test_links_out_of_the_input_folder_are_not_followed(server: ComfyServer, folder: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "secret")
    outside = server.base_dir / "input" / "linked_folder"
    outside.symlink_to(tmp_path / "secret", target_is_directory=True)
    with pytest.raises(PromptRejected) as caught:
        server.queue(from_folder(outside.name))
    check_sentence(str(caught.value.node_errors["data"]["errors"][0]["details"]), ("There is no folder",))
    (folder / "linked.png").symlink_to(tmp_path / "secret" / "0.png")
    (folder / "linked.txt").write_text("a link", encoding="utf-8")
    text = server.run(from_folder(folder.name)).outputs["report"]["text"][0]
    assert "SKIPPED 已跳过: linked.png lies outside" in text and "pictures 图像: 4" in text
