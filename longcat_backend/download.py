"""Download a published checkpoint, so that its folder is a checkpoint only once every file in it was checked.

Files lie under hidden temporary names until their hash is that of the hub, so a download that was cut goes on where
it stopped; model_index.json, by which a checkpoint is found, comes last. The commit is written down before the first
byte, and a download that goes on stays with it, whatever the repository holds by then.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from . import download_errors as words
from .checkpoints import COMPONENTS
from .flavours import Flavour
from .saving import SPARE_SPACE, free_space

Progress = Callable[[int, int], None]

INDEX = "model_index.json"
REVISION_FILE = words.REVISION_FILE
PARTS = (*COMPONENTS, "tokenizer", "text_processor")
# Weights without a variant in their name, and the texts beside them. Nothing hidden, no code, no pickle, no subfolder.
_NEEDED = re.compile(
    rf"{re.escape(INDEX)}|(?:{'|'.join(PARTS)})/"
    r"(?:(?:model|diffusion_pytorch_model)(?:-\d+-of-\d+)?\.safetensors|\w[\w.-]*\.(?:json|txt|jinja))",
    re.ASCII,
)
_BLOCK = 8 * 2**20
_RETRIES = 4
_PAUSE_S = 1.0
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: its path in it, its bytes, and the hash that the hub gives."""

    path: str
    size: int
    sha256: str | None
    git_id: str | None

    def hashed(self, path: Path, tick: Callable[[], None]) -> bool:
        """Whether a local file has this one's hash; git's own where the file is not in large-file storage."""
        expected = self.sha256 or self.git_id
        hasher = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                tick()
                hasher.update(block)
        return expected is None or hasher.hexdigest() == expected

    def partial(self, folder: Path) -> Path:
        """Where its bytes lie until they are whole; another version of the file has another name."""
        target = folder / self.path
        return target.with_name(f".{target.name}.{(self.sha256 or self.git_id or str(self.size))[:16]}.partial")


@dataclass(frozen=True)
class Listing:
    """The files of a repository that a checkpoint needs, at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def download(
    flavour: Flavour,
    folder: Path,
    progress: Progress,
    announce: Progress = lambda missing, total: None,
) -> str:
    """Complete the official folder of a flavour from the hub; what is there already is checked and kept.

    The hub is huggingface.co, or what HF_ENDPOINT names. The commit is the flavour's ``revision``; else the one that
    an earlier download into the folder began with; else the newest.

    Args:
        progress: called with (bytes there, bytes in all) many times a second; may raise to stop, which keeps what
            was received.
        announce: called once before the first byte, with (bytes still to be received, bytes in all).

    Returns:
        The commit that was downloaded, which is also written down in the folder.

    Raises:
        LongCatError: the hub cannot be reached or refuses, it no longer has the commit, the connection was cut too
            often, the disk is full, a file has not the hash that the hub gives, or another download into the folder is
            running.
    """
    flavour = replace(flavour, revision=flavour.revision or _begun(flavour, folder))
    with words.explained(flavour, folder), _locked(flavour, folder):
        listing = list_files(flavour)
        meter = _Meter(progress, listing.size)
        missing = [file for file in listing.files if not _is_there(folder, file, meter)]
        remaining = sum(file.size - _size(file.partial(folder)) for file in missing)
        free = free_space(folder)
        if free < remaining + SPARE_SPACE:
            raise words.disk_full(flavour, folder, remaining + SPARE_SPACE, free)
        announce(remaining, listing.size)
        if missing:
            _note_revision(folder, flavour, listing.commit)
        for file in missing:
            url = hf_hub_url(flavour.repo_id, file.path, revision=listing.commit)
            _fetch(url, file, folder, meter, flavour)
    return listing.commit


def list_files(flavour: Flavour) -> Listing:
    """What a flavour's repository holds of the official layout; small files first, model_index.json last.

    Raises:
        LongCatError: a part of the layout is not there, or the answer is not the hub's.
        errors.HfHubHTTPError, errors.HTTPError: the hub refuses, or cannot be reached.
    """
    revision = flavour.revision or constants.DEFAULT_REVISION
    try:
        info = HfApi().model_info(flavour.repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
    except errors.HTTPError:
        raise
    except (ValueError, KeyError, TypeError) as error:  # a page for people, say, of a network that asks to log in
        raise words.not_official(flavour, PARTS) from error
    files = [
        RemoteFile(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in info.siblings or ()
        if entry.size is not None and _NEEDED.fullmatch(entry.rfilename)
    ]
    there = {file.path.split("/")[0] for file in files}
    absent = [part for part in (INDEX, *COMPONENTS, "tokenizer") if part not in there]
    if absent or info.sha is None:
        raise words.not_official(flavour, absent)
    return Listing(info.sha, tuple(sorted(files, key=lambda file: (file.path == INDEX, file.size, file.path))))


class _Meter:
    """Bytes that are there, of all."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._done = 0
        self._total = total

    def add(self, count: int = 0) -> None:
        """Count bytes, which are negative when a file begins anew."""
        self._done += count
        self._progress(self._done, self._total)


def _is_there(folder: Path, file: RemoteFile, meter: _Meter) -> bool:
    path = folder / file.path
    if path.is_file() and path.stat().st_size == file.size and file.hashed(path, meter.add):
        meter.add(file.size)
        return True
    partial = file.partial(folder)
    if _size(partial) > file.size:
        partial.unlink()
    meter.add(_size(partial))
    return False


def _fetch(url: str, file: RemoteFile, folder: Path, meter: _Meter, flavour: Flavour) -> None:
    """Receive one file, check it, and give it its name."""
    target, partial = folder / file.path, file.partial(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    _receive_all(url, file, partial, meter)
    if _size(partial) != file.size or not file.hashed(partial, meter.add):
        partial.unlink()
        raise words.wrong_hash(flavour, folder, file.path)
    os.replace(partial, target)
    for old in target.parent.glob(f".{target.name}.*.partial"):  # of an earlier version
        old.unlink()


def _receive_all(url: str, file: RemoteFile, partial: Path, meter: _Meter) -> None:
    """Receive what is missing of a file, over as many connections as it takes while each brings something."""
    failures = 0
    while (before := _size(partial)) < file.size:
        try:
            _receive(url, file.size, partial, meter)
            error: errors.HTTPError = errors.HTTPError("the answer was too short")
        except errors.HTTPError as cut:
            if isinstance(cut, errors.HfHubHTTPError) and cut.response.status_code < 500:
                raise
            error = cut
        failures = 0 if _size(partial) > before else failures + 1
        if failures > _RETRIES:
            raise error
        if _size(partial) < file.size:
            time.sleep(_PAUSE_S)
            meter.add()


def _receive(url: str, size: int, partial: Path, meter: _Meter) -> None:
    """Append to a partial file what one connection brings, up to one chunk over its size."""
    have = _size(partial)
    # Compressed, a range would count other bytes than those of the file.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        continues = response.status_code == 206
        if not continues:
            meter.add(-have)
            have = 0
        with partial.open("ab" if continues else "wb") as out:
            for chunk in response.iter_bytes():
                out.write(chunk)
                have += len(chunk)
                meter.add(len(chunk))
                if have > size:
                    break
            out.flush()
            os.fsync(out.fileno())


def _note_revision(folder: Path, flavour: Flavour, commit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REVISION_FILE).write_text(f"{flavour.repo_id}@{commit}\n", encoding="utf-8")


def _begun(flavour: Flavour, folder: Path) -> str | None:
    """The commit that an earlier download of the flavour into the folder wrote down."""
    path = folder / REVISION_FILE
    repo_id, _, commit = path.read_text(encoding="utf-8").strip().partition("@") if path.is_file() else ("", "", "")
    return commit if repo_id == flavour.repo_id and commit else None


@contextmanager
def _locked(flavour: Flavour, folder: Path) -> Iterator[None]:
    """Keep a second download out of the folder; the lock goes with its process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise words.busy(flavour, folder) from error
    try:
        yield
    finally:
        lock.release()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
