"""Which layers may be quantised: the error of one forward by preset and group of layers, on LongCat-Tiny.

    python run.py bench precision_error

For each preset: the error when one group of layers alone is quantised, when the layers of the pack's table are, when
these are but for one group, and when every linear layer is. Values are rounded to the preset's format, weights and,
where the preset does so, activations, and multiplied in fp32, so that only the formats are compared and every format
can be compared on a CPU. Writes benchmarks/results/precision_error.json.
"""

import argparse
import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _tiny
import torch
from torch import nn
from torch.nn import functional

RESULT = _tiny.ROOT / "benchmarks" / "results" / "precision_error.json"
STEPS = 4
BLOCK = r"transformer_blocks\.\d+\."
SINGLE = r"single_transformer_blocks\.\d+\."
GROUPS = {
    "transformer": {
        "attention q, k, v": BLOCK + r"attn\.to_[qkv]",
        "attention out": BLOCK + r"attn\.to_out\.0",
        "text attention q, k, v": BLOCK + r"attn\.add_[qkv]_proj",
        "text attention out": BLOCK + r"attn\.to_add_out",
        "feed-forward": BLOCK + r"ff\.net\..*",
        "text feed-forward": BLOCK + r"ff_context\.net\..*",
        "single attention q, k, v": SINGLE + r"attn\.to_[qkv]",
        "single proj_mlp": SINGLE + "proj_mlp",
        "single proj_out": SINGLE + "proj_out",
        "modulation": rf"({BLOCK}|{SINGLE})norm.*\.linear|norm_out\.linear",
        "x_embedder": "x_embedder",
        "context_embedder": "context_embedder",
        "time_embed": r"time_embed\..*",
        "last proj_out": "proj_out",
    },
    "text_encoder": {
        "attention q, k, v": r"layers\.\d+\.self_attn\.[qkv]_proj",
        "attention out": r"layers\.\d+\.self_attn\.o_proj",
        "feed-forward gate, up": r"layers\.\d+\.mlp\.(gate|up)_proj",
        "feed-forward down": r"layers\.\d+\.mlp\.down_proj",
    },
}

Round = Callable[[torch.Tensor], torch.Tensor]
Forward = Callable[[nn.Module], torch.Tensor]


class RoundedLinear(nn.Module):
    """A linear layer that multiplies values rounded to a format."""

    def __init__(self, layer: nn.Linear, weight: torch.Tensor, activations: Round | None) -> None:
        super().__init__()
        self.weight, self.bias, self.activations = nn.Parameter(weight.float(), False), layer.bias, activations

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """As a linear layer."""
        if self.activations is not None:
            values = self.activations(values.reshape(-1, values.shape[-1])).reshape(values.shape)
        return functional.linear(values, self.weight, self.bias)


def rounded(layer: nn.Linear, preset: Any, component: str) -> nn.Module:
    """The layer as the preset computes it on a device that has its kernels."""
    if preset.backend == "quanto":
        from longcat_pack.longcat_backend import quanto_layers

        return RoundedLinear(layer, quanto_layers.quantised(layer, preset).weight.dequantize(), None)
    if preset.backend == "torchao":
        from torchao.quantization import Float8Tensor

        def by_row(values: torch.Tensor) -> torch.Tensor:
            return Float8Tensor.from_hp(values).dequantize()

        return RoundedLinear(layer, by_row(layer.weight), by_row)
    return _kitchen(layer, preset, component)


def _kitchen(layer: nn.Linear, preset: Any, component: str) -> nn.Module:
    """ComfyUI's own layer, whose reference kernels run anywhere; a product in fp8 is rounded like the others."""
    from comfy.quant_ops import QuantizedTensor

    from longcat_pack.longcat_backend.comfy_bridge import castable, kitchen

    weight_only = component == "text_encoder"
    packed = castable.castable(kitchen.operations(torch.float32, preset, weight_only), layer, torch.float32)
    bias = {} if layer.bias is None else {"bias": layer.bias}
    tensors = kitchen.pack("weight", layer.weight.detach(), preset, torch.float32)
    packed.load_state_dict({**tensors, **bias}, assign=True)
    if weight_only or preset.format != "float8_e4m3fn":
        return packed

    def as_the_layer(values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = QuantizedTensor.from_float(values, packed.layout_type).dequantize()
        return result

    return RoundedLinear(layer, packed.weight.dequantize(), as_the_layer)


class Measurement:
    """A component in fp32, its layers by group, and its output with some of them rounded."""

    def __init__(self, component: str, model: nn.Module, forward: Forward) -> None:
        self.component, self.model, self.forward = component, model, forward
        self.linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        self.groups = grouped(component, self.linears)
        self.expected = forward(model)

    def error(self, preset: Any, names: Sequence[str]) -> float:
        """Relative error of the output when these layers are rounded."""
        model = copy.deepcopy(self.model)
        for name in names:
            model.set_submodule(name, rounded(model.get_submodule(name), preset, self.component))
        return float(f"{_tiny.relative_error(self.forward(model), self.expected):.3g}")

    def errors(self, preset: Any) -> dict[str, Any]:
        """All errors of a preset."""
        from longcat_pack.longcat_backend import precision

        table = [name for name in self.linears if precision.is_quantised(self.component, name)]
        chosen = [group for group, names in self.groups.items() if set(names) <= set(table)]
        return {
            "table": self.error(preset, table),
            "every_linear": self.error(preset, list(self.linears)),
            "group_alone": {group: self.error(preset, names) for group, names in self.groups.items()},
            "table_without_group": {
                group: self.error(preset, [name for name in table if name not in self.groups[group]])
                for group in chosen
            },
        }


def grouped(component: str, names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names by group; each belongs to exactly one."""
    groups = {group: [n for n in names if re.fullmatch(p, n)] for group, p in GROUPS[component].items()}
    assert sorted(sum(groups.values(), [])) == sorted(names), "a layer is in no group, or in two"
    return groups


def full_size_shares() -> dict[str, float]:
    """Per cent of the published transformer's weights by group."""
    from diffusers import LongCatImageTransformer2DModel

    with torch.device("meta"):
        model = LongCatImageTransformer2DModel(num_layers=10, num_single_layers=20)
    sizes = {name: layer.weight.numel() for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    groups = grouped("transformer", sizes)
    return {
        group: float(f"{100 * sum(sizes[name] for name in names) / sum(sizes.values()):.3g}")
        for group, names in groups.items()
    }


def measurements(prompts: Sequence[str]) -> dict[str, Measurement]:
    """The two components with what is measured of them."""
    from longcat_pack.longcat_backend import checkpoints, text_encoder, transformer
    from longcat_pack.longcat_backend import prompts as tokens

    checkpoint = checkpoints.open_checkpoint(_tiny.FOLDER)
    velocity = transformer.load_transformer(checkpoint, torch.float32)
    tokenizer = text_encoder.load_tokenizer(checkpoint)
    encoder = text_encoder.load_text_encoder(checkpoint, tokenizer, torch.float32)
    states = _tiny.states(prompts, STEPS)

    def draw(model: nn.Module) -> torch.Tensor:
        velocity.transformer = model
        return torch.stack(
            [velocity(state.samples, torch.full((len(prompts),), state.sigma), state.text) for state in states]
        )

    def encode(model: nn.Module) -> torch.Tensor:
        encoder.model = model
        return torch.cat([encoder.encode(tokens.tokenize(tokenizer, prompt).ids) for prompt in prompts])

    return {
        "transformer": Measurement("transformer", velocity.transformer, draw),
        "text_encoder": Measurement("text_encoder", encoder.model, encode),
    }


@torch.no_grad()
def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each language")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    _tiny.load_pack("cpu")
    from longcat_pack.longcat_backend import precision
    from scoring.scenes import held_out_prompts

    prompts = [prompt for prompt, _ in held_out_prompts(arguments.prompts, arguments.prompts)]
    presets = {
        "transformer": dict.fromkeys(name for names in precision.ENGINE_PRESETS.values() for name in names),
        "text_encoder": dict.fromkeys(precision.ENCODER_PRESETS),
    }
    errors: dict[str, Any] = {}
    for component, measurement in measurements(prompts).items():
        chosen = [precision.PRESETS[name] for name in presets[component] if precision.PRESETS[name].backend]
        errors[component] = {preset.name: measurement.errors(preset) for preset in chosen}
    result = {
        **_tiny.circumstances("cpu"),
        "settings": {"prompts": len(prompts), "noise_levels": STEPS, "reference": "fp32", "products": "fp32"},
        "relative_error": errors,
        "full_size_weights_percent": full_size_shares(),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
