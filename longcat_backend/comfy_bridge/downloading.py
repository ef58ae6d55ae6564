"""The published checkpoints that are not there yet: offered by name, downloaded only where a run asks for it."""

import logging
from pathlib import Path

from .. import download, download_errors
from ..flavours import FLAVOURS, Flavour
from . import files, host

_BY_NAME = {flavour.folder_name: flavour for flavour in FLAVOURS.values()}


def choices() -> list[str]:
    """Every checkpoint that can be chosen: what is there, then what could be downloaded."""
    there = files.names()
    return [*there, *(name for name in _BY_NAME if name not in there)]


def awaits(name: str, allowed: bool) -> bool:
    """Whether a name stands for a published checkpoint that this run has to download first.

    Raises:
        LongCatError: it does, and that is not allowed.
    """
    flavour = _absent(name)
    if flavour is not None and not allowed:
        raise download_errors.missing(flavour, _target(flavour))
    return flavour is not None


def provide(name: str, allowed: bool) -> None:
    """Download the checkpoint of a name where it is not there, with progress on the running node.

    Raises:
        LongCatError: it is not there and may not be downloaded; or see :func:`download.download`.
    """
    flavour = _absent(name)
    if flavour is None or not awaits(name, allowed):
        return
    folder = _target(flavour)

    def announce(missing: int, total: int) -> None:
        sizes = f"{missing / download_errors.GB:.2f} / {total / download_errors.GB:.2f} GB"
        logging.info("[LongCat-Image] downloading %s from %s into %s", sizes, flavour.repo_id, folder)
        host.show_text(f"{flavour.repo_id}: {sizes}")

    commit = download.download(flavour, folder, host.progress(), announce)
    logging.info("[LongCat-Image] downloaded %s at commit %s", flavour.repo_id, commit)


def revision(name: str) -> str | None:
    """Repository and commit of a checkpoint that was downloaded here, as ``owner/name@commit``."""
    folder = files.find(name).folder if str(name) in _BY_NAME else None
    note = None if folder is None else folder / download.REVISION_FILE
    return None if note is None or not note.is_file() else note.read_text(encoding="utf-8").strip()


def _absent(name: str) -> Flavour | None:
    """The flavour of a name that no model folder holds; a folder without the index is not whole yet."""
    flavour = _BY_NAME.get(str(name))
    there = flavour is None or any((root / str(name) / download.INDEX).is_file() for root in host.checkpoint_roots())
    return None if there else flavour


def _target(flavour: Flavour) -> Path:
    return host.write_folder(host.MODEL_FOLDER) / flavour.folder_name
