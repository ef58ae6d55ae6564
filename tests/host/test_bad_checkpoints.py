"""Broken checkpoints: each is refused with a sentence before anything is loaded, and the server goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import checkpoints_broken as broken
import pytest

from host.bad_input import check_alive, failed, pixels, prompt, rejected
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import PromptRejected


@pytest.fixture(scope="module")
def sound(pack_dir: Path) -> Path:
    return pack_dir / "demo" / "LongCat-Tiny"


@pytest.fixture
def models(server: ComfyServer) -> Iterator[Path]:
    """The server's models/longcat_image, emptied afterwards."""
    folder = server.base_dir / "models" / "longcat_image"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    for entry in folder.iterdir():
        broken.remove(entry)


def listed(server: ComfyServer) -> list[str]:
    """The checkpoints that LongCatLoader offers."""
    schema = server.object_info("LongCatLoader")["LongCatLoader"]
    names: list[str] = schema["input"]["required"]["checkpoint"][1]["options"]
    return names


def picture(server: ComfyServer, checkpoint: str) -> bytes:
    """The pixels that a checkpoint draws, with the same seed each time."""
    return pixels(server, server.run(prompt(checkpoint, **{"5.seed": 3}))).tobytes()


@pytest.mark.parametrize("case", broken.CASES)
def test_a_broken_checkpoint_is_refused_before_the_queue(
    case: str, server: ComfyServer, models: Path, sound: Path
) -> None:
    harm, words = broken.CASES[case]
    harm(broken.copy(sound, models / "Broken"))
    rejected(server, prompt("Broken"), "1", words)


@pytest.mark.parametrize("case", broken.TOKENIZER_CASES)
def test_a_broken_tokenizer_is_refused_while_loading(case: str, server: ComfyServer, models: Path, sound: Path) -> None:
    harm, words = broken.TOKENIZER_CASES[case]
    harm(broken.copy(sound, models / "Broken"))
    failed(server, prompt("Broken"), "1", words)


@pytest.mark.parametrize("case", ["transformer cut short", "vae missing key", "text_encoder wrong shape"])
def test_the_same_prompt_runs_once_the_checkpoint_is_mended(
    case: str, server: ComfyServer, models: Path, sound: Path
) -> None:
    broken.CASES[case][0](broken.copy(sound, models / "Mended"))
    graph = prompt("Mended")
    rejected(server, graph, "1", broken.CASES[case][1])
    broken.copy(sound, models / "Mended")
    assert server.run(graph).images


def test_the_same_prompt_runs_once_the_tokenizer_is_mended(server: ComfyServer, models: Path, sound: Path) -> None:
    harm, words = broken.TOKENIZER_CASES["tokenizer is broken"]
    harm(broken.copy(sound, models / "Mended"))
    graph = prompt("Mended")
    failed(server, graph, "1", words)
    broken.copy(sound, models / "Mended")
    assert server.run(graph).images


def test_a_changed_checkpoint_is_loaded_again(server: ComfyServer, models: Path, sound: Path) -> None:
    folder = broken.copy(sound, models / "Changing")
    first = prompt("Changing")
    server.run(first)
    assert "1" not in server.run({**prompt("Changing")}).executed_nodes
    merges = folder / "tokenizer" / "merges.txt"
    merges.write_bytes(merges.read_bytes() + b"\n")
    assert "1" in server.run(first).executed_nodes
    broken.missing_key("vae")(folder)
    rejected(server, first, "1", broken.CASES["vae missing key"][1])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NoSuchFolder", ("NoSuchFolder", "LongCat-Tiny", "model_index.json")),
        ("", ("no checkpoint folder", "LongCat-Tiny")),
        (".", ("no checkpoint folder",)),
        ("x" * 5000, ("no checkpoint folder",)),
        ("nul\0byte", ("no checkpoint folder",)),
        ("../LongCat-Tiny", ("outside the model folders", "extra_model_paths.yaml")),
        ("LongCat-Tiny/../LongCat-Tiny", ("outside the model folders",)),
        ("a\\..\\..\\b", ("outside the model folders",)),
        ("/etc", ("outside the model folders",)),
        ("C:\\models\\LongCat-Image", ("outside the model folders",)),
        ("C:LongCat-Image", ("outside the model folders",)),
        ("\\LongCat-Image", ("outside the model folders",)),
        ("\\\\host\\share\\LongCat-Image", ("outside the model folders",)),
        (7, ("no checkpoint folder", "'7'")),
        ({"a": 1}, ("no checkpoint folder",)),
    ],
    ids=str,
)
def test_a_bad_name_is_refused_before_the_queue(name: str, words: tuple[str, ...], server: ComfyServer) -> None:
    rejected(server, prompt(name), "1", words)


def test_an_absolute_path_of_a_sound_checkpoint_is_refused(server: ComfyServer, sound: Path) -> None:
    rejected(server, prompt(str(sound)), "1", ("outside the model folders",))


@pytest.mark.parametrize("kind", ["longcat_image", "diffusers"])
@pytest.mark.parametrize("name", ["Mine", "组/我的 检查点 ♥", "a/b/c"])
def test_checkpoints_in_the_users_folders_are_listed_and_load(
    kind: str, name: str, server: ComfyServer, sound: Path
) -> None:
    root = server.base_dir / "models" / kind
    broken.copy(sound, root / name)
    try:
        assert name in listed(server)
        assert picture(server, name) == picture(server, "LongCat-Tiny")
    finally:
        broken.remove(root / Path(name).parts[0])


def test_shards_give_the_picture_of_the_single_file(server: ComfyServer, models: Path, sound: Path) -> None:
    broken.sharded(broken.copy(sound, models / "Sharded"))
    assert len(list((models / "Sharded" / "transformer").glob("*.safetensors"))) == 2
    assert picture(server, "Sharded") == picture(server, "LongCat-Tiny")


def test_links_to_a_checkpoint_or_its_parts_work(server: ComfyServer, models: Path, sound: Path) -> None:
    (models / "Linked").symlink_to(sound, target_is_directory=True)
    (models / "Parts").mkdir()
    for entry in sound.iterdir():
        (models / "Parts" / entry.name).symlink_to(entry)
    assert {"Linked", "Parts"} <= set(listed(server))
    assert picture(server, "Linked") == picture(server, "Parts") == picture(server, "LongCat-Tiny")


def test_junk_beside_the_weights_is_no_weight(server: ComfyServer, models: Path, sound: Path) -> None:
    folder = broken.copy(sound, models / "Junk")
    weights = folder / broken.WEIGHTS["transformer"]
    weights.with_name("._" + weights.name).write_bytes(b"\0\5\x16\7")
    (weights.parent / "other.safetensors").mkdir()
    (folder / "vae" / ".DS_Store").write_bytes(b"x")
    (folder / "transformer" / "dangling.json").symlink_to(folder / "nowhere")
    assert picture(server, "Junk") == picture(server, "LongCat-Tiny")


def test_junk_and_broken_checkpoints_do_not_break_the_list(
    server: ComfyServer, models: Path, sound: Path, pack_dir: Path
) -> None:
    demos = sorted(path.parent.name for path in pack_dir.glob("demo/*/model_index.json"))
    there, missing = listed(server)[: len(demos)], listed(server)[len(demos) :]
    assert there == demos
    for number, case in enumerate(("index is a list", "index is no text", "index is deep", "class is a list")):
        broken.CASES[case][0](broken.copy(sound, models / f"Broken{number}"))
    broken.copy(sound, models / ".hidden" / "LongCat")
    broken.copy(sound, models / "one" / "two" / "three" / "TooDeep")
    (models / "empty").mkdir()
    (models / "file.txt").write_text("x", encoding="utf-8")
    (models / "loop").symlink_to(models, target_is_directory=True)
    (models / "dangling").symlink_to(models / "nowhere")
    (models / "folder" / "model_index.json").mkdir(parents=True)
    (models / "pipe").mkdir()
    os.mkfifo(models / "pipe" / "model_index.json")
    (models / "large").mkdir()
    with (models / "large" / "model_index.json").open("wb") as file:
        file.truncate(2**33)
    broken.copy(sound, models / "Sound")
    # What is there comes first, then what could be downloaded.
    assert [*demos, "Sound", *missing] == [name for name in listed(server) if not name.startswith("loop/")]
    check_alive(server)


def test_a_users_junk_does_not_hide_the_checkpoint_of_that_name(server: ComfyServer, models: Path, sound: Path) -> None:
    (models / "LongCat-Tiny").mkdir()
    assert "LongCat-Tiny" in listed(server)
    check_alive(server)
    shutil.copy(sound / "model_index.json", models / "LongCat-Tiny")
    with pytest.raises(PromptRejected, match="transformer/config.json"):
        server.queue(prompt("LongCat-Tiny"))
