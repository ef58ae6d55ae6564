"""The modulation table changes no bit of any step, and follows every change of the weights behind it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_pack.longcat_backend import checkpoints, latents
from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
from longcat_pack.longcat_backend.comfy_bridge import loading, patchers, sampling
from longcat_pack.longcat_backend.comfy_bridge.castable import TabulatedLinear

SCHEDULES = {"short": (2, 1.0), "long": (7, 1.0), "image to image": (3, 0.6)}
PROMPTS = ("红圆", "a small blue star on a yellow background")
KEYS = {
    "core": "diffusion_model.single_blocks.0.modulation.lin.weight",
    "diffusers": "diffusion_model.velocity.transformer.single_transformer_blocks.0.norm.linear.weight",
}

Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(folder: Path) -> Load:
    """A fresh MODEL that computes in its own dtype; ComfyUI would compute in fp32 on a CPU."""

    def fresh(engine: str, precision: str, tabulate: bool) -> Any:
        model = loading.load_model(checkpoints.open_checkpoint(folder), engine, precision, tabulate)
        model.model.manual_cast_dtype = None
        return model

    return fresh


@pytest.fixture(scope="module")
def conditioning(loaded: Any) -> Callable[[str], Any]:
    _, clip, _ = loaded("core")
    return lambda prompt: clip_bridge.encode(clip, prompt)[0]


@torch.inference_mode()
def velocities(model: Any, positive: Any, negative: Any, schedule: tuple[int, float], seed: int = 0) -> list[Any]:
    """What the network gave in every call of a run."""
    seen: list[torch.Tensor] = []

    def record(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
        output: torch.Tensor = apply_model(args["input"], args["timestep"], **args["c"])
        seen.append(output.clone())
        return output

    watched = model.clone()
    watched.set_model_unet_function_wrapper(record)
    canvas = {"samples": latents.empty_latent(128, 128, 1)}
    sigmas = sampling.schedule(watched, canvas, *schedule)
    sampling.sample(watched, positive, negative, canvas, sigmas, 4.0, seed)
    return seen


def assert_equal(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(ours) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_every_step_is_equal_to_the_bit(engine: str, precision: str, load: Load, conditioning: Any) -> None:
    plain, tabulated = load(engine, precision, tabulate=False), load(engine, precision, tabulate=True)
    negative = conditioning("")
    for schedule in SCHEDULES.values():
        for prompt in PROMPTS:
            positive = conditioning(prompt)
            expected = velocities(plain, positive, negative, schedule)
            assert_equal(velocities(tabulated, positive, negative, schedule), expected)


@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_the_weights_are_read_once_per_schedule(
    engine: str, load: Load, conditioning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    project = TabulatedLinear._project

    def counted(self: TabulatedLinear, inputs: Any) -> Any:
        reads.append(self.name)
        return project(self, inputs)

    monkeypatch.setattr(TabulatedLinear, "_project", counted)
    model = load(engine, "fp32", tabulate=True)
    layers = [layer.name for layer in model.model.modules() if isinstance(layer, TabulatedLinear)]
    positive, negative = conditioning(PROMPTS[0]), conditioning("")
    velocities(model, positive, negative, (5, 1.0))
    assert sorted(reads) == sorted(layers)
    velocities(model, positive, negative, (5, 1.0), seed=1)
    assert sorted(reads) == sorted(layers)
    velocities(model, positive, negative, (6, 1.0))
    assert len(reads) == 2 * len(layers)


@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_a_patch_on_modulation_is_computed_anew(engine: str, load: Load, conditioning: Any) -> None:
    """Such as a LoRA: put on, changed in strength, and taken off again."""
    positive, negative = conditioning(PROMPTS[0]), conditioning("")
    plain, tabulated = load(engine, "fp32", tabulate=False), load(engine, "fp32", tabulate=True)
    key = KEYS[engine]
    weight = dict(tabulated.model.named_parameters())[key]
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    base = velocities(plain, positive, negative, (3, 1.0))
    assert_equal(velocities(tabulated, positive, negative, (3, 1.0)), base)
    for strength in (1.0, 0.5):
        outputs = []
        for model in (plain, tabulated):
            patched = model.clone()
            assert patched.add_patches({key: ("diff", (change,))}, strength) == [key]
            outputs.append(velocities(patched, positive, negative, (3, 1.0)))
        differences = [(a - b).abs().max() for a, b in zip(*outputs, strict=True)]
        assert max(differences) <= 1e-5  # a patch on a weight that is cast on use may round differently
        assert not torch.equal(outputs[1][0], base[0])
    assert_equal(velocities(tabulated, positive, negative, (3, 1.0)), base)


def test_different_noise_levels_in_one_batch_bypass_the_table(load: Load, conditioning: Any) -> None:
    text = conditioning(PROMPTS[0])[0][0]
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2, 16, 16, 16, generator=generator)
    outputs = []
    for tabulate in (False, True):
        network = load("diffusers", "fp32", tabulate).model.diffusion_model.velocity
        with torch.inference_mode():
            outputs.append(network(samples, torch.tensor([0.9, 0.3]), text.expand(2, -1, -1)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_the_weights_behind_the_table_stay_aside(engine: str, load: Load) -> None:
    """They neither count as memory to load nor move with the model."""
    plain, tabulated = load(engine, "bf16", tabulate=False), load(engine, "bf16", tabulate=True)
    layers = {name: layer for name, layer in tabulated.model.named_modules() if isinstance(layer, TabulatedLinear)}
    aside = sum(parameter.nbytes for layer in layers.values() for parameter in layer.parameters())
    assert plain.model_size() - tabulated.model_size() == aside > 0.2 * plain.model_size()
    assert not layers.keys() & {entry[-3] for entry in tabulated._load_list()}
    tabulated.model.to("meta")
    assert all(layer.weight.device.type == "cpu" for layer in layers.values())
    assert patchers.get_table(tabulated.model) is not None and patchers.get_table(plain.model) is None


@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_unloading_frees_the_rows(engine: str, load: Load, conditioning: Any) -> None:
    """They are on the device too, and "free memory" means all of it."""
    model = load(engine, "fp32", tabulate=True)
    velocities(model, conditioning(PROMPTS[0]), conditioning(""), (2, 1.0))
    table = patchers.get_table(model.model)
    assert table is not None and table._rows
    model.detach()
    assert not table._rows
