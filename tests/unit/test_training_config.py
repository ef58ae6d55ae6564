"""The JSON of a run without ComfyUI: ours and SimpleTuner's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import config
from longcat_pack.longcat_backend.training.settings import TrainSettings

# The seed's quickstart, with what it says to add for small cards.
QUICKSTART: dict[str, Any] = {
    "model_type": "lora",
    "model_family": "longcat_image",
    "model_flavour": "final",
    "pretrained_model_name_or_path": None,
    "base_model_precision": "no_change",
    "train_batch_size": 1,
    "gradient_checkpointing": True,
    "lora_rank": 16,
    "learning_rate": 1e-4,
    "validation_resolution": "1024x1024",
    "validation_guidance": 4.5,
    "validation_num_inference_steps": 30,
    "--enable_group_offload": True,
    "--group_offload_type": "block_level",
    "--group_offload_blocks_per_group": 1,
    "data_backend_config": "backends.json",
}
BACKENDS: list[dict[str, Any]] = [
    {"id": "pictures", "type": "local", "instance_data_dir": "pictures", "resolution": 1024, "repeats": 2},
    {"id": "small", "type": "local", "instance_data_dir": "pictures", "resolution": 0.25, "resolution_type": "area"},
    {"id": "texts", "type": "local", "dataset_type": "text_embeds", "cache_dir": "cache"},
]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a config beside a checkpoint, a folder of pictures and data backends; the file's path."""

    def to_file(values: Any, backends: Any = BACKENDS) -> Path:
        for folder in ("LongCat-Image", "pictures", "before"):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "backends.json").write_text(json.dumps(backends), encoding="utf-8")
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
        ({"dataset": {"folder": "nowhere"}}, "no dataset 'nowhere'"),
        ({"validation": {"step": 3}}, "'step'"),
        ({"validation": {"size": [100, 100]}}, "not a multiple of 16"),
        ({"validation": {"steps": 0}}, "validation settings are wrong"),
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


def test_simpletuners_quickstart_means_the_same_here(write: Any, tmp_path: Path) -> None:
    found = config.read(write(QUICKSTART))
    assert found.checkpoint == tmp_path / "LongCat-Image"
    assert found.settings == TrainSettings(
        steps=10_000,
        batch=1,
        rank=16,
        learning_rate=1e-4,
        targets="attention",
        checkpointing="block",
        offload="block",
        offload_stream=False,
        flow_shift=3.0,
        warmup=0,
    )
    assert (found.validation.guidance, found.validation.steps, found.validation.size) == (4.5, 30, (1024, 1024))
    assert found.dataset.resolutions == "1024,512" and found.dataset.repeats == 3 and found.dataset.grid == 64
    assert found.notes == ("'repeats' differs between the data backends; all get the first one's, 2",)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"flow_schedule_shift": 0, "flow_schedule_auto_shift": True}, {"flow_shift": "batch"}),
        ({"flow_schedule_shift": 1.88}, {"flow_shift": 1.88}),
        ({"gradient_checkpointing": False}, {"checkpointing": "none"}),
        ({"gradient_checkpointing_interval": 2}, {"checkpointing": "every-second"}),
        ({"optimizer": "bnb-adamw8bit"}, {"optimiser": "adamw-8bit"}),
        ({"optimizer": "prodigy", "learning_rate": "1.0"}, {"optimiser": "prodigy", "learning_rate": 1.0}),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10}, {"schedule": "constant", "warmup": 10}),
        ({"use_ema": True, "ema_decay": 0.99}, {"ema": 0.99}),
        ({"lora_alpha": 8, "max_train_steps": "30", "seed": 4}, {"alpha": 8, "steps": 30, "seed": 4}),
        ({"gradient_accumulation_steps": 4, "max_grad_norm": 2.0}, {"accumulation": 4, "clip": 2.0}),
        ({"checkpointing_steps": 5, "checkpoints_total_limit": 2, "validation_steps": 7},
         {"save_every": 5, "keep": 2, "validate_every": 7}),
    ],
)  # fmt: skip
def test_simpletuners_settings(given: dict[str, Any], expected: dict[str, Any], write: Any) -> None:
    found = config.read(write({**QUICKSTART, **given})).settings
    assert {name: getattr(found, name) for name in expected} == expected


# What turns each on, beside the key itself; the setting, its value where the key is on, and where it is off.
FLAGS: list[tuple[str, dict[str, Any], str, Any, Any]] = [
    ("gradient_checkpointing", {}, "checkpointing", "block", "none"),
    ("--enable_group_offload", {}, "offload", "block", "none"),
    ("group_offload_use_stream", {}, "offload_stream", True, False),
    ("use_ema", {"ema_decay": 0.9}, "ema", 0.9, 0.0),
    ("flow_schedule_auto_shift", {"flow_schedule_shift": 0}, "flow_shift", "batch", 1.0),
]


@pytest.mark.parametrize(("key", "others", "setting", "on", "off"), FLAGS, ids=[each[0] for each in FLAGS])
def test_booleans_count_as_text_too_and_nothing_else_does(
    key: str, others: dict[str, Any], setting: str, on: Any, off: Any, write: Any
) -> None:
    for value, expected in ((True, on), ("true", on), ("True", on), (False, off), ("false", off), ("False", off)):
        found = config.read(write({**QUICKSTART, **others, key: value})).settings
        assert getattr(found, setting) == expected, value
    for value in ("yes", 2, []):
        with pytest.raises(LongCatError, match=f"'{key.lstrip('-')}' .* expected true or false"):
            config.read(write({**QUICKSTART, **others, key: value}))


WHOLE, NUMBER, PIXELS = "expected a whole number", "expected a number", "expected pixels such as 1024"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *(("validation_resolution", value, PIXELS) for value in ("big", 1.0, "1024x", "1024x768,x")),
        *(("flow_schedule_shift", value, NUMBER) for value in ("auto", True, [1])),
        ("caption_dropout_probability", "x", NUMBER),
        ("learning_rate", "fast", NUMBER),
        ("validation_guidance", "high", NUMBER),
        *((key, value, WHOLE) for key in ("lora_rank", "aspect_bucket_alignment") for value in ("64px", 1.5, False)),
        *((key, "x", WHOLE) for key in ("gradient_checkpointing_interval", "validation_seed", "num_train_epochs")),
        ("--group_offload_blocks_per_group", {}, WHOLE),
        ("resolution", 0.5, WHOLE),
    ],
)
def test_a_number_that_is_none_is_refused_by_its_key(key: str, value: Any, expected: str, write: Any) -> None:
    with pytest.raises(LongCatError, match=f"'{key.lstrip('-')}' .* is {re.escape(repr(value))}; {expected}"):
        config.read(write({**QUICKSTART, key: value}, [{"instance_data_dir": "pictures"}]))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("repeats", "two", WHOLE), ("repeats", None, WHOLE), ("resolution", None, WHOLE), ("resolution", [512], WHOLE)],
)
def test_a_number_of_a_data_backend_is_refused_by_its_key(key: str, value: Any, expected: str, write: Any) -> None:
    with pytest.raises(LongCatError, match=f"'{key}' .* is {re.escape(repr(value))}; {expected}"):
        config.read(write(QUICKSTART, [{"instance_data_dir": "pictures", key: value}]))


@pytest.mark.parametrize(("value", "size"), [(768, (768, 768)), ("768", (768, 768)), ("1344X768", (1344, 768))])
def test_validation_sizes(value: Any, size: tuple[int, int], write: Any) -> None:
    assert config.read(write({**QUICKSTART, "validation_resolution": value})).validation.size == size


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ({"resolution": "512"}, "512"),
        ({"resolution": "1024x1024,1344x768"}, "1024x1024,1344x768"),
        ({"resolution": "1.0", "resolution_type": "area"}, "1024"),
    ],
)
def test_resolutions_of_a_data_backend(backend: dict[str, Any], expected: str, write: Any) -> None:
    found = config.read(write(QUICKSTART, [{"instance_data_dir": "pictures", **backend}]))
    assert found.dataset.resolutions == expected


def test_int8_is_taken_where_nothing_is_offloaded(write: Any) -> None:
    values = {**QUICKSTART, "base_model_precision": "int8-quanto", "--enable_group_offload": False}
    assert config.read(write(values)).settings.base_precision == "int8-quanto"
    with pytest.raises(LongCatError, match="cannot move weights of the precision 'int8-quanto'"):
        config.read(write({**values, "--enable_group_offload": True}))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"--lora_rnk": 4}, r"'lora_rnk' \(did you mean 'lora_rank'\?\)"),
        ({"model_family": "flux"}, "'model_family' .* is 'flux'"),
        ({"model_type": "full"}, "'model_type' .* is 'full'"),
        ({"lora_type": "lycoris"}, "'lora_type' .* is 'lycoris'"),
        ({"model_flavour": "pro"}, "'model_flavour' .* is 'pro'"),
        ({"base_model_precision": "nf4-bnb"}, "'base_model_precision' .* is 'nf4-bnb'"),
        ({"lr_scheduler": "polynomial"}, "'lr_scheduler' .* is 'polynomial'"),
        ({"group_offload_to_disk_path": "/tmp/x"}, "'group_offload_to_disk_path'"),
    ],
)
def test_what_this_trainer_does_not_do_is_refused_by_name(given: dict[str, Any], told: str, write: Any) -> None:
    with pytest.raises(LongCatError, match=told):
        config.read(write({**QUICKSTART, **given}))


@pytest.mark.parametrize(
    ("backends", "told"),
    [
        ([{"type": "aws", "instance_data_dir": "pictures"}], "'type' .* is 'aws'"),
        ([{"instance_data_dir": "pictures"}, {"instance_data_dir": "before"}], "2 folders of pictures"),
        ([{"instance_data_dir": "pictures", "repeat": 2}], r"'repeat' \(did you mean 'repeats'\?\)"),
        ([{"dataset_type": "video", "instance_data_dir": "pictures"}], "'dataset_type' .* is 'video'"),
        ([{"dataset_type": "text_embeds"}], "without a local image dataset"),
    ],
)
def test_data_backends_that_cannot_be_read_are_refused(backends: Any, told: str, write: Any) -> None:
    with pytest.raises(LongCatError, match=told):
        config.read(write(QUICKSTART, backends))


def test_keys_without_a_meaning_here_are_told(write: Any) -> None:
    found = config.read(write({**QUICKSTART, "report_to": "wandb", "--push_to_hub": False}))
    assert {"'push_to_hub' means nothing here", "'report_to' means nothing here"} <= set(found.notes)


def test_edit_backends_bring_the_pictures_before(write: Any, tmp_path: Path) -> None:
    backends = [
        {"id": "after", "instance_data_dir": "pictures", "conditioning_data": "before"},
        {"id": "before", "dataset_type": "conditioning", "instance_data_dir": "before"},
    ]
    found = config.read(write(QUICKSTART, backends))
    assert found.dataset.reference_folder == str(tmp_path / "before")
    assert found.roots == (tmp_path / "pictures", tmp_path / "before")
