"""Every preset takes, draws what fp32 draws within its error, and fails in words where it did not take."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_pack.longcat_backend import checkpoints, precision
from longcat_pack.longcat_backend.checkpoints import Checkpoint
from longcat_pack.longcat_backend.comfy_bridge import auto, kitchen, loading
from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
from longcat_pack.longcat_backend.comfy_bridge.report import report
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.memory import GroupOffload
from longcat_pack.longcat_backend.precision import ENCODER_PRESETS, ENGINE_PRESETS, PRESETS
from longcat_pack.longcat_backend.quantisation import stored_bytes

# Relative L2 of one forward against fp32, with room above benchmarks/results/precision_error.json.
MOST = {"bf16": 0.03, "fp16": 0.01, "fp8": 0.06, "int8": 0.03, "int8-quanto": 0.03, "int4-quanto": 0.2}
ON_A_CPU = [(engine, name) for engine, names in ENGINE_PRESETS.items() for name in names if name in MOST]


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return checkpoints.open_checkpoint(folder)


@pytest.fixture(scope="module")
def velocity(loaded: Any) -> Callable[[Any], torch.Tensor]:
    """The velocity of a MODEL for one noise and prompt."""
    _, clip, _ = loaded("core")
    text = clip_bridge.encode(clip, "红圆")[0][0][0]
    samples = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def run(model: Any) -> torch.Tensor:
        network = model.model.diffusion_model
        dtype = model.model.get_dtype_inference()
        return network(samples.to(dtype), torch.tensor([0.7], dtype=dtype), text.to(dtype)).float()

    return run


@pytest.mark.parametrize(("engine", "name"), ON_A_CPU)
def test_a_forward_is_within_the_presets_error(engine: str, name: str, checkpoint: Checkpoint, velocity: Any) -> None:
    expected = velocity(loading.load_model(checkpoint, engine, "fp32"))
    found = velocity(loading.load_model(checkpoint, engine, name))
    error = float((found - expected).norm() / expected.norm())
    assert error <= MOST[name]
    assert error > 0 or not PRESETS[name].backend


@pytest.mark.parametrize("name", ENCODER_PRESETS)
def test_embeddings_are_within_the_presets_error(name: str, checkpoint: Checkpoint, loaded: Any) -> None:
    _, reference, _ = loaded("core")
    expected = clip_bridge.encode(reference, "红圆")[0][0][0]
    found = clip_bridge.encode(loading.load_encoder(checkpoint, name), "红圆")[0][0][0]
    assert (found - expected).norm() / expected.norm() <= 0.03


@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_a_preset_that_did_not_take_is_an_error(
    component: str, name: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's loader leaves a layer without its marker in plain weights, and says nothing."""
    pack = kitchen.pack

    def unmarked(key: str, weight: torch.Tensor, *args: Any) -> dict[str, torch.Tensor]:
        return {key: weight} if "0" in key else pack(key, weight, *args)

    monkeypatch.setattr(kitchen, "pack", unmarked)
    with pytest.raises(LongCatError, match="did not take"):
        if component == "transformer":
            loading.load_model(checkpoint, "core", name)
        else:
            loading.load_encoder(checkpoint, name)


@pytest.mark.parametrize(
    ("chosen", "name", "offload", "engine"),
    [
        ("auto", "auto", None, "core"),
        ("auto", "int8", None, "core"),
        ("auto", "int8-quanto", None, "diffusers"),
        ("auto", "auto", GroupOffload("leaf"), "diffusers"),
        ("diffusers", "bf16", None, "diffusers"),
    ],
)
def test_auto_takes_core_unless_a_setting_belongs_to_diffusers(
    chosen: str, name: str, offload: GroupOffload | None, engine: str
) -> None:
    assert auto.engine(chosen, name, offload) == engine


def test_group_offload_cannot_move_quantos_weights() -> None:
    """Their parts would stay on the CPU, and the first forward fail with two devices."""
    with pytest.raises(LongCatError, match="cannot move weights of the precision .int8-quanto."):
        auto.engine("auto", "int8-quanto", GroupOffload("leaf"))


def test_group_offload_is_not_cores() -> None:
    with pytest.raises(LongCatError, match="Group offload belongs to the diffusers engine"):
        auto.engine("core", "auto", GroupOffload("leaf"))


def test_auto_says_what_it_took_and_why_in_one_line(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        loading.load_model(checkpoint, "auto", "auto")
    lines = [record.getMessage() for record in caplog.records if "LongCat-Image auto" in record.getMessage()]
    assert len(lines) == 1
    assert "transformer in fp32 (exact)" in lines[0] or "transformer in bf16 (exact)" in lines[0]


def test_the_precision_of_another_engine_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(LongCatError, match="not available here"):
        loading.load_model(checkpoint, "core", "int4-quanto")


def test_the_report_names_each_part_its_format_size_and_the_peak(checkpoint: Checkpoint, folder: Path) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import vae

    parts = (
        loading.load_model(checkpoint, "core", "int8"),
        loading.load_encoder(checkpoint, "fp8"),
        vae.load(checkpoint),
    )
    lines = report(*parts).splitlines()
    assert [line.split(":")[0].split(" /")[0] for line in lines[:3]] == ["transformer", "text encoder", "VAE"]
    assert "int8" in lines[0] and "behind a table" in lines[0] and "float8_e4m3fn" in lines[1]
    assert [line.split(":")[0] for line in lines[3:]] == ["512x512", "1024x1024", "2048x2048"]


def test_every_preset_is_some_engines() -> None:
    assert set(PRESETS) == {name for names in ENGINE_PRESETS.values() for name in names}
    assert set(ENCODER_PRESETS) <= set(PRESETS)
    assert not precision.is_quantised("transformer", "transformer_blocks.0.norm1.linear")


def test_auto_on_a_device_without_bf16_keeps_16_bit_weights_and_the_same_bits(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Mac's encoder runs on its CPU: 14 GB of weights in place of 28."""
    from longcat_pack.longcat_backend.devices import DevicePolicy

    weights = {key: value.bfloat16() for key, value in checkpoint.weights("text_encoder").items()}
    monkeypatch.setattr(type(checkpoint), "weights", lambda self, part: weights)
    monkeypatch.setattr(DevicePolicy, "compute_dtype", lambda self, component: torch.float32)
    chosen, widened = loading.load_encoder(checkpoint, "auto"), loading.load_encoder(checkpoint, "fp32")
    sizes = [sum(weight.nbytes for weight in clip.patcher.model.parameters()) for clip in (chosen, widened)]
    assert 2 * sizes[0] == sizes[1]
    ours, expected = (clip_bridge.encode(clip, "红圆, a red circle")[0][0][0] for clip in (chosen, widened))
    assert torch.equal(ours, expected)


def test_auto_weighs_each_part_as_its_own_device_holds_it(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Mac the transformer computes in bf16 and the encoder, on the CPU, in fp32."""
    import comfy.model_management

    from longcat_pack.longcat_backend import memory
    from longcat_pack.longcat_backend.devices import DevicePolicy

    dtypes = {"transformer": torch.bfloat16, "text_encoder": torch.float32}
    monkeypatch.setattr(DevicePolicy, "compute_dtype", lambda self, component: dtypes[component])
    weigh, seen = memory.weigh, {}

    def noted(shapes: Any, component: str, preset: Any, dtype: torch.dtype, tabulate: bool) -> Any:
        seen[component] = dtype
        return weigh(shapes, component, preset, dtype, tabulate)

    monkeypatch.setattr(memory, "weigh", noted)
    loading.load_encoder(checkpoint, "auto")
    stored = next(iter(checkpoint.weights("text_encoder").values())).dtype
    assert seen == {"transformer": torch.bfloat16, "text_encoder": stored}
    assert comfy.model_management.text_encoder_device().type == "cpu"


def test_auto_weighs_the_encoder_that_is_loaded(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without output head and vision tower, and in 8 bits where it would be."""
    from longcat_pack.longcat_backend import memory
    from longcat_pack.longcat_backend.devices import DevicePolicy

    monkeypatch.setattr(DevicePolicy, "compute_dtype", lambda self, component: torch.bfloat16)
    weigh, counted = memory.weigh, {}

    def noted(shapes: Any, component: str, preset: Any, dtype: torch.dtype, tabulate: bool) -> Any:
        weights = weigh(shapes, component, preset, dtype, tabulate)
        if component == "text_encoder":
            counted[preset.name] = weights.total
        return weights

    monkeypatch.setattr(memory, "weigh", noted)
    loading.load_encoder(checkpoint, "auto")
    assert set(counted) == {"bf16", "int8"}
    table = 2 * checkpoint.shapes("text_encoder")["model.embed_tokens.weight"].numel()  # looked up on the host
    for name, count in counted.items():
        held = table + stored_bytes(loading.load_encoder(checkpoint, name).patcher.model)
        assert count == pytest.approx(held, rel=0.05)  # scales are not counted
