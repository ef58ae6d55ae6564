"""The alpha of each LoRA pair, from wherever its file or folder says it.

The trap of LoRA files: without alpha a LoRA still loads, at the wrong strength. ComfyUI reads it from tensors beside
the pair, diffusers from the file's header, PEFT from ``adapter_config.json``; the official training script leaves it
at PEFT's default of 8, so that its files alone are taken up to four times too strong.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LongCatError

CONFIG = "adapter_config.json"
HEADER = "lora_adapter_metadata"
_PEFT_DEFAULT = 8
_PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.", "unet.")
_UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "fan_in_fan_out")

_OTHER_BASE = ("pissa", "olora", "corda", "loftq")  # they took something from the weights that the LoRA goes with


@dataclass(frozen=True)
class Alphas:
    """What a PEFT configuration says about alpha."""

    source: str  # for the report
    config: Mapping[str, Any]

    def of(self, module: str, rank: int) -> float:
        """The alpha of one layer's pair of a rank; its scale is alpha / rank, for rank-stabilised LoRA too."""
        alpha = float(_matching(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        return alpha * math.sqrt(rank) if self.config.get("use_rslora") else alpha

    def targets(self) -> tuple[str, ...]:
        """Names, or ends of names at a dot, of the layers that have a pair; none where they are told otherwise."""
        names = self.config.get("target_modules")
        return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def from_header(metadata: Mapping[str, str], name: str) -> Alphas | None:
    """The PEFT configuration in a safetensors header, as diffusers and SimpleTuner write it; None if there is none.

    Raises:
        LongCatError: it cannot be read, or asks for what is no plain LoRA.
    """
    text = metadata.get(HEADER)
    if text is None:
        return None
    config = _parse(text, f"{name}: {HEADER}")
    plain = {_without_prefix(key): value for key, value in config.items()}
    return _alphas(plain, f"header {HEADER}", name) if "lora_alpha" in plain else None


def from_folder(folder: Path) -> Alphas | None:
    """The PEFT configuration beside a file; None if there is none.

    Raises:
        LongCatError: it cannot be read, or asks for what is no plain LoRA.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    name = f"{folder.name}/{CONFIG}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(name, error) from error
    config = {"lora_alpha": _PEFT_DEFAULT, **_parse(text, name)}  # what PEFT takes where the file says nothing
    return _alphas(config, CONFIG, name)


def to_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The PEFT configuration of LoRAs by their modules, with alpha equal to the rank, as diffusers reads it."""
    (rank, _), *_ = Counter(ranks.values()).most_common()
    # A pattern matches the end of a name; the mark ties it to the beginning, as "proj_out" is the name of many layers.
    others = {f"^{module}": value for module, value in ranks.items() if value != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
    }


def _alphas(config: Mapping[str, Any], source: str, name: str) -> Alphas:
    found = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA":
        found.append(f"peft_type {config['peft_type']}")
    if str(config.get("init_lora_weights")).startswith(_OTHER_BASE):
        found.append(f"init_lora_weights {config['init_lora_weights']}")
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']}")
    if found:
        raise LongCatError(
            f"'{name}' asks for {', '.join(found)}, which cannot be applied. Use a plain LoRA, or merge this one into "
            "its model with PEFT.",
            f"“{name}”要求 {', '.join(found)}，无法应用。请使用普通 LoRA，或用 PEFT 将其合并到模型中。",
        )
    patterns = config.get("alpha_pattern") or {}
    numbers = [config["lora_alpha"], *(patterns.values() if isinstance(patterns, dict) else ["?"])]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise _unreadable(name, ValueError(f"lora_alpha {config['lora_alpha']!r}, alpha_pattern {patterns!r}"))
    for pattern in patterns:
        try:
            _ending(pattern)
        except re.error as error:
            raise _unreadable(name, ValueError(f"alpha_pattern {pattern!r}: {error}")) from error
    return Alphas(source, config)


def _matching(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """As PEFT does it: the first pattern that fits the end of the name at a dot, or all of it."""
    for pattern, value in (patterns or {}).items():
        if module == pattern or module.endswith(f".{pattern}") or module == _without_prefix(pattern.lstrip("^")):
            return value
        if _ending(pattern).match(module):
            return value
    return otherwise


def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _without_prefix(key: str) -> str:
    return next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(name, error) from error
    if not isinstance(config, dict):
        raise _unreadable(name, ValueError(type(config).__name__))
    return config


def _unreadable(name: str, error: Exception) -> LongCatError:
    return LongCatError(
        f"'{name}', which says how strong the LoRA is, cannot be read ({error}). Copy the whole LoRA folder again.",
        f"“{name}”记录了 LoRA 的强度，但无法读取（{error}）。请重新复制整个 LoRA 文件夹。",
    )
