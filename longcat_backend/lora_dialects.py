"""The names that LoRA files give to the layers of LongCat-Image, and to what is stored for each.

A key is a prefix, the name of a layer, and the name of a part: ``lora_unet_single_blocks_0_linear1.lora_up.weight``.
The prefix tells the program that wrote it. Layers have the names of diffusers or of ComfyUI's class, with dots or
underscores, and one of ComfyUI's layers may hold several official ones.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from . import layouts

# Longest first. The names of kohya, OneTrainer and LyCORIS have underscores in the place of dots.
_PREFIXES = {
    "base_model.model.": "PEFT",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "lora_transformer_": "OneTrainer",
    "transformer.": "diffusers",
    "lora_unet_": "kohya",
    "lycoris_": "LyCORIS",
    "unet.": "diffusers",
}
_BARE = "no prefix"
_BLOCK = re.compile(rf"({'|'.join(stem for stems in layouts.BLOCKS for stem in stems[:2])})[._](\d+)[._](.+)")

DOWN, UP, ALPHA = "down", "up", "alpha"
# Parts that are understood; everything else on a known layer would change the picture if it were left out.
_LORA = (
    (re.compile(r"(?:lora\.down|lora_down|lora_linear_layer\.down|lora_A(?:\.[^.]+)?)\.weight|lora_A"), DOWN),
    (re.compile(r"(?:lora\.up|lora_up|lora_linear_layer\.up|lora_B(?:\.[^.]+)?)\.weight|lora_B"), UP),
    (re.compile(r"alpha"), ALPHA),
)
_DEEPEST = 4  # dots in the name of a part, at most


@dataclass(frozen=True)
class Layer:
    """A layer as a file names it."""

    name: str  # official or ComfyUI's, with dots and underscores as they were
    officials: tuple[str, ...]  # the official layers whose outputs it holds, one after another
    exchanged: bool  # whether its two halves of outputs lie the other way around than officially
    native: bool  # whether the name is that of ComfyUI's class


@dataclass(frozen=True)
class Key:
    """One key of a LoRA file, taken apart."""

    layer: Layer
    part: str  # DOWN, UP, ALPHA, or the name as it is in the file
    dialect: str


def parse(key: str) -> Key | None:
    """Take a key apart; None if it names no layer of LongCat-Image."""
    rest, dialect = _without_prefixes(key)
    pieces = rest.split(".")
    for count in range(1, min(_DEEPEST, len(pieces) - 1) + 1):
        layer = find_layer(".".join(pieces[:-count]))
        if layer is not None:
            style = "native names" if layer.native else "official names"
            return Key(layer, _part(".".join(pieces[-count:])), f"{dialect} ({style})")
    return None


def find_layer(name: str) -> Layer | None:
    """The layer of a name in either of the two layouts, with dots or underscores; None if there is none."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        known, stem = _OUTSIDE_NAMES.get(name.replace(".", "_")), ""
    else:
        block, index, rest = match.groups()
        official, table = _BLOCK_NAMES[block]
        known, stem = table.get(rest.replace(".", "_")), f"{official}.{index}."
    if known is None:
        return None
    officials, native = known
    exchanged = native and officials == (layouts.SWAPPED[1],)
    return Layer(name, tuple(stem + official for official in officials), exchanged, native)


def summary(dialects: Iterable[str]) -> str:
    """The dialects of a file in a few words."""
    return " + ".join(sorted(set(dialects)))


def _without_prefixes(key: str) -> tuple[str, str]:
    dialects = []
    while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
        # "transformer.transformer_blocks…" has the prefix, "transformer_blocks…" does not: prefixes end in . or _.
        key = key.removeprefix(prefix)
        dialects.append(_PREFIXES[prefix])
    return key, dialects[0] if dialects else _BARE


def _part(name: str) -> str:
    return next((part for pattern, part in _LORA if pattern.fullmatch(name)), name)


Names = dict[str, tuple[tuple[str, ...], bool]]


def _names(table: dict[str, tuple[str, ...]]) -> Names:
    names: Names = {core.replace(".", "_"): (officials, True) for core, officials in table.items()}
    for officials in table.values():
        names.update({official.replace(".", "_"): ((official,), False) for official in officials})
    return names


_OUTSIDE_NAMES = _names({**layouts.OUTSIDE, layouts.SWAPPED[0]: layouts.SWAPPED[1:]})
_BLOCK_NAMES = {stem: (stems[1], _names(stems[2])) for stems in layouts.BLOCKS for stem in stems[:2]}
