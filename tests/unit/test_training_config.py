"""The JSON of a run without ComfyUI."""

import json
from pathlib import Path
from typing import Any

import pytest

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import config
from longcat_pack.longcat_backend.training.settings import TrainSettings


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a config beside a checkpoint and a folder of pictures; the file's path."""

    def to_file(values: Any) -> Path:
        for folder in ("LongCat-Image", "pictures"):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "run.json").write_text(json.dumps(values), encoding="utf-8")
        return tmp_path / "run.json"

    return to_file


def test_our_config_is_read_back(write: Any, tmp_path: Path) -> None:
    settings = TrainSettings(steps=5, rank=4, flow_shift="run")
    values = {
        "name": "styles/zorb",
        "checkpoint": "LongCat-Image",
        "dataset": {"folder": "pictures", "resolutions": "512", "trigger_word": "zorb"},
        "settings": settings.to_json(),
        "validation": {"prompts": ["佐布", "a zorb"], "steps": 8, "size": [512, 768]},
    }
    found = config.read(write(values))
    assert found.settings == settings and found.name == "styles/zorb"
    assert found.dataset.folder == str(tmp_path / "pictures") and found.roots == (tmp_path / "pictures",)
    assert found.validation.prompts == ("佐布", "a zorb") and found.validation.size == (512, 768)
    assert found.file == tmp_path / "output" / "styles" / "zorb.safetensors"


def test_null_is_the_default(write: Any) -> None:
    nothing = dict.fromkeys(("prompts", "steps", "guidance", "seed", "size"))
    values = {"name": None, "checkpoint": "LongCat-Image", "dataset": {"folder": "pictures"}, "output": None}
    for validation in (nothing, None):
        found = config.read(write({**values, "settings": None, "validation": validation}))
        assert found.validation == config.ValidationSettings() and found.settings == TrainSettings()
        assert found.name == "run" and found.output.name == "output"


def test_comments_are_left_out_and_texts_are_not(write: Any) -> None:
    name = 'a//b " /* c */'
    path = write({"checkpoint": "LongCat-Image", "dataset": {"folder": "pictures"}, "name": name})
    path.write_text(path.read_text().replace("{", "{ // one\n /* two\n lines */", 1), encoding="utf-8")
    assert config.read_json(path)["name"] == name


def test_names_are_looked_up_in_the_folders_that_were_given(tmp_path: Path) -> None:
    for folder in ("models/LongCat-Image", "data/pictures"):
        (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / "somewhere" / "run.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"checkpoint": "LongCat-Image", "dataset": {"folder": "pictures"}}), encoding="utf-8")
    found = config.read(file, [tmp_path / "models"], [tmp_path / "data"])
    assert found.checkpoint == tmp_path / "models" / "LongCat-Image" and found.name == "run"
    with pytest.raises(LongCatError, match="no dataset 'pictures'"):
        config.read(file, [tmp_path / "models"])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([], "holds a list, not an object"),
        ({"setings": {}}, r"'setings' \(did you mean 'settings'\?\)"),
        ({"settings": {"lerning_rate": 1}}, "'lerning_rate'"),
        ({"settings": 3}, "'settings' of the config is 3"),
        ({"dataset": {"folder": ""}}, "this run's pictures came from the graph.* needs a folder"),
        ({"dataset": {"folder": "nowhere"}}, "no dataset 'nowhere'"),
        ({"validation": {"step": 3}}, "'step'"),
        ({"validation": {"size": [100, 100]}}, "not a multiple of 16"),
        ({"settings": []}, r"'settings' of the config is \[\]; expected an object"),
        ({"validation": {"steps": 0}}, "'validation.steps' .* is 0; expected a whole number between 1 and 10000"),
        ({"validation": {"steps": 8.5}}, "'validation.steps' .* is 8.5"),
        ({"validation": {"steps": True}}, "'validation.steps' .* is True"),
        ({"validation": {"guidance": "high"}}, "'validation.guidance' .* is 'high'; expected a number between 0 and"),
        ({"validation": {"guidance": -3}}, "'validation.guidance' .* is -3"),
        ({"validation": {"guidance": float("nan")}}, "'validation.guidance' .* is nan"),
        ({"validation": {"seed": -1}}, "'validation.seed' .* is -1; expected a whole number"),
        ({"validation": {"prompts": "a zorb"}}, "'validation.prompts' .* is 'a zorb'; expected a list of texts"),
        ({"validation": {"prompts": ["a zorb", 7]}}, "'validation.prompts'"),
        ({"validation": {"prompts": [" "]}}, "'validation.prompts'"),
        ({"validation": {"size": "512x768"}}, r"'validation.size' .* is '512x768'; expected \[width, height\]"),
        ({"validation": {"size": [512]}}, "'validation.size'"),
        ({"validation": {"size": [512.0, 512]}}, "'validation.size'"),
        ({"checkpoint": ["LongCat-Image"]}, "'checkpoint' .* expected text"),
        ({"name": 7}, "'name' .* is 7; expected text"),
        ({"output": False}, "'output' .* is False"),
        ({"checkpoint": "nothing"}, "no checkpoint 'nothing'"),
        ({"name": "../up"}, "'../up' cannot be used"),
        ({"name": "zorb?"}, "'zorb\\?' cannot be used"),  # before the training, not when its LoRA is written
    ],
)
def test_a_wrong_config_is_refused_by_name(values: Any, told: str, write: Any) -> None:
    whole = {"checkpoint": "LongCat-Image", "dataset": {"folder": "pictures"}}
    with pytest.raises(LongCatError, match=told):
        config.read(write({**whole, **values} if isinstance(values, dict) else values))


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    for name in ("run.json", "missing.json"):
        with pytest.raises(LongCatError, match="cannot be read as a training config"):
            config.read(tmp_path / name)
