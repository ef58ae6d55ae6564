"""The key layouts that weights are stored in: the official one (diffusers) and that of ComfyUI's single files.

Transformer and VAE can be rearranged both ways without changing a bit. A rearrangement is a plan, made from shapes
alone: each target tensor is a row of pieces of source tensors, one after another along the first dimension.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """The rows ``start`` to ``stop`` of a source tensor, as in a slice."""

    key: str
    start: int | None = None
    stop: int | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows, as a view."""
        return tensor if self.start is None and self.stop is None else tensor[self.start : self.stop]


Plan = Mapping[str, tuple[Rows, ...]]
Read = Callable[[Rows], torch.Tensor]

# Layers of ComfyUI's class, and the official layers whose outputs they hold one after another.
_DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "modulation.lin": ("norm.linear",),
}
OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_embed.timestep_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
# The official layer gives scale and shift, ComfyUI's shift and scale.
SWAPPED = ("final_layer.adaLN_modulation.1", "norm_out.linear")
BLOCKS = (
    ("double_blocks", "transformer_blocks", _DOUBLE_BLOCK),
    ("single_blocks", "single_transformer_blocks", _SINGLE_BLOCK),
)
_ENDS = ("weight", "bias")
# Early FLUX files have another name for the weight of a norm.
_OLD_NORM = re.compile(r"((?:query|key)_norm)\.scale")

TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
VAE_PREFIXES = ("first_stage_model.", "vae.")

# Parts of the VAE's keys: official, and in ae.safetensors. The blocks of ``up`` are counted from the other end.
_VAE_NAMES = (
    ("down_blocks.{}.resnets.{}", "down.{}.block.{}"),
    ("down_blocks.{}.downsamplers.0", "down.{}.downsample"),
    ("up_blocks.{}.resnets.{}", "up.{}.block.{}"),
    ("up_blocks.{}.upsamplers.0", "up.{}.upsample"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
    ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
    ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)
_VAE_UP = re.compile(r"\.up(?:_blocks)?\.(\d+)\.")
_OFFICIAL_ATTENTION = re.compile(r".*\.attentions\.0\.to_(q|k|v|out\.0)\.weight")
_SINGLE_FILE_ATTENTION = re.compile(r".*\.attn_1\.(q|k|v|proj_out)\.weight")


class Arranged(Mapping[str, torch.Tensor]):
    """Tensors of another layout, each made when it is asked for."""

    def __init__(self, plan: Plan, read: Read) -> None:
        self._plan = plan
        self._read = read

    def __getitem__(self, key: str) -> torch.Tensor:
        """The pieces of one tensor, one after another."""
        pieces = [self._read(rows) for rows in self._plan[key]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        """The keys of the layout."""
        return iter(self._plan)

    def __len__(self) -> int:
        """How many tensors the layout has."""
        return len(self._plan)


def without_prefix(key: str, prefixes: Iterable[str]) -> str:
    """A key without the first of the prefixes that it has."""
    return next((key.removeprefix(prefix) for prefix in prefixes if key.startswith(prefix)), key)


def is_core(keys: Iterable[str]) -> bool:
    """Whether the transformer's keys are those of ComfyUI's class."""
    return any(key.startswith(("double_blocks.", "single_blocks.")) for key in keys)


def plan_core(shapes: Mapping[str, torch.Size]) -> Plan:
    """The plan from the official transformer layout to that of ComfyUI's class.

    Keys that are no part of the official layout keep their name, so that an audit finds them.
    """
    plan: dict[str, tuple[Rows, ...]] = {}
    used = set()
    for core, officials in _layers(shapes, 1).items():
        for end in _ENDS:
            sources = [f"{official}.{end}" for official in officials]
            if all(source in shapes for source in sources):
                plan[f"{core}.{end}"] = tuple(Rows(source) for source in sources)
                used.update(sources)
    core, official = SWAPPED
    for source, target in ((f"{official}.{end}", f"{core}.{end}") for end in _ENDS):
        if source in shapes:
            plan[target] = _swapped(source, shapes[source])
            used.add(source)
    return {**plan, **{key: (Rows(key),) for key in shapes if key not in used}}


def plan_official(shapes: Mapping[str, torch.Size]) -> Plan:
    """The plan from the layout of ComfyUI's class to the official one, the inverse of :func:`plan_core`."""
    hidden = next(iter(shapes.get("img_in.weight", ())), 0)
    names = {_OLD_NORM.sub(r"\1.weight", key): key for key in shapes}
    plan: dict[str, tuple[Rows, ...]] = {}
    used = set()
    for core, officials in _layers(shapes, 0).items():
        for end in _ENDS:
            source = names.get(f"{core}.{end}")
            if source is not None:
                plan.update(
                    zip((f"{name}.{end}" for name in officials), _pieces(source, hidden, len(officials)), strict=True)
                )
                used.add(source)
    core, official = SWAPPED
    for source, target in ((f"{core}.{end}", f"{official}.{end}") for end in _ENDS):
        if source in shapes:
            plan[target] = _swapped(source, shapes[source])
            used.add(source)
    return {**plan, **{key: (Rows(key),) for key in shapes if key not in used}}


def arrange(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Tensors rearranged by a plan, each when it is asked for."""
    return Arranged(plan, lambda rows: rows.of(tensors[rows.key]))


def arranged_shapes(plan: Plan, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """The shapes that a plan makes of shapes."""
    return {key: value.shape for key, value in arrange(plan, _without_storage(shapes)).items()}


def to_core(weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Official transformer weights in the layout of ComfyUI's class, each made when it is asked for."""
    return arrange(plan_core({key: value.shape for key, value in weights.items()}), weights)


def to_official(weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Weights of ComfyUI's class in the official layout, each made when it is asked for."""
    return arrange(plan_official({key: value.shape for key, value in weights.items()}), weights)


def vae_to_single_file(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official VAE weights under the keys of ae.safetensors; attention layers become 1×1 convolutions."""
    names, last_up = [(official, single) for official, single in _VAE_NAMES], _last_up(weights)
    return {
        _renamed(key, names, last_up): value[:, :, None, None]
        if _OFFICIAL_ATTENTION.fullmatch(key) and value.ndim == 2
        else value
        for key, value in weights.items()
    }


def vae_to_official(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of ae.safetensors under the official keys, the inverse of :func:`vae_to_single_file`."""
    names, last_up = [(single, official) for official, single in _VAE_NAMES], _last_up(weights)
    return {
        _renamed(key, names, last_up): value[:, :, 0, 0]
        if _SINGLE_FILE_ATTENTION.fullmatch(key) and value.shape[2:] == (1, 1)
        else value
        for key, value in weights.items()
    }


def is_official_vae(keys: Iterable[str]) -> bool:
    """Whether a VAE's keys are the official ones."""
    return any(".down_blocks." in f".{key}" or ".up_blocks." in f".{key}" for key in keys)


def vae_shapes_to_official(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """The official shapes of the VAE in ae.safetensors."""
    return {key: value.shape for key, value in vae_to_official(_without_storage(shapes)).items()}


def _layers(keys: Iterable[str], side: int) -> dict[str, tuple[str, ...]]:
    """Layers of ComfyUI's class to official layers, for the blocks that the keys of one side name."""
    keys = list(keys)
    layers: dict[str, tuple[str, ...]] = dict(OUTSIDE)
    for *stems, block in BLOCKS:
        pattern = re.compile(rf"{stems[side]}\.(\d+)\.")
        indices = {match[1] for match in map(pattern.match, keys) if match}
        for index in sorted(indices, key=int):
            core, official = (f"{stem}.{index}." for stem in stems)
            layers.update({core + name: tuple(official + part for part in parts) for name, parts in block.items()})
    return layers


def _pieces(source: str, hidden: int, count: int) -> list[tuple[Rows, ...]]:
    """``count`` pieces of ``hidden`` rows; the last takes the rest, so that surplus rows show in its shape."""
    if count == 1:
        return [(Rows(source),)]
    starts = [hidden * number for number in range(count)]
    return [(Rows(source, start, stop),) for start, stop in zip(starts, [*starts[1:], None], strict=True)]


def _swapped(source: str, shape: torch.Size) -> tuple[Rows, ...]:
    half = shape[0] // 2
    return Rows(source, half), Rows(source, None, half)


def _without_storage(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _last_up(keys: Iterable[str]) -> int:
    return max((int(match[1]) for match in map(_VAE_UP.search, keys) if match), default=-1)


def _renamed(key: str, names: Iterable[tuple[str, str]], last_up: int) -> str:
    for old, new in names:
        pattern = re.escape(old).replace(r"\{\}", r"(\d+)")
        match = re.search(rf"(?<=\.){pattern}(?=\.)", key)
        if match:
            numbers = [int(number) for number in match.groups()]
            if old.startswith("up"):
                numbers[0] = last_up - numbers[0]
            key = key[: match.start()] + new.format(*numbers) + key[match.end() :]
    return key
