#!/usr/bin/env python3
"""Run this pack in a real ComfyUI, with nothing but Python and the package registry at hand.

    python run.py demo     draw a picture with the bundled model and workflow
    python run.py test     check and test everything
    python run.py bench    run one of the programs in benchmarks/

Everything that is made on the way lies in one folder that may be deleted at any time: LONGCAT_CACHE, or the
user's cache folder. COMFYUI_PATH makes it use a ComfyUI checkout of yours (which is not written to), and
LONGCAT_PYTHON, with it, an interpreter of yours in place of an environment of its own.
Python 3.10 to 3.13; standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools import checks, environment
from tools.workflow import WorkflowError, edited, load_workflow

ROOT = Path(__file__).resolve().parent
DEFAULT_WORKFLOW = ROOT / "tests" / "api" / "text_to_image.json"
INTERRUPTED = 130


def say(text: str) -> None:
    """One short line about what is being done."""
    print(text, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line of run.py."""
    top = argparse.ArgumentParser(prog="run.py", description="Run this pack in a real ComfyUI.")
    commands = top.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="run a workflow in a real ComfyUI and save the picture")
    demo.add_argument("--prompt", help='text for the node titled "Prompt"')
    demo.add_argument("--seed", type=int, help="value for every seed input")
    demo.add_argument("--workflow", type=Path, default=DEFAULT_WORKFLOW, help="API-format workflow file")
    demo.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="set any input; NODE is an id or a title",
    )
    demo.add_argument("--out", type=Path, help="where to save the picture (default: a free longcat*.png here)")
    demo.add_argument("--timeout", type=float, default=3600, help="seconds until the run is given up (default: 3600)")
    commands.add_parser("test", help="check and test everything; with arguments: run pytest alone, with these")
    bench = commands.add_parser("bench", help="run benchmarks/NAME.py; what follows NAME goes to the program")
    bench.add_argument("name", help="a program in benchmarks/, without .py")
    return top


def demo(options: argparse.Namespace) -> int:
    """Run a workflow in a real ComfyUI; wrong arguments show before anything is set up or started."""
    workflow = edited(
        load_workflow(options.workflow), prompt=options.prompt, seed=options.seed, assignments=options.set
    )
    cache = environment.cache_dir()
    ready = environment.ensure(cache, ROOT, say)
    base = environment.base_dir(cache, ROOT)
    base.mkdir(parents=True, exist_ok=True)
    job = {
        "workflow": workflow,
        "comfy_dir": str(ready.comfy_dir),
        "base_dir": str(base),
        "pack_dir": str(ROOT),
        "models_dir": str(ready.comfy_dir / "models") if ready.comfy_is_users else None,
        "out": str(options.out.resolve()) if options.out else None,
        "folder": str(Path.cwd()),
        "timeout": options.timeout,
    }
    with tempfile.NamedTemporaryFile(
        "w", prefix="job-", suffix=".json", dir=base, delete=False, encoding="utf-8"
    ) as file:
        json.dump(job, file)
    os.chdir(ROOT)  # where `-m` finds our folder `tools`
    return become([str(ready.python), "-m", "tools.demo", file.name], {**os.environ, "PYTHONUTF8": "1"})


def test(options: argparse.Namespace) -> int:
    """Run all checks and tests, or pytest alone when arguments are given."""
    cache = environment.cache_dir()
    ready = environment.ensure(cache, ROOT, say)
    if options.rest:
        return checks.run_pytest(ready, ROOT, options.rest)
    return checks.run_all(ready, ROOT, environment.base_dir(cache, ROOT) / "check")


def bench(options: argparse.Namespace) -> int:
    """Run one benchmark program in the environment."""
    program = ROOT / "benchmarks" / f"{options.name}.py"
    if not program.is_file():
        known = ", ".join(sorted(path.stem for path in program.parent.glob("[!_]*.py"))) or "none"
        raise WorkflowError(f"there is no benchmark {options.name}; there are: {known}")
    ready = environment.ensure(environment.cache_dir(), ROOT, say)
    return become([str(ready.python), str(program), *options.rest], checks.test_environment(ready))


def become(command: Sequence[str], variables: dict[str, str]) -> int:
    """Go on as another program, so that signals reach it alone; without exec, give its exit code."""
    sys.stdout.flush()
    if os.name != "nt":
        os.execve(command[0], list(command), variables)
    with subprocess.Popen(list(command), env=variables) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # the console gave it to the child too, which is cleaning up


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run the command. Gives the exit code."""
    oldest, newest = environment.OLDEST_PYTHON, environment.NEWEST_PYTHON
    if not oldest <= sys.version_info[:2] <= newest:
        versions = (*sys.version_info[:2], *oldest, *newest)
        say("this is Python {}.{}; run.py needs Python {}.{} to {}.{}".format(*versions))
        return 2
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What belongs to pytest or to a benchmark is not ours to parse.
    own = {"test": 1, "bench": 2}.get(given[0] if given else "", len(given))
    options = parser().parse_args(given[:own], argparse.Namespace(rest=given[own:]))
    command = {"demo": demo, "test": test, "bench": bench}[options.command]
    try:
        return command(options)
    except (environment.SetupFailed, WorkflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
