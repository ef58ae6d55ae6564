"""run.py: what it refuses, how it sets up, and that a run starts a real ComfyUI, draws and leaves nothing."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from PIL import Image

from longcat_pack.tools import checks, demo, environment, workflow
from longcat_pack.tools.results import Event, Interrupted, NodeFailed, PromptRejected, Result

FLAT = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 255},
        "_meta": {"title": "Colour"},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "flat"}},
}
SAMPLER = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 4}, "_meta": {"title": "Sampler"}},
    "4": {"class_type": "RandomNoise", "inputs": {"noise_seed": 2}},
    "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "old"}, "_meta": {"title": "Prompt"}},
}
# Each sharpening takes a second or more on a CPU: time to be interrupted in.
SLOW = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 2048, "height": 2048, "batch_size": 1, "color": 255},
    },
    "2": {
        "class_type": "ImageSharpen",
        "inputs": {"image": ["1", 0], "sharpen_radius": 31, "sigma": 1.0, "alpha": 1.0},
    },
    "3": {
        "class_type": "ImageSharpen",
        "inputs": {"image": ["2", 0], "sharpen_radius": 31, "sigma": 1.0, "alpha": 1.0},
    },
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "slow"}},
}


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def ours(folder: Path) -> list[psutil.Process]:
    """Processes that name `folder` on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in argument for argument in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture
def commands(comfy_dir: Path, pack_dir: Path, tmp_path: Path):
    """Start run.py in an empty folder, with this interpreter and host and a cache of its own."""
    settings = {"COMFYUI_PATH": str(comfy_dir), "LONGCAT_PYTHON": sys.executable}
    variables = {**os.environ, **settings, "LONGCAT_CACHE": str(tmp_path / "cache")}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(pack_dir / "run.py"), *arguments],
            cwd=tmp_path,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    return start


class TestSettingInputs:
    def test_prompt_goes_to_the_node_titled_prompt(self):
        assert workflow.edited(SAMPLER, prompt="一只猫")["5"]["inputs"]["text"] == "一只猫"

    def test_seed_goes_to_every_seed_input(self):
        edited = workflow.edited(SAMPLER, seed=77)
        assert (edited["3"]["inputs"]["seed"], edited["4"]["inputs"]["noise_seed"]) == (77, 77)

    def test_the_given_workflow_is_left_alone(self):
        before = json.dumps(SAMPLER)
        workflow.edited(SAMPLER, prompt="x", seed=3, assignments=["3.steps=9"])
        assert json.dumps(SAMPLER) == before

    @pytest.mark.parametrize(
        ("assignment", "value"),
        [("3.steps=8", 8), ("Sampler.steps=8", 8), ("3.steps=[1, 2]", [1, 2]), ("3.steps=a=b", "a=b")],
    )
    def test_set_takes_ids_and_titles_and_reads_json_else_text(self, assignment: str, value: object):
        assert workflow.edited(SAMPLER, assignments=[assignment])["3"]["inputs"]["steps"] == value

    def test_set_reaches_dotted_inputs(self):
        nodes = {"1": {"class_type": "Loader", "inputs": {"engine": "core", "engine.precision": "bf16"}}}
        edited = workflow.edited(nodes, assignments=["1.engine.precision=int8"])
        assert edited["1"]["inputs"] == {"engine": "core", "engine.precision": "int8"}

    @pytest.mark.parametrize(
        ("assignment", "words"),
        [
            ("9.steps=8", "no node 9; the nodes are: 3 (Sampler), 4 (RandomNoise), 5 (Prompt)"),
            ("3.step=8", "no input step; it has: seed, steps"),
            ("3.steps", "expected NODE.INPUT=VALUE"),
            ("steps=8", "expected NODE.INPUT=VALUE"),
        ],
    )
    def test_unknown_places_are_errors_that_list_the_choices(self, assignment: str, words: str):
        with pytest.raises(workflow.WorkflowError) as caught:
            workflow.edited(SAMPLER, assignments=[assignment])
        assert words in str(caught.value)

    def test_a_title_of_several_nodes_is_refused(self):
        twins = {"a": SAMPLER["3"], "b": SAMPLER["3"]}
        with pytest.raises(workflow.WorkflowError, match="one of their ids: a, b"):
            workflow.edited(twins, assignments=["Sampler.steps=8"])

    def test_prompt_and_seed_need_a_place(self):
        with pytest.raises(workflow.WorkflowError, match="titled Prompt"):
            workflow.edited(FLAT, prompt="x")
        with pytest.raises(workflow.WorkflowError, match="noise_seed"):
            workflow.edited(FLAT, seed=1)


class TestLoadingWorkflows:
    def test_api_format_is_read(self, tmp_path: Path):
        assert workflow.load_workflow(written(tmp_path / "flat.json", FLAT)) == FLAT

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({"nodes": [], "links": []}, "Export (API)"),
            ([], "no API-format workflow"),
            ({}, "no API-format workflow"),
            ({"1": {"inputs": {}}}, "node 1 has no class_type"),
        ],
    )
    def test_other_json_is_refused(self, tmp_path: Path, content: object, words: str):
        with pytest.raises(workflow.WorkflowError) as caught:
            workflow.load_workflow(written(tmp_path / "other.json", content))
        assert words in str(caught.value)

    def test_missing_files_and_other_text_are_refused(self, tmp_path: Path):
        with pytest.raises(workflow.WorkflowError, match="no workflow file"):
            workflow.load_workflow(tmp_path / "none.json")
        (tmp_path / "text.json").write_text("{", encoding="utf-8")
        with pytest.raises(workflow.WorkflowError, match="not JSON"):
            workflow.load_workflow(tmp_path / "text.json")


class TestSetUp:
    def test_a_build_is_done_once(self, tmp_path: Path):
        built = []

        def build(folder: Path) -> None:
            folder.mkdir()
            built.append(folder)

        for _ in range(2):
            environment.make_once(tmp_path / "env", "key", build)
        assert built == [tmp_path / "env"]

    def test_an_interrupted_build_is_made_anew(self, tmp_path: Path):
        folder = tmp_path / "env"

        def die(target: Path) -> None:
            target.mkdir()
            (target / "half").touch()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            environment.make_once(folder, "key", die)
        assert not environment.is_complete(folder, "key")
        environment.make_once(folder, "key", Path.mkdir)
        assert environment.is_complete(folder, "key") and not (folder / "half").exists()

    def test_another_key_is_another_build(self, tmp_path: Path):
        environment.make_once(tmp_path / "env", "old", Path.mkdir)
        assert not environment.is_complete(tmp_path / "env", "new")

    def test_the_key_follows_every_requirement(self):
        keys = {environment.environment_key(texts) for texts in (["a", "b"], ["a", "c"], ["ab", ""], ["a"])}
        assert len(keys) == 4

    def test_the_cache_is_where_the_variable_says(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("LONGCAT_CACHE", str(tmp_path / "here"))
        assert environment.cache_dir() == tmp_path / "here"

    def test_a_wrong_comfyui_path_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
        with pytest.raises(environment.SetupFailed, match="name the folder of a ComfyUI checkout"):
            environment.users_comfy()

    def test_a_failing_command_shows_the_end_of_its_log(self, tmp_path: Path):
        program = "print('the reason'); raise SystemExit(3)"
        with pytest.raises(environment.SetupFailed, match="exit code 3(.|\n)*setup.log(.|\n)*the reason"):
            environment.run_logged([sys.executable, "-c", program], tmp_path / "setup.log")

    def test_a_lock_keeps_others_out_and_dies_with_its_holder(self, tmp_path: Path, pack_dir: Path):
        lock = tmp_path / "lock"
        program = (
            "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from tools import environment\n"
            "with environment.locked(pathlib.Path(sys.argv[2]), print):\n"
            "    print('held', flush=True); sys.stdin.read()"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", program, str(pack_dir), str(lock)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        said = []

        def say(text: str) -> None:
            said.append(text)
            holder.kill()

        with environment.locked(lock, say):
            assert said == ["another run is setting up; waiting for it ..."]
        holder.communicate()

    def test_the_link_leads_to_the_pack_and_moves_with_it(self, tmp_path: Path):
        for name in ("old", "new"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "here").write_text(name, encoding="utf-8")
            link = environment.prepare_base_dir(tmp_path / "base", tmp_path / name)
            assert (link / "here").read_text(encoding="utf-8") == name
        assert link == tmp_path / "base" / "custom_nodes" / "ComfyUI-LongCat-Image"
        assert (tmp_path / "old" / "here").exists()


class TestTiers:
    @pytest.fixture
    def run_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Run all checks in a checkout that has these tiers, with every program replaced by an exit code."""

        def run(tiers: list[str], code: Callable[[Sequence[str]], int] = lambda command: 0) -> int:
            for tier in tiers:
                (tmp_path / "tests" / tier).mkdir(parents=True)
                (tmp_path / "tests" / tier / "test_it.py").touch()
            monkeypatch.setattr(checks, "_call", lambda command, folder, variables: code(command))
            made = environment.Environment(Path(sys.executable), tmp_path, True)
            return checks.run_all(made, tmp_path, tmp_path / "check")

        return run

    def test_a_tier_that_is_missing_is_named(self, run_all, capsys, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("CI", raising=False)
        assert run_all(["unit", "host"]) == 0
        assert "parity tier: not run" in capsys.readouterr().out

    def test_the_host_tier_must_run_in_continuous_integration(self, run_all, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CI", "true")
        assert run_all(["unit", "parity"]) != 0
        assert run_all(["host"]) == 0

    def test_one_device_and_one_browser_are_not_shared_out(self, run_all, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(os, "cpu_count", lambda: 16)
        runs: list[Sequence[str]] = []
        assert run_all(list(checks.TIERS), lambda command: runs.append(command) or 0) == 0
        tests = [command for command in runs if "pytest" in command]
        assert [command[-1] for command in tests[:3]] == ["tests/unit", "tests/parity", "tests/host"]
        shared = ["-n", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
        assert all(command[3:-1] == shared for command in tests[:3])
        assert [command[3:] for command in tests[3:]] == [["tests/device", "tests/browser"]]

    def test_a_tier_that_leaves_itself_out_is_no_failure_but_an_empty_one_is(self, run_all):
        def no_tests(tier: str) -> Callable[[Sequence[str]], int]:
            return lambda command: checks.NO_TESTS if tier in command else 0

        assert run_all(["unit", "host", "device"], no_tests("tests/device")) == 0
        assert run_all(["parity"], no_tests("tests/parity")) != 0

    @pytest.mark.parametrize("name", ["format", "check", "mypy", "pytest", "tests/unit", "tests/host", "tests/browser"])
    def test_any_failure_fails_the_whole(self, run_all, name: str):
        assert run_all(list(checks.TIERS), lambda command: int(name in command)) != 0


class TestShowingProgress:
    def test_plain_lines_name_nodes_and_tenths(self):
        out = io.StringIO()
        show = demo.ProgressLine(SAMPLER, out)
        show(Event("executing", {"node": "3"}))
        for step in range(1, 51):
            show(Event("progress", {"node": "3", "value": step, "max": 50}))
        show.finish()
        lines = out.getvalue().splitlines()
        assert (lines[0], lines[-1], len(lines)) == ("Sampler", "Sampler 50/50", 12)

    def test_a_picture_is_never_overwritten_unasked(self, tmp_path: Path):
        (tmp_path / "longcat.png").touch()
        assert demo.free_name(tmp_path / "longcat.png") == tmp_path / "longcat-2.png"

    def test_no_picture_is_an_error(self, tmp_path: Path):
        with pytest.raises(ValueError, match="saved no picture"):
            demo.save_images(Result("id", "success", {}, []), lambda ref: b"", tmp_path / "x.png")


class TestServer:
    def test_results_tell_what_ran_and_what_was_cached(self, server):
        nodes = workflow.edited(FLAT, assignments=["1.width=96"])
        first, again = server.run(nodes), server.run(nodes)
        assert (first.status, first.executed_nodes, first.cached_nodes) == ("success", ["1", "2"], [])
        assert (again.executed_nodes, sorted(again.cached_nodes)) == ([], ["1", "2"])
        assert Image.open(io.BytesIO(server.view(first.images[0]))).size == (96, 32)

    def test_refused_workflows_name_node_and_input(self, server):
        with pytest.raises(PromptRejected, match=r"node 1 \(EmptyImage\): .*-5.*: width") as caught:
            server.queue(workflow.edited(FLAT, assignments=["1.width=-5"]))
        assert set(caught.value.node_errors) == {"1"}

    def test_a_nodes_own_refusal_is_said_once(self):
        problem = {"type": "custom_validation_failed", "message": "Custom validation failed for node"}
        errors = [{**problem, "details": f"{name} - too wide - by 7"} for name in ("width", "height")]
        refused = PromptRejected({"message": "refused"}, {"4": {"class_type": "Size", "errors": errors}})
        assert str(refused) == "refused\nnode 4 (Size): too wide - by 7"

    def test_an_output_that_would_be_dropped_refuses_the_whole(self, server):
        nodes = {**FLAT, "3": {"class_type": "SaveImage", "inputs": {"filename_prefix": "no images"}}}
        with pytest.raises(PromptRejected, match="node 3"):
            server.queue(nodes)

    def test_a_failing_node_is_named_in_words(self, server, tmp_path: Path):
        Image.new("RGB", (8, 8)).save(tmp_path / "broken.png")
        name = server.upload_image(tmp_path / "broken.png")
        (server.base_dir / "input" / name).write_bytes(b"no picture")
        load = {"class_type": "LoadImage", "inputs": {"image": name}}
        with pytest.raises(NodeFailed) as caught:
            server.run({**FLAT, "1": load})
        error = caught.value
        assert (error.node_id, error.node_type) == ("1", "LoadImage")
        assert error.exception_message and error.exception_message in str(error)
        assert "execution_error" in [event.type for event in error.events]

    def test_interrupting_ends_the_run_and_leaves_the_server_usable(self, server):
        def stop_at_the_first_blur(event: Event) -> None:
            if event.type == "executing" and event.data["node"] == "2":
                server.interrupt()

        with pytest.raises(Interrupted):
            server.run(SLOW, on_event=stop_at_the_first_blur)
        server.free()
        assert server.run(FLAT).status == "success"


class TestCommands:
    def test_demo_draws_and_keeps_the_workflow_in_the_picture(self, commands, tmp_path: Path):
        nodes = written(tmp_path / "flat.json", FLAT)
        process = commands("demo", "--workflow", str(nodes), "--set", "Colour.width=48", "--out", "here.png")
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert Path(out.splitlines()[-1]) == tmp_path / "here.png"
        assert "Colour" in out.splitlines()
        with Image.open(tmp_path / "here.png") as image:
            assert image.size == (48, 32)
            assert json.loads(image.info["prompt"]) == workflow.edited(FLAT, assignments=["1.width=48"])
        assert not ours(tmp_path)

    def test_a_failing_demo_says_why_and_leaves_no_process(self, commands, tmp_path: Path):
        nodes = written(tmp_path / "flat.json", FLAT)
        process = commands("demo", "--workflow", str(nodes), "--set", "1.width=-8")
        out, err = process.communicate(timeout=300)
        assert process.returncode == 1
        assert "node 1 (EmptyImage): Value -8 smaller than min of 1: width" in err
        assert not ours(tmp_path) and not list(tmp_path.glob("*.png"))

    if os.name != "nt":  # Windows has no such signals to send

        @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
        def test_a_stopped_demo_leaves_no_process(self, commands, tmp_path: Path, number: signal.Signals):
            process = commands("demo", "--workflow", str(written(tmp_path / "slow.json", SLOW)))
            while "ImageSharpen" not in process.stdout.readline():
                assert process.poll() is None, process.stderr.read()
            process.send_signal(number)
            process.communicate(timeout=60)
            assert process.returncode not in (0, None)
            assert not ours(tmp_path)

    def test_mistakes_in_arguments_show_before_anything_is_made(self, commands, tmp_path: Path):
        process = commands("demo", "--workflow", str(written(tmp_path / "flat.json", FLAT)), "--set", "7.x=1")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "no node 7; the nodes are: 1 (Colour)" in err
        assert not (tmp_path / "cache").exists()

    def test_bench_lists_its_programs_when_it_does_not_know_one(self, commands):
        process = commands("bench", "none-such", "--its", "own")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "there is no benchmark none-such; there are: " in err
