"""SimpleTuner's data backends, as the dataset section of our config.

Source: SimpleTuner's DATALOADER.md and OPTIONS.md (4.10). What would train on other pictures, sizes or captions than
there is an error; the rest is told.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import LongCatError
from .settings import unknown_keys
from .simpletuner_values import flag, integer, number, require, unsupported, wrong

ReadBackends = Callable[[str], list[Any]]
Backend = Mapping[str, Any]

_HANDLED = {
    "id", "type", "dataset_type", "disabled", "instance_data_dir", "conditioning_data", "conditioning_type",
    "caption_strategy", "instance_prompt", "only_instance_prompt", "prepend_instance_prompt", "repeats", "probability",
    "resolution", "resolution_type", "minimum_image_size", "crop", "crop_aspect", "crop_style",
}  # fmt: skip
# Pictures are scaled down to cover their bucket before they are cut, whatever their size.
_UNSUPPORTED = {"maximum_image_size", "target_downsample_size", "crop_aspect_buckets"}
_MEANINGLESS = {
    "metadata_backend", "parquet", "cache_dir", "cache_dir_vae", "cache_dir_conditioning", "text_embeds", "default",
    "write_batch_size", "hash_filenames", "preserve_data_backend_cache", "skip_file_discovery", "resolution_frames",
    "vae_cache_clear_each_epoch", "disable_validation",
}  # fmt: skip
_TYPES = ("pixel_area", "area", "pixel")
_LEAST_PIXELS = 64  # below it, a resolution of the type "area" is in megapixels
_NUMBER = re.compile(r"\d*\.?\d+")


def dataset(given: Mapping[str, Any], read_backends: ReadBackends, notes: list[str]) -> dict[str, Any]:
    """The dataset section; what is ignored or done otherwise goes to the notes.

    Raises:
        LongCatError: a key is unknown, or a value asks for what this trainer does not do.
    """
    if given.get("data_backend_config"):
        backends = read_backends(str(given["data_backend_config"]))
    else:
        backends = [{"instance_data_dir": given.get("instance_data_dir", "")}]
    images, references = _local(backends)
    repeats = [integer(each, "repeats") for each in images]
    values: dict[str, Any] = {
        "folder": _folder(images, "pictures", "图像"),
        "resolutions": ",".join(dict.fromkeys(_resolution(given, each) for each in images)),
        "grid": integer(given, "aspect_bucket_alignment", 64),
        "repeats": repeats[0] + 1,
        "caption_dropout": number(given, "caption_dropout_probability", 0.1),
        "trigger_word": _trigger_word(given, images),
    }
    if references:
        values["reference_folder"] = _folder(references, "pictures before an edit", "编辑前的图像")
    if len(set(repeats)) > 1:
        notes.append(f"'repeats' differs between the data backends; all get the first one's, {repeats[0]}")
    _refuse_selections(images)
    least = max(number({**given, **each}, "minimum_image_size") for each in images)
    if least > 0:
        notes.append(
            f"'minimum_image_size' {least:g}: what is too small for its bucket is left out, and named, instead"
        )
    notes += dict.fromkeys(note for each in images for note in _notes(each))
    return values


def _local(backends: list[Any]) -> tuple[list[Backend], list[Backend]]:
    """Backends of pictures and of those before the edit; text caches are left out."""
    images: list[Backend] = []
    references: list[Backend] = []
    known = _HANDLED | _UNSUPPORTED | _MEANINGLESS
    for backend in backends:
        if not isinstance(backend, dict):
            raise unsupported("data_backend_config", backend, ["objects"])
        unknown = sorted(set(backend) - known)
        if unknown:
            raise unknown_keys(unknown, sorted(known))
        kind = backend.get("dataset_type", "image")
        if flag(backend, "disabled") or kind in ("text_embeds", "image_embeds"):
            continue
        require(backend, "type", ("local",))
        if kind not in ("image", "conditioning"):
            raise unsupported("dataset_type", kind, ["image", "conditioning", "text_embeds"])
        require(backend, "conditioning_type", ("reference_strict", "reference_loose"))
        (images if kind == "image" else references).append(backend)
    if not images:
        raise unsupported("data_backend_config", "without a local image dataset", ["local image datasets"])
    return images, references


def _folder(backends: list[Backend], en: str, zh: str) -> str:
    """The one folder of some backends."""
    for each in backends:
        if not isinstance(each.get("instance_data_dir"), str) or not each["instance_data_dir"]:
            raise wrong("instance_data_dir", each.get("instance_data_dir"), f"the folder of the {en}", f"{zh}文件夹")
    folders = sorted({each["instance_data_dir"] for each in backends})
    if len(folders) > 1:
        raise LongCatError(
            f"The data backends have {len(folders)} folders of {en} ({', '.join(folders)}), and a run here has one. "
            "Put them into subfolders of one folder.",
            f"数据后端包含 {len(folders)} 个{zh}文件夹（{'、'.join(folders)}），而此处一次训练只用一个。"
            "请将其放入同一文件夹的子文件夹中。",
        )
    return folders[0]


def _trigger_word(given: Mapping[str, Any], images: list[Backend]) -> str:
    """What stands in front of the captions, and alone where a picture has none."""
    prompts = list(dict.fromkeys(_instance_prompt(each) for each in images))
    word = str(given.get("trigger_word", ""))
    if len(prompts) > 1 or (word and prompts[0] not in ("", word)):
        raise unsupported("instance_prompt", prompts, ["one for all data backends, or trigger_word"])
    return word or prompts[0]


def _instance_prompt(backend: Backend) -> str:
    """The prompt of a backend's pictures; empty where their own captions are all there is."""
    require(backend, "caption_strategy", ("textfile", "instanceprompt"))
    if not _same_for_all(backend) and not flag(backend, "prepend_instance_prompt"):
        return ""
    prompt = backend.get("instance_prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise wrong("instance_prompt", prompt, "the prompt of the pictures", "图像的提示词")
    return prompt.strip()


def _same_for_all(backend: Backend) -> bool:
    """Whether every picture has the instance prompt alone."""
    return backend.get("caption_strategy") == "instanceprompt" or flag(backend, "only_instance_prompt")


def _refuse_selections(images: list[Backend]) -> None:
    """Backends that come more often than others are not done here."""
    chances = [number(each, "probability", 1.0) for each in images]
    if len(set(chances)) > 1:
        raise unsupported("probability", chances, ["the same for all data backends"])


def _notes(backend: Backend) -> list[str]:
    """What of a backend is ignored, or done in another way."""
    keys = set(backend)
    notes = [f"'{key}' of a data backend is not supported, ignored" for key in sorted(keys & _UNSUPPORTED)]
    notes += [f"'{key}' of a data backend means nothing here" for key in sorted(keys & _MEANINGLESS)]
    if "probability" in keys:
        notes.append("'probability' of a data backend is not supported, ignored: all its pictures come in each epoch")
    if _same_for_all(backend):
        notes.append("'instance_prompt': a picture that has a caption keeps it, behind the instance prompt")
    if keys & {"crop", "crop_aspect"} and not _crops_square(backend):
        notes.append("'crop': pictures cover the aspect bucket that is nearest to their ratio, and the rest is cut off")
    style = backend.get("crop_style", "random" if flag(backend, "crop") else "center")
    if style not in ("center", "centre"):
        notes.append(f"'crop_style' {style}: pictures are cropped at their centre")
    return notes


def _crops_square(backend: Backend) -> bool:
    if not flag(backend, "crop"):
        return False
    require(backend, "crop_aspect", ("square", "preserve"))
    return backend.get("crop_aspect", "square") == "square"


def _resolution(given: Mapping[str, Any], backend: Backend) -> str:
    """Ours for a resolution in pixels or, for the type "area", in megapixels."""
    values, square = {**given, **backend}, _crops_square(backend)
    require(values, "resolution_type", _TYPES)
    value, kind = values.get("resolution"), values.get("resolution_type")
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return value
    if kind == "pixel" and not square:  # of the shorter side, so that long pictures are larger
        raise unsupported("resolution_type", kind, [*_TYPES[:2], "pixel with crop and crop_aspect square"])
    if kind == "area" and 0 < number(values, "resolution") < _LEAST_PIXELS:
        side = round(math.sqrt(number(values, "resolution")) * 1024 / 64) * 64
    else:
        side = integer(values, "resolution", 1024)
    return f"{side}x{side}" if square else str(side)
