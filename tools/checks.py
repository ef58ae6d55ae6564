"""What `run.py test` runs: formatter, linter, type checker, then the test tiers. Standard library only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .environment import Environment, link_directory

ALIAS = "longcat_pack"
# Each of these is shared out over some processes, whole files at a time, since fixtures belong to files.
PARALLEL_TIERS = ("unit", "parity", "host")
# One device, and one frontend whose language is a setting of its server.
SERIAL_TIERS = ("device", "browser")
TIERS = (*PARALLEL_TIERS, *SERIAL_TIERS)
MOST_WORKERS = 4
# pytest's exit code where nothing was collected, as in a tier that leaves itself out and says why.
NO_TESTS = 5
# Packages, and modules that mypy follows to what they use.
TYPED = ("-p", "longcat_backend", "-p", "nodes", "-m", "tools.checks", "-m", "tools.demo")


def test_environment(environment: Environment) -> dict[str, str]:
    """This process's variables, plus those that tell the tests which ComfyUI and which interpreter to use."""
    settings = {"COMFYUI_PATH": str(environment.comfy_dir), "LONGCAT_PYTHON": str(environment.python)}
    return {**os.environ, **settings, "PYTHONUTF8": "1"}


def run_pytest(environment: Environment, root: Path, arguments: Sequence[str]) -> int:
    """Run pytest on the arguments, from the repository root, and give its exit code."""
    return _call([str(environment.python), "-m", "pytest", *arguments], root, test_environment(environment))


def run_all(environment: Environment, root: Path, alias_folder: Path) -> int:
    """Run every check and every tier that this machine can run; the exit code is 0 when all is well."""
    failed = [name for name, command in _checks(environment, root, alias_folder) if not _passes(name, *command)]
    present = [tier for tier in TIERS if any((root / "tests" / tier).rglob("test_*.py"))]
    for tier in TIERS:
        if tier not in present:
            print(f"{tier} tier: not run, there are no tests in tests/{tier}", flush=True)
    codes = [
        run_pytest(environment, root, [*_shared_out(), f"tests/{tier}"]) for tier in PARALLEL_TIERS if tier in present
    ]
    if serial := [f"tests/{tier}" for tier in SERIAL_TIERS if tier in present]:
        code = run_pytest(environment, root, serial)
        codes.append(0 if code == NO_TESTS else code)
    if "host" not in present and os.environ.get("CI", "").lower() == "true":
        failed.append("the host tier, which must run where CI=true,")
    if failed:
        print(f"failed, see above: {', '.join(failed)}", file=sys.stderr, flush=True)
    return next(filter(None, codes), int(bool(failed)))


def _shared_out() -> list[str]:
    """pytest's arguments for a tier in as many processes as there are cores; none of them for one core."""
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    # Files are handed out in the order that the tier's conftest.py gives them, not by their number of tests.
    return ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"] if workers > 1 else []


def _checks(
    environment: Environment, root: Path, alias_folder: Path
) -> list[tuple[str, tuple[list[str], Path, Mapping[str, str]]]]:
    python = str(environment.python)
    variables = test_environment(environment)
    # mypy needs the checkout under a name that can be imported, whatever its folder is called.
    alias_folder.mkdir(parents=True, exist_ok=True)
    alias = alias_folder / ALIAS
    if not (alias.exists() and alias.resolve() == root.resolve()):
        link_directory(root, alias)
    packages = [word if word.startswith("-") else f"{ALIAS}.{word}" for word in TYPED]
    mypy = [python, "-m", "mypy", "--config-file", str(root / "pyproject.toml")]
    mypy += ["--cache-dir", str(alias_folder / "mypy"), *packages]
    return [
        ("ruff format", ([python, "-m", "ruff", "format", "--check", "."], root, variables)),
        ("ruff check", ([python, "-m", "ruff", "check", "."], root, variables)),
        ("mypy", (mypy, alias_folder, variables)),
    ]


def _passes(name: str, command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> bool:
    print(f"{name} ...", flush=True)
    return _call(command, folder, variables) == 0


def _call(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> int:
    return subprocess.run(list(command), cwd=folder, env=dict(variables), check=False).returncode
