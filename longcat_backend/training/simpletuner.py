"""SimpleTuner's ``config.json`` for this family, as the sections of ours.

Source: SimpleTuner's LongCat-Image quickstart and OPTIONS.md (4.10). Keys may carry the leading dashes of the
command line. A key that nobody knows is an error; one that is known and means nothing here is told.
"""

import re
from collections.abc import Mapping
from typing import Any

from .. import flavours
from . import simpletuner_data
from .settings import unknown_keys
from .simpletuner_data import ReadBackends
from .simpletuner_values import choice, flag, integer, number, require, unsupported, wrong

_PRECISIONS = {
    "no_change": "bf16",
    "bf16": "bf16",
    "fp32": "fp32",
    "int8-quanto": "int8-quanto",
    "int4-quanto": "int4-quanto",
    "fp8-torchao": "fp8-torchao",
}
_OPTIMISERS = {
    "adamw": ("adamw", "adamw_bf16", "optimi-adamw", "torch-adamw"),
    "adamw-8bit": ("ao-adamw8bit", "bnb-adamw8bit", "adamw8bit"),
    "prodigy": ("prodigy",),
    "lion": ("lion", "optimi-lion", "bnb-lion", "bnb-lion8bit"),
}
_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"}
# Keys that are taken as they are, by the name that they have here.
_INTEGERS = {
    "train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "lora_rank": "rank",
    "lr_warmup_steps": "warmup",
    "max_train_steps": "steps",
    "seed": "seed",
    "checkpointing_steps": "save_every",
    "checkpoint_step_interval": "save_every",
    "checkpoints_total_limit": "keep",
    "validation_steps": "validate_every",
    "validation_step_interval": "validate_every",
}
_NUMBERS = {
    "lora_alpha": "alpha",
    "learning_rate": "learning_rate",
    "max_grad_norm": "clip",
    "adam_weight_decay": "weight_decay",
    "optimizer_weight_decay": "weight_decay",
}
_VALIDATION_INTEGERS = {"validation_num_inference_steps": "steps", "validation_seed": "seed"}
_VALIDATION_NUMBERS = {"validation_guidance": "guidance"}
# Read by name in the functions below.
_HANDLED = {
    "model_type", "model_family", "model_flavour", "pretrained_model_name_or_path", "base_model_precision",
    "pretrained_transformer_model_name_or_path", "optimizer", "lr_scheduler", "gradient_checkpointing",
    "gradient_checkpointing_interval", "use_ema", "ema_decay", "flow_schedule_shift", "flow_schedule_auto_shift",
    "enable_group_offload", "group_offload_type", "group_offload_blocks_per_group", "group_offload_use_stream",
    "group_offload_to_disk_path", "dynamo_backend", "output_dir", "data_backend_config",
    "resolution", "resolution_type", "aspect_bucket_alignment", "caption_dropout_probability", "instance_data_dir",
    "validation_prompt", "validation_resolution", "validation_negative_prompt", "trigger_word", "lora_type",
    "hub_model_id", "num_train_epochs", "minimum_image_size",
}  # fmt: skip
# Known to SimpleTuner, with a meaning that this trainer does not have.
_UNSUPPORTED = {
    "lora_dropout", "lora_init_type", "flow_sigmoid_scale", "user_prompt_library", "validation_prompt_library",
    "validation_guidance_rescale", "evaluation_type", "eval_steps_interval", "num_eval_images", "ema_update_interval",
    "ema_validation", "grad_clip_method", "lr_end", "lr_num_cycles", "lr_power", "lr_scale", "is_regularisation_data",
    "num_processes", "num_machines", "training_num_processes", "revision", "variant", "text_encoder_1_precision",
    "validation_preview", "validation_preview_steps", "tokenizer_max_length", "validation_torch_compile",
    "delete_problematic_images", "delete_unwanted_images", "validation_disable_unconditional",
}  # fmt: skip
# Known to SimpleTuner and without a meaning here: logging, publishing, caches, and what this trainer always does.
_MEANINGLESS = {
    "report_to", "tracker_project_name", "tracker_run_name", "push_to_hub", "push_checkpoints_to_hub",
    "resume_from_checkpoint", "allow_tf32", "disable_tf32", "cache_dir", "cache_dir_text", "cache_dir_vae",
    "vae_batch_size", "write_batch_size", "read_batch_size", "image_processing_batch_size", "max_workers",
    "dataloader_prefetch", "dataloader_prefetch_qlen", "webhook_config", "disable_bucket_pruning", "quantize_via",
    "vae_dtype", "vae_enable_tiling", "vae_enable_slicing", "base_model_default_dtype",
    "attention_mechanism", "preserve_data_backend_cache", "skip_file_discovery", "compress_disk_cache",
    "mixed_precision", "i_know_what_i_am_doing", "ema_device", "keep_vae_loaded", "offload_during_startup",
    "model_card_private",
    "model_card_safe_for_work", "model_card_note", "print_filenames", "print_sampler_statistics",
    "debug_aspect_buckets", "metadata_update_interval", "disable_benchmark", "dataset_type", "local_rank",
    "accelerate_extra_args",
}  # fmt: skip
DEFAULT_STEPS = 10_000
_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


def recognise(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object is such a config: it names the model's family, or has keys of the command line."""
    keys = {key.lstrip("-") for key in values}
    return bool(keys & {"model_family", "model_flavour", "data_backend_config", "base_model_precision"})


def convert(values: Mapping[str, Any], read_backends: ReadBackends) -> tuple[dict[str, Any], list[str]]:
    """The sections of :mod:`config`, and notes on what is ignored or done in another way.

    Args:
        read_backends: the list in the file that ``data_backend_config`` names.

    Raises:
        LongCatError: a key is unknown, or a value asks for what this trainer does not do.
    """
    given = {key.lstrip("-").replace("-", "_"): value for key, value in values.items()}
    read = {*_INTEGERS, *_NUMBERS, *_VALIDATION_INTEGERS, *_VALIDATION_NUMBERS, *_HANDLED}
    known = read | _UNSUPPORTED | _MEANINGLESS
    unknown = sorted(set(given) - known)
    if unknown:
        raise unknown_keys(unknown, sorted(known))
    given = {key: value for key, value in given.items() if value is not None}
    require(given, "model_type", ("lora",))
    require(given, "model_family", ("longcat_image",))
    require(given, "lora_type", ("standard",))
    notes = [f"'{key}' means nothing here" for key in sorted(set(given) & _MEANINGLESS)]
    notes += [f"'{key}' is not supported, ignored" for key in sorted(set(given) & _UNSUPPORTED)]
    converted = {
        "name": str(given.get("hub_model_id") or "simpletuner-lora").rpartition("/")[2],
        "checkpoint": _checkpoint(given),
        "dataset": simpletuner_data.dataset(given, read_backends, notes),
        "settings": _settings(given),
        "validation": _validation(given, notes),
        "output": str(given.get("output_dir") or "output"),
    }
    return converted, notes


def _checkpoint(given: Mapping[str, Any]) -> str:
    for key in ("pretrained_transformer_model_name_or_path", "pretrained_model_name_or_path"):
        if given.get(key):
            return str(given[key])
    flavour = str(given.get("model_flavour", "final"))
    if flavour not in flavours.FLAVOURS:
        raise unsupported("model_flavour", flavour, flavours.FLAVOURS)
    return flavours.FLAVOURS[flavour].folder_name


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    settings = _numbers(given, _INTEGERS, _NUMBERS)
    settings.setdefault("steps", DEFAULT_STEPS)
    if integer(given, "num_train_epochs") and "max_train_steps" not in given:
        raise unsupported("num_train_epochs", given["num_train_epochs"], ["0, with max_train_steps"])
    settings["targets"] = "attention"
    settings["base_precision"] = choice(given, "base_model_precision", _PRECISIONS, "no_change")
    names = {name: ours for ours, theirs in _OPTIMISERS.items() for name in theirs}
    settings["optimiser"] = choice(given, "optimizer", names, "adamw_bf16")
    settings["schedule"] = choice(given, "lr_scheduler", _SCHEDULES, "constant")
    settings["checkpointing"] = _checkpointing(given)
    settings["compile"] = str(given.get("dynamo_backend", "no")).lower() not in ("no", "", "false")
    if flag(given, "use_ema"):
        settings["ema"] = number(given, "ema_decay", 0.995)
    shift = number(given, "flow_schedule_shift", 3.0)
    automatic = flag(given, "flow_schedule_auto_shift")
    settings["flow_shift"] = shift if shift > 0 else "batch" if automatic else 1.0
    return {**settings, **_offload(given)}


def _numbers(given: Mapping[str, Any], integers: Mapping[str, str], numbers: Mapping[str, str]) -> dict[str, Any]:
    """The values of those keys that are there, by our names."""
    found: dict[str, Any] = {ours: integer(given, key) for key, ours in integers.items() if key in given}
    return {**found, **{ours: number(given, key) for key, ours in numbers.items() if key in given}}


def _checkpointing(given: Mapping[str, Any]) -> str:
    if not flag(given, "gradient_checkpointing"):
        return "none"
    interval = integer(given, "gradient_checkpointing_interval", 1)
    if interval not in (1, 2):
        raise unsupported("gradient_checkpointing_interval", interval, [1, 2])
    return "block" if interval == 1 else "every-second"


def _offload(given: Mapping[str, Any]) -> dict[str, Any]:
    if not flag(given, "enable_group_offload"):
        return {}
    if given.get("group_offload_to_disk_path"):
        raise unsupported("group_offload_to_disk_path", given["group_offload_to_disk_path"], ["null"])
    levels = {"block_level": "block", "leaf_level": "leaf"}
    return {
        "offload": choice(given, "group_offload_type", levels, "block_level"),
        "offload_blocks": integer(given, "group_offload_blocks_per_group", 1),
        "offload_stream": flag(given, "group_offload_use_stream"),
    }


def _validation(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    validation = _numbers(given, _VALIDATION_INTEGERS, _VALIDATION_NUMBERS)
    if given.get("validation_prompt"):
        validation["prompts"] = [str(given["validation_prompt"])]
    if given.get("validation_resolution"):
        sizes = _sizes(given, "validation_resolution")
        validation["size"] = sizes[0]
        if len(sizes) > 1:
            width, height = sizes[0]
            notes.append(f"'validation_resolution' has {len(sizes)} sizes, only the first is drawn: {width}x{height}")
    if given.get("validation_negative_prompt"):
        notes.append("'validation_negative_prompt' is left empty, as the model's recipe has it")
    return validation


def _sizes(given: Mapping[str, Any], key: str) -> list[list[int]]:
    """Width and height of each size: one side for a square, or both, separated by commas."""
    found = [_SIZE.fullmatch(part.strip()) for part in str(given[key]).lower().split(",")]
    if not all(found):
        wanted = "pixels such as 1024, 1024x1024 or 1024x1024,1344x768"
        raise wrong(key, given[key], wanted, "像素尺寸，如 1024、1024x1024 或 1024x1024,1344x768")
    return [[int(match[1]), int(match[2] or match[1])] for match in found if match]
