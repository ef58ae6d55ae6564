"""LoRA files as other programs write them, and what they change: written from the formats, not from the reader."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

Shapes = dict[str, tuple[int, int]]
Changes = dict[str, torch.Tensor]

# ComfyUI's layers of a double and of a single block, and the official ones whose rows they hold.
DOUBLE = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "img_mod.lin": ["norm1.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
    "txt_mod.lin": ["norm1_context.linear"],
}
SINGLE = {
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "modulation.lin": ["norm.linear"],
}
REST = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_embed.timestep_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
SWAPPED = "final_layer.adaLN_modulation.1"


def linear_shapes(transformer: nn.Module) -> Shapes:
    """(out, in) of every linear layer of a diffusers transformer."""
    layers = transformer.named_modules()
    return {name: tuple(layer.weight.shape) for name, layer in layers if isinstance(layer, nn.Linear)}


def native_layers(shapes: Shapes) -> dict[str, list[str]]:
    """ComfyUI's layers of a transformer, with the official layers of each."""
    layers = dict(REST)
    for stem, official, block in (
        ("double_blocks", "transformer_blocks", DOUBLE),
        ("single_blocks", "single_transformer_blocks", SINGLE),
    ):
        for index in {name.split(".")[1] for name in shapes if name.startswith(f"{official}.")}:
            for layer, parts in block.items():
                layers[f"{stem}.{index}.{layer}"] = [f"{official}.{index}.{part}" for part in parts]
    return layers


def native_changes(changes: Changes, shapes: Shapes) -> Changes:
    """Changes of official weights as those of ComfyUI's layers, by the layers' names."""
    native = {}
    for name, parts in native_layers(shapes).items():
        rows = torch.cat([changes[f"{part}.weight"] for part in parts])
        native[name] = torch.cat(rows.chunk(2)[::-1]) if name == SWAPPED else rows
    return native


@dataclass
class Foreign:
    """A file in the making. ``changes`` are of official weights and biases, at strength 1, in float64."""

    shapes: Shapes
    folder: Path
    without: str = "nothing"  # official layers to leave out, by the beginning of their names
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    changes: Changes = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    name: str = "foreign.safetensors"

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(7)

    def officials(self) -> Iterator[tuple[str, int, int]]:
        for name, (rows, columns) in self.shapes.items():
            if not name.startswith(self.without):
                yield name, rows, columns

    def natives(self) -> Iterator[tuple[str, int, int]]:
        for name, parts in native_layers(self.shapes).items():
            yield name, sum(self.shapes[part][0] for part in parts), self.shapes[parts[0]][1]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * 0.15

    def add(self, layer: str, change: torch.Tensor, part: str = "weight") -> None:
        """Note the change of a layer by either name."""
        parts = native_layers(self.shapes).get(layer)
        if parts is None:
            self.changes[f"{layer}.{part}"] = change
            return
        if layer == SWAPPED:
            shift, scale = change.chunk(2)
            change = torch.cat([scale, shift])
        for name, rows in zip(parts, change.split([self.shapes[name][0] for name in parts]), strict=True):
            self.changes[f"{name}.{part}"] = rows

    def pair(self, layer: str, rows: int, columns: int, alpha: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A random low-rank pair on a layer, of one of two ranks; without alpha it is not scaled."""
        rank = 3 if "attn" in layer else 5
        down, up = self.random(rank, columns), self.random(rows, rank)
        scale = 1.0 if alpha is None else alpha / rank
        self.add(layer, scale * (up.double() @ down.double()))
        return down, up

    def save(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.name
        save_file({key: value.contiguous() for key, value in self.tensors.items()}, path, self.metadata or None)
        return path


Write = Callable[[Foreign], None]


def pairs(down: str, up: str, flat: bool = False, native: bool = False, alpha: str | None = "{}.alpha") -> Write:
    """A dialect of plain LoRA: the names of its two matrices and of alpha, with {} for the layer."""

    def write(file: Foreign) -> None:
        for number, (layer, rows, columns) in enumerate(file.natives() if native else file.officials()):
            value = None if alpha is None else 1.5 + number % 3
            name = layer.replace(".", "_") if flat else layer
            file.tensors[down.format(name)], file.tensors[up.format(name)] = file.pair(layer, rows, columns, value)
            if alpha is not None:
                file.tensors[alpha.format(name)] = torch.tensor(value)

    return write


def header_only(file: Foreign) -> None:
    """SimpleTuner's own: alpha stands in the header alone."""
    ranks, alphas = {}, {}
    for number, (layer, rows, columns) in enumerate(file.officials()):
        alphas[f"^{layer}"] = 1.5 + number % 3
        down, up = file.pair(layer, rows, columns, alphas[f"^{layer}"])
        file.tensors[f"transformer.{layer}.lora_A.weight"], ranks[f"^{layer}"] = down, down.shape[0]
        file.tensors[f"transformer.{layer}.lora_B.weight"] = up
    config = {"r": 5, "lora_alpha": 99, "rank_pattern": ranks, "alpha_pattern": alphas}
    file.metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in config.items()})


def peft_folder(file: Foreign) -> None:
    """The official script's: PEFT's folder, alpha 8 because the script never sets it, another one for a pattern."""
    file.name = "adapter_model.safetensors"
    for layer, rows, columns in file.officials():
        alpha = 2.5 if layer.endswith("to_k") else 8.0
        down, up = file.pair(layer, rows, columns, alpha)
        file.tensors[f"base_model.model.{layer}.lora_A.weight"] = down
        file.tensors[f"base_model.model.{layer}.lora_B.weight"] = up
    config = {"peft_type": "LORA", "r": 5, "rank_pattern": {".*attn.*": 3}, "alpha_pattern": {"attn.to_k": 2.5}}
    file.folder.mkdir(parents=True, exist_ok=True)
    (file.folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def loha(prefix: str, native: bool) -> Write:
    def write(file: Foreign) -> None:
        for layer, rows, columns in file.natives() if native else file.officials():
            name = prefix + layer.replace(".", "_")
            factors = {f"hada_w{n}_a": file.random(rows, 4) * 4 for n in (1, 2)}
            factors |= {f"hada_w{n}_b": file.random(4, columns) * 4 for n in (1, 2)}
            first, second = (factors[f"hada_w{n}_a"].double() @ factors[f"hada_w{n}_b"].double() for n in (1, 2))
            file.add(layer, 1.5 / 4 * first * second)
            file.tensors.update({f"{name}.{key}": value for key, value in factors.items()})
            file.tensors[f"{name}.alpha"] = torch.tensor(1.5)

    return write


def lokr(prefix: str, native: bool, decomposed: bool) -> Write:
    def write(file: Foreign) -> None:
        for layer, rows, columns in file.natives() if native else file.officials():
            name = prefix + layer.replace(".", "_")
            first = file.random(4, 4) * 4
            file.tensors[f"{name}.lokr_w1"] = first
            if decomposed:
                halves = file.random(rows // 4, 2), file.random(2, columns // 4)
                file.tensors[f"{name}.lokr_w2_a"], file.tensors[f"{name}.lokr_w2_b"] = halves
                second, scale = halves[0].double() @ halves[1].double(), 3.0 / 2
            else:
                file.tensors[f"{name}.lokr_w2"] = file.random(rows // 4, columns // 4)
                second, scale = file.tensors[f"{name}.lokr_w2"].double(), 1.0  # LyCORIS ignores alpha then
            file.tensors[f"{name}.alpha"] = torch.tensor(3.0)
            file.add(layer, scale * torch.kron(first.double(), second))

    return write


def differences(file: Foreign) -> None:
    """What ComfyUI's own training node writes: LoRA on weights, and plain differences on biases."""
    names = _prefixed("diffusion_model.", KOHYA)
    pairs(*names, native=True, alpha="diffusion_model.{}.alpha")(file)
    for layer, rows, _ in file.natives():
        file.tensors[f"diffusion_model.{layer}.diff_b"] = file.random(rows)
        file.add(layer, file.tensors[f"diffusion_model.{layer}.diff_b"].double(), "bias")


def whole_differences(file: Foreign) -> None:
    for layer, rows, columns in file.natives():
        file.tensors[f"diffusion_model.{layer}.diff"] = file.random(rows, columns)
        file.add(layer, file.tensors[f"diffusion_model.{layer}.diff"].double())


AB = ("{}.lora_A.weight", "{}.lora_B.weight")
KOHYA = ("{}.lora_down.weight", "{}.lora_up.weight")


def _prefixed(prefix: str, names: tuple[str, str]) -> tuple[str, str]:
    return prefix + names[0], prefix + names[1]


DIALECTS: dict[str, Write] = {
    "transformer, alpha tensors": pairs(*_prefixed("transformer.", AB), alpha="transformer.{}.alpha"),
    "transformer, header": header_only,
    "transformer, lora.down": pairs(
        "transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", alpha="transformer.{}.alpha"
    ),
    "transformer, default": pairs(
        "transformer.{}.lora_A.default.weight", "transformer.{}.lora_B.default.weight", alpha="transformer.{}.alpha"
    ),
    "bare": pairs(*AB),
    "bare, lora.down, no alpha": pairs("{}.lora.down.weight", "{}.lora.up.weight", alpha=None),
    "PEFT folder": peft_folder,
    "SimpleTuner comfyui": pairs(*_prefixed("diffusion_model.", AB), alpha="diffusion_model.{}.alpha"),
    "native": pairs(*_prefixed("diffusion_model.", AB), native=True, alpha="diffusion_model.{}.alpha"),
    "native, differences": differences,
    "native, whole differences": whole_differences,
    "kohya, native": pairs(*_prefixed("lora_unet_", KOHYA), flat=True, native=True, alpha="lora_unet_{}.alpha"),
    "kohya, official": pairs(*_prefixed("lora_unet_", KOHYA), flat=True, alpha="lora_unet_{}.alpha"),
    "OneTrainer": pairs(*_prefixed("lora_transformer_", KOHYA), flat=True, alpha="lora_transformer_{}.alpha"),
    "LyCORIS": pairs(*_prefixed("lycoris_", KOHYA), flat=True, alpha="lycoris_{}.alpha"),
    "LyCORIS LoHa": loha("lycoris_", native=False),
    "LyCORIS LoKr": lokr("lycoris_", native=False, decomposed=True),
    "LyCORIS LoKr, whole": lokr("lycoris_", native=False, decomposed=False),
    "kohya LoHa, native": loha("lora_unet_", native=True),
    "kohya LoKr, native": lokr("lora_unet_", native=True, decomposed=True),
}


def foreign(dialect: str, transformer: nn.Module, folder: Path, without: str = "nothing") -> tuple[Path, Changes]:
    """Write a file of a dialect with adapters on all linear layers; what it changes."""
    file = Foreign(linear_shapes(transformer), folder, without)
    DIALECTS[dialect](file)
    return file.save(), file.changes
