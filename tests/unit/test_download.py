"""A checkpoint from a hub: whole, checked, resumable, and nothing but it."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from hub_server import COMMIT, Hub, read_folder
from huggingface_hub import constants

from longcat_pack.longcat_backend import checkpoints, download, flavours, verification
from longcat_pack.longcat_backend.errors import LongCatError

FINAL = flavours.FLAVOURS["final"]
BIG = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tiny(pack_dir: Path) -> dict[str, bytes]:
    """LongCat-Tiny's files, and what else a repository has."""
    rest = {
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": b"# card",
        "assets/picture.png": b"\x89PNG",
        "transformer/pytorch_model.bin": b"pickle",
        "transformer/model.fp16.safetensors": b"a variant",
        "tokenizer/tokenization.py": b"import os",
        "text_encoder/deeper/config.json": b"{}",
        "text_encoder/.hidden.json": b"{}",
    }
    return {**read_folder(pack_dir / "demo" / "LongCat-Tiny"), **rest}


@pytest.fixture(scope="module")
def needed(tiny: dict[str, bytes]) -> set[str]:
    """The paths of the official layout."""
    unneeded = ("README.md", ".git", "assets/", "transformer/py", "transformer/model.", "text_encoder/d")
    return {path for path in tiny if not path.startswith(unneeded) and not path.endswith((".py", ".hidden.json"))}


@pytest.fixture
def hub(tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with LongCat-Tiny under the name of the flagship, at the address that huggingface_hub uses."""
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    with Hub(FINAL.repo_id, tiny) as server:
        use(server.url, monkeypatch)
        yield server


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / FINAL.folder_name


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""


def fetch(folder: Path, flavour: flavours.Flavour = FINAL) -> str:
    return download.download(flavour, folder, quiet)


def there(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def is_checkpoint(folder: Path) -> bool:
    return folder.name in checkpoints.list_checkpoints([folder.parent])


def refused(folder: Path, *parts: str, flavour: flavours.Flavour = FINAL) -> LongCatError:
    """Download, which must fail in both languages with these parts and the command that does the same."""
    with pytest.raises(LongCatError) as caught:
        fetch(folder, flavour)
    for part in (*parts, f"hf download {flavour.repo_id}", str(folder)):
        assert part in caught.value.en, part
    assert "下载" in caught.value.zh and f"hf download {flavour.repo_id}" in caught.value.zh
    return caught.value


def test_a_whole_checkpoint_arrives_and_nothing_else(
    hub: Hub, folder: Path, tiny: dict[str, bytes], needed: set[str]
) -> None:
    told: list[tuple[int, int]] = []
    seen: list[tuple[int, int]] = []
    commit = download.download(FINAL, folder, lambda *at: seen.append(at), lambda *sizes: told.append(sizes))
    total = sum(len(tiny[path]) for path in needed)
    assert there(folder) == needed | {download.REVISION_FILE}
    assert all((folder / path).read_bytes() == tiny[path] for path in needed)
    assert {path for path, _ in hub.asked} == needed and sum(hub.sent.values()) == total
    assert told == [(total, total)]
    assert seen[-1] == (total, total) and seen == sorted(seen)
    assert commit == COMMIT and (folder / download.REVISION_FILE).read_text().strip() == f"{FINAL.repo_id}@{COMMIT}"
    verification.verify(checkpoints.open_checkpoint(folder))


def test_a_token_is_told_to_the_hub_alone(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(folder)
    assert hub.tokens == {"127.0.0.1": {"Bearer hf_secret"}, "localhost": {None}}


def test_the_index_comes_last(hub: Hub, folder: Path, needed: set[str]) -> None:
    states: set[bool] = set()

    def look(done: int, total: int) -> None:
        whole = needed - {download.INDEX} <= there(folder) if folder.is_dir() else False
        states.add(is_checkpoint(folder) and not whole)

    download.download(FINAL, folder, look)
    assert states == {False}
    assert hub.asked[-1][0] == download.INDEX


def test_a_second_run_receives_nothing(hub: Hub, folder: Path, needed: set[str]) -> None:
    fetch(folder)
    hub.sent.clear()
    told: list[tuple[int, int]] = []
    download.download(FINAL, folder, quiet, lambda *sizes: told.append(sizes))
    assert not hub.sent and told[0][0] == 0
    (folder / "vae" / "config.json").unlink()
    fetch(folder)
    assert set(hub.sent) == {"vae/config.json"}


def test_a_cut_connection_goes_on_where_it_stopped_in_the_same_run(
    hub: Hub, folder: Path, tiny: dict[str, bytes]
) -> None:
    hub.cuts[BIG] = [700_000, 1, 300_000]
    fetch(folder)
    assert hub.sent[BIG] == len(tiny[BIG])
    assert [start for path, start in hub.asked if path == BIG] == [
        None,
        "bytes=700000-",
        "bytes=700001-",
        "bytes=1000001-",
    ]
    assert (folder / BIG).read_bytes() == tiny[BIG]


def test_a_connection_that_stays_cut_is_an_error_and_the_next_run_goes_on(
    hub: Hub, folder: Path, tiny: dict[str, bytes]
) -> None:
    hub.cuts[BIG] = [900_000] + [0] * 5
    refused(folder, "cut", "goes on where it stopped")
    assert not is_checkpoint(folder) and BIG not in there(folder)
    assert hub.sent[BIG] == 900_000
    told: list[tuple[int, int]] = []
    download.download(FINAL, folder, quiet, lambda *sizes: told.append(sizes))
    assert hub.sent[BIG] == len(tiny[BIG])
    assert told[0][0] <= told[0][1] - 900_000
    assert is_checkpoint(folder)
    assert not [path for path in there(folder) if path.endswith(".partial")]


def test_a_server_without_ranges_begins_anew_and_the_file_is_right(
    hub: Hub, folder: Path, tiny: dict[str, bytes]
) -> None:
    hub.ranges = False
    hub.cuts[BIG] = [900_000]
    seen: list[tuple[int, int]] = []
    download.download(FINAL, folder, lambda *at: seen.append(at))
    assert (folder / BIG).read_bytes() == tiny[BIG]
    assert seen[-1][0] == seen[-1][1] == max(done for done, _ in seen)


@pytest.mark.parametrize("path", [BIG, "vae/config.json"])
def test_a_wrong_hash_removes_the_file_and_is_an_error(
    path: str, hub: Hub, folder: Path, tiny: dict[str, bytes]
) -> None:
    good = hub.files[path]
    hub.files[path] = bytes([good[0] ^ 1]) + good[1:]
    refused(folder, path, "hash", "removed")
    assert not is_checkpoint(folder)
    assert not [name for name in there(folder) if Path(path).name in name and name.startswith(path.split("/")[0])]
    hub.files[path] = good
    fetch(folder)
    assert (folder / path).read_bytes() == good


def test_a_file_longer_than_listed_is_not_received_to_its_end(hub: Hub, folder: Path, tiny: dict[str, bytes]) -> None:
    hub.files["vae/config.json"] = bytes(50 * 2**20)
    refused(folder, "vae/config.json", "size")
    assert hub.sent["vae/config.json"] < 50 * 2**20


def test_a_partial_file_that_was_damaged_is_found_by_its_hash(hub: Hub, folder: Path, tiny: dict[str, bytes]) -> None:
    hub.cuts[BIG] = [900_000] + [0] * 5
    refused(folder, "cut")
    (partial,) = (folder / "transformer").glob(".*.partial")
    partial.write_bytes(bytes(900_000))
    refused(folder, BIG, "hash")
    fetch(folder)
    assert (folder / BIG).read_bytes() == tiny[BIG]


def test_a_partial_file_of_an_earlier_version_is_not_continued(hub: Hub, folder: Path, tiny: dict[str, bytes]) -> None:
    hub.cuts[BIG] = [900_000] + [0] * 5
    refused(folder, "cut")
    newer = tiny[BIG][:-1] + b"\0"
    hub.publish({**tiny, BIG: newer}, "f" * 40)
    (folder / download.REVISION_FILE).unlink()
    assert fetch(folder) == "f" * 40
    assert (folder / BIG).read_bytes() == newer
    assert not list((folder / "transformer").glob(".*.partial"))


def test_a_download_ends_at_the_commit_that_it_began_with(hub: Hub, folder: Path, tiny: dict[str, bytes]) -> None:
    hub.cuts[BIG] = [900_000] + [0] * 5
    refused(folder, "cut")
    note = folder / download.REVISION_FILE
    assert note.read_text("utf-8") == f"{FINAL.repo_id}@{COMMIT}\n"
    newer = {**tiny, BIG: tiny[BIG][:-1] + b"\0", "vae/config.json": b"{}"}
    hub.publish(newer, "f" * 40)
    assert fetch(folder) == COMMIT
    assert all((folder / path).read_bytes() == tiny[path] for path in (BIG, "vae/config.json"))
    assert hub.sent[BIG] == len(tiny[BIG])
    (folder / "vae" / "config.json").unlink()
    assert fetch(folder) == COMMIT and (folder / "vae" / "config.json").read_bytes() == tiny["vae/config.json"]
    assert fetch(folder, replace(FINAL, revision="f" * 40)) == "f" * 40
    assert all((folder / path).read_bytes() == newer[path] for path in (BIG, "vae/config.json"))
    assert note.read_text("utf-8") == f"{FINAL.repo_id}@{'f' * 40}\n"


def test_a_commit_that_is_gone_is_explained(hub: Hub, folder: Path, tiny: dict[str, bytes]) -> None:
    hub.cuts[BIG] = [900_000] + [0] * 5
    refused(folder, "cut")
    hub.publish(tiny, "f" * 40)
    hub.past.clear()
    note = folder / download.REVISION_FILE
    assert f"--revision {COMMIT}" in refused(folder, "404", COMMIT, f"delete '{note}'").en
    note.unlink()
    assert fetch(folder) == "f" * 40 and hub.sent[BIG] == len(tiny[BIG])


def test_a_note_of_another_repository_is_not_asked_for(hub: Hub, folder: Path) -> None:
    folder.mkdir(parents=True)
    for text in ("someone/else@" + "a" * 40, "", FINAL.repo_id, f"{FINAL.repo_id}@"):
        (folder / download.REVISION_FILE).write_text(text, encoding="utf-8")
        assert fetch(folder) == COMMIT


def test_what_is_there_with_another_content_is_replaced(hub: Hub, folder: Path, tiny: dict[str, bytes]) -> None:
    fetch(folder)
    (folder / BIG).write_bytes(bytes(len(tiny[BIG])))
    hub.sent.clear()
    fetch(folder)
    assert dict(hub.sent) == {BIG: len(tiny[BIG])}
    assert (folder / BIG).read_bytes() == tiny[BIG]


def test_a_full_disk_is_seen_before_a_byte_is_received(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=70 * 10**6))
    refused(folder, "GB", "extra_model_paths.yaml")
    assert not hub.sent


def test_a_write_that_fails_is_an_error_and_goes_on_later(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, bytes]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_at(900_000, Path.open))
        refused(folder, "No space left on device", "goes on where it stopped")
    (partial,) = folder.rglob(".*.partial")
    assert not is_checkpoint(folder) and partial.stat().st_size == 900_000
    before = len(hub.asked)
    fetch(folder)
    assert is_checkpoint(folder) and (folder / BIG).read_bytes() == tiny[BIG]
    assert [path for path, start in hub.asked if start == "bytes=900000-"] == [hub.asked[before][0]]


def full_at(limit: int, real: Callable[..., IO[Any]]) -> Callable[..., IO[Any]]:
    """Path.open with a disk on which no file grows over a size."""

    class Limited:
        def __init__(self, file: IO[bytes]) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Limited:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: bytes) -> int:
            room = limit - self._file.tell()
            self._file.write(data[:room])
            if room < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real(path, mode, *args, **kwargs)
        return Limited(file) if mode in ("ab", "wb") else file

    return opened


def test_an_interruption_keeps_its_name_and_what_was_received(hub: Hub, folder: Path, tiny: dict[str, bytes]) -> None:
    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        download.download(FINAL, folder, stop)
    assert not is_checkpoint(folder)
    told: list[tuple[int, int]] = []
    download.download(FINAL, folder, quiet, lambda *sizes: told.append(sizes))
    assert told[0][0] < told[0][1] // 2
    assert is_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.json",
        "transformer/../../outside.json",
        "transformer/..\\..\\outside.json",
        "/etc/outside.json",
        "C:\\outside.json",
        "transformer\\outside.json",
        "vae/a\0.json",
        "vae/a\n.json",
        "vae/con:fig.json",
        "vae/..json/config.json",
    ],
)
def test_a_name_that_leaves_the_folder_is_not_fetched(
    name: str, hub: Hub, folder: Path, tiny: dict[str, bytes], needed: set[str], tmp_path: Path
) -> None:
    hub.siblings = [{**hub.siblings[0], "rfilename": name}, *hub.siblings]
    fetch(folder)
    assert {path for path, _ in hub.asked} == needed
    assert there(folder) == needed | {download.REVISION_FILE}
    assert {path.name for path in folder.parent.iterdir()} <= {folder.name, f".{folder.name}.lock"}


def test_shards_and_their_index_are_fetched(hub: Hub, folder: Path, tiny: dict[str, bytes]) -> None:
    names = [f"text_encoder/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names.append("text_encoder/model.safetensors.index.json")
    more = Hub(FINAL.repo_id, {**tiny, **{name: name.encode() for name in names}})
    hub.files, hub.siblings = more.files, more.siblings
    fetch(folder)
    assert set(names) <= there(folder)


@pytest.mark.parametrize(
    ("status", "code", "parts"),
    [
        (401, "RepoNotFound", ("401", "not open to you", "hf auth login")),
        (401, "GatedRepo", ("401", "accept its terms", "hf auth login")),
        (403, "GatedRepo", ("403", "accept its terms", "hf auth login")),
        (403, None, ("403", "hf auth login")),
        (404, "RepoNotFound", ("404", "HF_ENDPOINT")),
        (404, "RevisionNotFound", ("404", "main", "HF_ENDPOINT")),
        (429, None, ("429", "later")),
        (503, None, ("503", "later")),
    ],
)
def test_a_refusal_is_explained(status: int, code: str | None, parts: tuple[str, ...], hub: Hub, folder: Path) -> None:
    hub.status, hub.error_code = status, code
    refused(folder, *parts)
    assert not folder.exists()


def test_a_file_that_is_gone_is_explained(hub: Hub, folder: Path) -> None:
    del hub.files["vae/config.json"]
    refused(folder, "404")


def test_an_offline_mode_is_explained(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(folder, "HF_HUB_OFFLINE")
    assert not hub.asked


def test_no_connection_is_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    use("http://127.0.0.1:9", monkeypatch)
    refused(folder, "http://127.0.0.1:9", "network")


@pytest.mark.parametrize("body", [b"<html>please log in</html>", b"[]", b"{}", json.dumps({"id": "a/b"}).encode()])
def test_an_answer_of_something_else_than_a_hub_is_explained(body: bytes, hub: Hub, folder: Path) -> None:
    hub.status, hub.body = 200, body
    with pytest.raises(LongCatError, match="official layout"):
        fetch(folder)


@pytest.mark.parametrize("part", ["vae", "tokenizer", "model_index.json"])
def test_a_repository_without_a_part_is_refused(part: str, hub: Hub, folder: Path) -> None:
    hub.siblings = [entry for entry in hub.siblings if not entry["rfilename"].startswith(part)]
    with pytest.raises(LongCatError, match=f"missing: {part}"):
        fetch(folder)
    assert not hub.asked


def test_a_pinned_revision_is_the_one_that_is_asked_for(hub: Hub, folder: Path) -> None:
    unknown = replace(FINAL, revision="a" * 40)
    with pytest.raises(LongCatError, match="a" * 40):
        fetch(folder, unknown)
    assert fetch(folder, replace(FINAL, revision=COMMIT)) == COMMIT


def test_a_second_download_into_the_folder_is_refused_and_the_first_goes_on(
    hub: Hub, folder: Path, tiny: dict[str, bytes]
) -> None:
    hub.stall_at = 0
    begun = threading.Event()
    results: list[Any] = []
    first = threading.Thread(
        target=lambda: results.append(download.download(FINAL, folder, quiet, lambda *_: begun.set()))
    )
    first.start()
    assert begun.wait(30)
    with pytest.raises(LongCatError, match="Another download"):
        fetch(folder)
    hub.release()
    first.join(60)
    assert results == [COMMIT] and (folder / BIG).read_bytes() == tiny[BIG]
    assert hub.sent[BIG] == len(tiny[BIG])


def test_flavours_go_into_folders_that_are_told_apart() -> None:
    names = {flavour.folder_name: flavour for flavour in flavours.FLAVOURS.values()}
    assert set(names) == {"LongCat-Image", "LongCat-Image-Dev", "LongCat-Image-Edit", "LongCat-Image-Edit-Turbo"}
    for name, flavour in names.items():
        scheduler = {"base_shift": flavour.base_shift, "max_shift": flavour.max_shift}
        assert flavours.identify(flavour.pipeline, name, scheduler) is flavour
