"""Encoded pictures and captions on disk, each in a file that is named after what it was made from.

Nothing is locked: a file gets its name when it is complete, and two programs that make the same one make the same
bytes. A file that is damaged is noticed by its checksum and made again.
"""

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import LongCatError

SUFFIX = ".safetensors"
PARTIAL = ".partial"
# What a program left that was ended while it wrote; younger ones may still be written.
STALE_SECONDS = 3600
_CHECKSUM = "sha256"

logger = logging.getLogger(__name__)


class Cache:
    """A folder of tensors by key.

    Attributes:
        rebuilt: how many damaged files were found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rebuilt = 0

    def read(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a key, or None if there are none yet; a damaged file is taken away, and logged.

        Raises:
            LongCatError: the file cannot be read for another reason.
        """
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(error) from error
        tensors = _parse(data)
        if tensors is None:
            logger.warning("The cache file %s is damaged and is made again. 缓存文件已损坏，将重新生成。", path.name)
            self.rebuilt += 1
            path.unlink(missing_ok=True)
        return tensors

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the tensors of a key.

        Raises:
            LongCatError: they cannot be written; nothing half-written is left.
        """
        path = self._path(key)
        temporary = path.with_name(f".{key}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(temporary, _with_checksum(tensors))
            os.replace(temporary, path)
        except OSError as error:
            # On Windows a file that another trainer reads cannot be replaced; it has the same content.
            if not (isinstance(error, PermissionError) and path.is_file()):
                raise self._failed(error) from error
        finally:
            _remove(temporary)

    def sweep(self) -> None:
        """Take away what programs left that were ended while they wrote."""
        for path in self.folder.glob(f"*/.*{PARTIAL}"):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except OSError:  # another program took it away, or has it open
                continue

    def size(self) -> tuple[int, int]:
        """How many files there are, and their bytes, of all datasets together."""
        sizes = [path.stat().st_size for path in self.folder.glob(f"*/*{SUFFIX}")]
        return len(sizes), sum(sizes)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def _failed(self, error: OSError) -> LongCatError:
        cause = error.strerror or type(error).__name__
        return LongCatError(
            f"The training cache '{self.folder}' cannot be used: {cause}. What was encoded so far is kept, and nothing "
            "is half-written. Free some space there (the folder may be deleted, it is made again) or mend its rights, "
            "then queue again.",
            f"训练缓存“{self.folder}”无法使用：{cause}。已编码的内容会保留，不会留下不完整的文件。"
            "请在该处腾出空间（可删除该文件夹，会重新生成）或检查其权限，然后重新运行。",
        )


def content_key(*parts: Any) -> str:
    """A name for what is made from ``parts``, which are JSON values."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:  # not synced: what a power cut tears is noticed by its checksum
        file.write(data)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("A partial cache file stays behind 残留的缓存文件: %s (%s)", path, error)


def _with_checksum(tensors: Mapping[str, torch.Tensor]) -> bytes:
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(contents, {_CHECKSUM: _checksum(*_split(save(contents)))})


def _parse(data: bytes) -> dict[str, torch.Tensor] | None:
    """The tensors of a file's bytes; None if they are not what was written."""
    try:
        header, payload = _split(data)
        if header.get("__metadata__", {}).get(_CHECKSUM) != _checksum(header, payload):
            return None
        return load(data)
    except (ValueError, KeyError, AttributeError, SafetensorError):
        return None


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _checksum(header: Mapping[str, Any], payload: bytes) -> str:
    layout = json.dumps({name: value for name, value in header.items() if name != "__metadata__"}, sort_keys=True)
    return hashlib.sha256(layout.encode() + payload).hexdigest()
