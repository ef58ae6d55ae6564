"""SimpleTuner's config.json and its data backends: what is taken, what is told, what is refused."""

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
        ({"resolution": 512, "resolution_type": "pixel_area", "crop": False}, "512"),
        ({"resolution": 512, "crop": True, "crop_aspect": "preserve"}, "512"),
        ({"resolution": 512, "resolution_type": "pixel", "crop": True}, "512x512"),
        ({"resolution": 0.25, "resolution_type": "area", "crop": "true", "crop_aspect": "square"}, "512x512"),
    ],
)
def test_resolutions_of_a_data_backend(backend: dict[str, Any], expected: str, write: Any) -> None:
    found = config.read(write(QUICKSTART, [{"instance_data_dir": "pictures", **backend}]))
    assert found.dataset.resolutions == expected


def test_a_repository_is_looked_for_in_the_folder_of_its_download(write: Any, tmp_path: Path) -> None:
    values = {**QUICKSTART, "pretrained_model_name_or_path": "meituan-longcat/LongCat-Image"}
    assert config.read(write(values)).checkpoint == tmp_path / "LongCat-Image"


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


@pytest.mark.parametrize("key", ["lora_dropout", "flow_sigmoid_scale", "user_prompt_library"])
def test_keys_with_a_meaning_that_is_not_had_here_are_told(key: str, write: Any) -> None:
    assert f"'{key}' is not supported, ignored" in config.read(write({**QUICKSTART, key: 1})).notes


def test_of_several_validation_sizes_the_one_that_is_drawn_is_told(write: Any) -> None:
    found = config.read(write({**QUICKSTART, "validation_resolution": "1344x768, 1024x1024"}))
    assert found.validation.size == (1344, 768)
    assert "'validation_resolution' has 2 sizes, only the first is drawn: 1344x768" in found.notes


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ({"crop": False}, "'crop': pictures cover the aspect bucket"),
        ({"crop": True, "crop_aspect": "preserve"}, "'crop': pictures cover the aspect bucket"),
        ({"crop": True}, "'crop_style' random: pictures are cropped at their centre"),
        ({"probability": 0.5}, "'probability' of a data backend is not supported, ignored"),
        ({"minimum_image_size": 768}, "'minimum_image_size' 768: what is too small for its bucket is left out"),
        ({"maximum_image_size": 2048}, "'maximum_image_size' of a data backend is not supported, ignored"),
        ({"cache_dir_vae": "cache"}, "'cache_dir_vae' of a data backend means nothing here"),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "zorb"}, "'instance_prompt': a picture that has a"),
    ],
)
def test_what_a_data_backend_asks_for_and_does_not_get_is_told(backend: dict[str, Any], told: str, write: Any) -> None:
    found = config.read(write(QUICKSTART, [{"instance_data_dir": "pictures", **backend}]))
    assert told in "\n".join(found.notes)


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ({"caption_strategy": "filename"}, "'caption_strategy' .* is 'filename'"),
        ({"caption_strategy": "parquet"}, "'caption_strategy' .* is 'parquet'"),
        ({"caption_strategy": "instanceprompt"}, "'instance_prompt' .* is None; expected the prompt"),
        ({"resolution_type": "pixel"}, "'resolution_type' .* is 'pixel'"),
        ({"resolution_type": "pixel", "crop": True, "crop_aspect": "preserve"}, "'resolution_type' .* is 'pixel'"),
        ({"resolution_type": "inches"}, "'resolution_type' .* is 'inches'"),
        ({"crop": True, "crop_aspect": "closest"}, "'crop_aspect' .* is 'closest'"),
        ({"conditioning_type": "mask", "dataset_type": "conditioning"}, "'conditioning_type' .* is 'mask'"),
        ({"instance_data_dir": ""}, "'instance_data_dir' .* is ''; expected the folder of the pictures"),
    ],
)
def test_a_data_backend_that_would_train_on_something_else_is_refused(
    backend: dict[str, Any], told: str, write: Any
) -> None:
    with pytest.raises(LongCatError, match=told):
        config.read(write(QUICKSTART, [{"instance_data_dir": "pictures", **backend}]))


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"probability": 0.5}, r"'probability' .* is \[1.0, 0.5\]"),
        ({"prepend_instance_prompt": True, "instance_prompt": "zorb"}, r"'instance_prompt' .* is \['', 'zorb'\]"),
    ],
)
def test_data_backends_that_differ_in_what_a_run_has_once_are_refused(
    second: dict[str, Any], told: str, write: Any
) -> None:
    backends = [{"instance_data_dir": "pictures"}, {"instance_data_dir": "pictures", "resolution": 512, **second}]
    with pytest.raises(LongCatError, match=told):
        config.read(write(QUICKSTART, backends))


@pytest.mark.parametrize("key", ["caption_strategy", "prepend_instance_prompt", "only_instance_prompt"])
def test_the_instance_prompt_becomes_the_trigger_word(key: str, write: Any) -> None:
    backend = {"instance_data_dir": "pictures", "instance_prompt": "a zorb", key: True}
    if key == "caption_strategy":
        backend[key] = "instanceprompt"
    assert config.read(write(QUICKSTART, [backend])).dataset.trigger_word == "a zorb"


def test_edit_backends_bring_the_pictures_before(write: Any, tmp_path: Path) -> None:
    backends = [
        {"id": "after", "instance_data_dir": "pictures", "conditioning_data": "before"},
        {"id": "before", "dataset_type": "conditioning", "instance_data_dir": "before"},
    ]
    found = config.read(write(QUICKSTART, backends))
    assert found.dataset.reference_folder == str(tmp_path / "before")
    assert found.roots == (tmp_path / "pictures", tmp_path / "before")
