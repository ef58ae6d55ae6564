"""Everything that can be wrong with a checkpoint, found before a weight is read.

Reads configs and the headers of weight files and builds the modules without storage: a fraction of a second
for the full-size model, so a broken checkpoint is refused before the queue and not after minutes of loading.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL

from . import flow, text_encoder, transformer
from .checkpoints import Checkpoint, audit, build, shapes
from .errors import LongCatError

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# The libraries' defaults for these are another model's (DESIGN.md trap 7).
REQUIRED = {
    "transformer": (
        "attention_head_dim",
        "axes_dims_rope",
        "in_channels",
        "joint_attention_dim",
        "num_attention_heads",
        "num_layers",
        "num_single_layers",
    ),
    "vae": (
        "block_out_channels",
        "in_channels",
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
        "out_channels",
        "sample_size",
        "scaling_factor",
        "shift_factor",
    ),
}
MOST_LAYERS = 1000
_LAYERS = {
    "transformer": ("num_layers", "num_single_layers"),
    "vae": ("layers_per_block",),
    "text_encoder": ("num_hidden_layers",),
}


def verify(checkpoint: Checkpoint) -> None:
    """Check that every part can be built from its config and that its files hold exactly its weights.

    Raises:
        LongCatError: the first thing that is wrong, by the name of the part.
    """
    for part, config in checkpoint.configs.items():
        check_values(part, config)
    build("scheduler", lambda: _check_scheduler(checkpoint.configs["scheduler"]))
    transformer.audited_shapes(checkpoint)
    text_encoder.audited_shapes(checkpoint)
    audit("vae", vae_shapes(checkpoint.configs["vae"]), checkpoint.shapes("vae"))


def vae_shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The weights that a VAE config asks for.

    Raises:
        LongCatError: no VAE can be built from the config.
    """

    def empty() -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            return AutoencoderKL.from_config(dict(config)).state_dict()

    return shapes(build("vae", empty))


def check_values(part: str, config: Mapping[str, Any]) -> None:
    """Refuse values that no module of LongCat-Image can be built with.

    Raises:
        LongCatError: a value is missing or senseless.
    """
    absent = [key for key in REQUIRED.get(part, ()) if key not in config]
    if absent:
        raise _bad_config(part, f"it lacks {', '.join(absent)}", f"缺少 {', '.join(absent)}")
    # Building asks for memory before the weights can contradict.
    values = config.get("text_config", config) if part == "text_encoder" else config
    for key in _LAYERS.get(part, ()):
        layers = values.get(key, 1) if isinstance(values, dict) else None
        if type(layers) is not int or not 0 <= layers <= MOST_LAYERS:
            raise _bad_config(part, f"{key} is {layers}", f"{key} 为 {layers}")
    if part == "transformer":
        _check_rope(config["axes_dims_rope"], config["attention_head_dim"])
    if part == "vae":
        _check_scaling(config)


def _check_rope(axes: Any, head: Any) -> None:
    if not isinstance(axes, list) or len(axes) != 3 or any(type(axis) is not int for axis in axes) or sum(axes) != head:
        raise _bad_config(
            "transformer",
            f"axes_dims_rope {axes} are not three numbers that add up to attention_head_dim {head}",
            f"axes_dims_rope {axes} 应为三个数，且总和等于 attention_head_dim {head}",
        )


def _check_scaling(config: Mapping[str, Any]) -> None:
    for key in ("scaling_factor", "shift_factor"):
        value = config[key]
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number or (key == "scaling_factor" and value <= 0):
            raise _bad_config("vae", f"{key} is {value}", f"{key} 为 {value}")


def _check_scheduler(config: Mapping[str, Any]) -> None:
    if config.get("_class_name") != SCHEDULER:
        found = config.get("_class_name")
        raise _bad_config("scheduler", f"it is for {found}, not {SCHEDULER}", f"它属于 {found}，而不是 {SCHEDULER}")
    levels = flow.sigmas(4, 4096, config)
    if not bool(torch.isfinite(levels).all() and (levels.diff() < 0).all()):
        raise _bad_config("scheduler", f"its sigmas are {levels.tolist()}", f"其 sigma 为 {levels.tolist()}")


def _bad_config(part: str, en: str, zh: str) -> LongCatError:
    return LongCatError(
        f"The config of '{part}' is not LongCat-Image's: {en}. Download this part of the checkpoint again.",
        f"“{part}”的配置不是 LongCat-Image 的：{zh}。请重新下载检查点的这一部分。",
    )
