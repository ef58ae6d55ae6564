"""On an emulated Mac everything runs, nothing float64 or float8 reaches the device, and the picture is the CPU's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fake_mps
import node_helpers
import pytest
import torch
from diffusers.models.transformers import transformer_longcat_image as reference
from peft import LoraConfig

from longcat_pack.longcat_backend import checkpoints, latents, rotary
from longcat_pack.longcat_backend import transformer as backend
from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
from longcat_pack.longcat_backend.comfy_bridge import devices, guidance, loading, sampling
from longcat_pack.longcat_backend.comfy_bridge import vae as vae_bridge
from longcat_pack.longcat_backend.comfy_bridge.castable import TabulatedLinear
from longcat_pack.longcat_backend.devices import DevicePolicy
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.memory import GroupOffload

ENGINES = ("core", "diffusers")
NAME = "LongCat-Tiny"
PROMPT = "红圆, a red circle"
STEPS = 2
TOLERANCE = 1e-4
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out"]


class Run(NamedTuple):
    """What a workflow of encode, VAE encode, sample and decode gives."""

    embeddings: torch.Tensor
    reference: torch.Tensor
    latents: torch.Tensor
    pixels: torch.Tensor


def load(engine: str, precision: str, encoder: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE, loaded as in ComfyUI: nodes run in inference mode."""
    with torch.inference_mode():
        return loading.load(NAME, engine, precision, encoder)


@torch.inference_mode()
def draw(parts: tuple[Any, Any, Any]) -> Run:
    """A picture after a prompt, with guidance and a reference picture whose size is another."""
    model, clip, vae = parts
    positive, _ = clip_bridge.encode(clip, PROMPT)
    negative, _ = clip_bridge.encode(clip, "")
    picture = vae.encode(torch.linspace(0, 1, 64 * 48 * 3).reshape(1, 64, 48, 3))
    conditioned = [
        node_helpers.conditioning_set_values(condition, {"reference_latents": [picture]})
        for condition in (positive, negative)
    ]
    canvas = {"samples": latents.empty_latent(96, 64, 1)}
    patched = guidance.patch(model)
    drawn = sampling.sample(patched, *conditioned, canvas, sampling.schedule(patched, canvas, STEPS), 4.5, 0)
    pixels = vae_bridge.decode(vae, drawn["samples"], tiled=False)
    return Run(positive[0][0].cpu(), picture.cpu(), drawn["samples"].cpu(), pixels.cpu())


@contextmanager
def emulated_mac(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...] = (15, 0), **flags: bool) -> Iterator[None]:
    """ComfyUI as it is on a Mac, with command line flags such as ``gpu_only``."""
    import comfy.model_management as host
    from comfy.cli_args import args

    with fake_mps.device(), monkeypatch.context() as patch:
        patch.setattr(host, "cpu_state", host.CPUState.MPS)
        patch.setattr(host, "vram_state", host.VRAMState.SHARED)
        patch.setattr(host, "mac_version", lambda: version)
        for flag, value in flags.items():
            patch.setattr(args, flag, value)
        try:
            yield
        finally:
            host.unload_all_models()


@pytest.fixture
def mac(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Mac whose VAE computes in fp32, so that the picture can be compared."""
    with emulated_mac(monkeypatch, fp32_vae=True):
        yield


@pytest.fixture(scope="module")
def on_cpu(loaded: Any) -> Callable[[str], Run]:
    """The run of an engine on the CPU, once."""
    runs: dict[str, Run] = {}

    def run(engine: str) -> Run:
        if engine not in runs:
            runs[engine] = draw(loaded(engine))
        return runs[engine]

    return run


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("everything_there", [False, True], ids=["usual", "gpu-only"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_picture_is_the_cpus(
    engine: str, everything_there: bool, on_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ComfyUI places things on a Mac, with the encoder on the CPU; and with everything on the device."""
    expected = on_cpu(engine)
    with emulated_mac(monkeypatch, fp32_vae=True, gpu_only=everything_there):
        parts = load(engine, "fp32", "fp32")
        seen: set[str] = set()
        for module in (parts[0].model.diffusion_model, parts[2].first_stage_model.decoder):
            module.register_forward_pre_hook(lambda _, args: seen.add(args[0].device.type))
        drawn = draw(parts)
    assert seen == {"mps"}
    for name in Run._fields:
        assert error(getattr(drawn, name), getattr(expected, name)) <= TOLERANCE, name


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_device_chooses_by_itself_is_bf16_and_draws_the_same(
    engine: str, on_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = on_cpu(engine)
    with emulated_mac(monkeypatch, gpu_only=True):
        parts = load(engine, "auto", "auto")
        drawn = draw(parts)
        assert parts[0].model.get_dtype() == torch.bfloat16
        assert parts[1].cond_stage_model.dtypes == {torch.bfloat16}
    assert error(drawn.embeddings, expected.embeddings) <= 0.02
    assert error(drawn.pixels, expected.pixels) <= 0.1


def test_a_quantised_model_draws_the_same(on_cpu: Any, mac: None) -> None:
    drawn = draw(load("diffusers", "int8-quanto", "bf16"))
    assert error(drawn.pixels, on_cpu("diffusers").pixels) <= 0.1


@pytest.mark.parametrize(
    ("preset", "everything_there"), [("fp8", False), ("int8", False), ("int8", True), ("int8-quanto", True)]
)
@torch.inference_mode()
def test_a_quantised_encoder_where_its_format_can_be_held(
    preset: str, everything_there: bool, on_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usually ComfyUI keeps a Mac's encoder on the CPU, which has 8-bit floats; the device has not."""
    with emulated_mac(monkeypatch, gpu_only=everything_there):
        _, clip, _ = load("core", "bf16", preset)
        positive, _ = clip_bridge.encode(clip, PROMPT)
        embeddings = positive[0][0].cpu()
    assert error(embeddings, on_cpu("core").embeddings) <= 0.06


def training_step(folder: Path, device: str) -> list[torch.Tensor]:
    """LoRA weights of the attention after two steps of AdamW on the velocity, blocks checkpointed."""
    torch.manual_seed(0)
    model = backend.load_transformer(checkpoints.open_checkpoint(folder), torch.float32)
    model.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION))
    model.transformer.enable_gradient_checkpointing()
    model.to(device)
    model.transformer.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # With the usual epsilon AdamW makes whole steps of the rounding in gradients near zero.
    optimiser = torch.optim.AdamW(weights, lr=1e-2, eps=1e-4)
    clean, noise, text = torch.randn(2, 2, 16, 8, 6).unbind(0) + (torch.randn(2, 40, 64),)
    for level in (0.3, 0.8):
        sigma = torch.full((2,), level)
        noisy = (1 - level) * clean + level * noise
        velocity = model(noisy.to(device), sigma.to(device), text.to(device))
        loss = torch.nn.functional.mse_loss(velocity, (noise - clean).to(device))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return [weight.detach().cpu() for weight in weights]


def test_a_training_step_is_the_cpus(folder: Path, mac: None) -> None:
    expected, trained = training_step(folder, "cpu"), training_step(folder, "mps")
    assert len(trained) > 50
    assert all(error(weight, other) <= TOLERANCE for weight, other in zip(trained, expected, strict=True))


def velocity(folder: Path) -> torch.Tensor:
    model = backend.load_transformer(checkpoints.open_checkpoint(folder), torch.float32).to("mps")
    with torch.no_grad():
        return model(*(torch.ones(*shape, device="mps") for shape in ((1, 16, 4, 4), (1,), (1, 8, 64))))


def test_a_forward_reads_nothing_back_from_the_device(folder: Path, mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positions are made where the rotary table is made of them, so the host never waits."""
    operators: list[str] = []
    run = fake_mps._run

    def watch(func: Any, args: Any, kwargs: Any) -> Any:
        leaves = func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        operators.append("read" if leaves or func is torch.ops.aten._local_scalar_dense.default else "other")
        return run(func, args, kwargs)

    monkeypatch.setattr(fake_mps, "_run", watch)
    velocity(folder)
    assert operators.count("other") > 100
    assert "read" not in operators
    ids = latents.position_ids
    monkeypatch.setattr(latents, "position_ids", lambda *args: [part.to("mps") for part in ids(*args)])
    velocity(folder)
    assert "read" in operators


def test_float64_ids_on_the_device_would_be_seen(folder: Path, mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert velocity(folder).is_mps
    ids = latents.position_ids
    monkeypatch.setattr(latents, "position_ids", lambda *args: [part.double().to("mps") for part in ids(*args)])
    with pytest.raises(fake_mps.MpsError, match="float64"):
        velocity(folder)


def test_a_float64_rotary_table_on_the_device_would_be_seen(
    folder: Path, mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = latents.position_ids
    monkeypatch.setattr(latents, "position_ids", lambda *args: [part.to("mps") for part in ids(*args)])
    monkeypatch.setattr(rotary, "HostRotary", torch.nn.Module)  # the reference module stays in its place
    monkeypatch.setattr(rotary, "install", lambda transformer: transformer.pos_embed)
    assert velocity(folder).is_mps  # diffusers itself computes in float32 there, another table
    monkeypatch.setattr(reference, "maybe_adjust_dtype_for_device", lambda dtype, device: dtype)
    with pytest.raises(fake_mps.MpsError, match="float64"):
        velocity(folder)


@pytest.mark.parametrize(
    ("engine", "name", "encoder", "reason"),
    [
        ("core", "fp8", "bf16", "8-bit floats"),
        ("core", "int8", "bf16", "int8 kernels"),
        ("diffusers", "fp8-torchao", "bf16", "8-bit floats"),
        ("diffusers", "int4-quanto", "bf16", "Xcode"),
        ("core", "bf16", "fp8", "8-bit floats"),
    ],
)
def test_a_preset_that_the_device_lacks_is_refused_in_words(
    engine: str, name: str, encoder: str, reason: str, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with emulated_mac(monkeypatch, gpu_only=True), pytest.raises(LongCatError, match=f"{reason}.*bf16"):
        load(engine, name, encoder)


@pytest.mark.parametrize(
    "offload",
    [
        GroupOffload("block", 2, stream=False, host="low"),
        GroupOffload("block", 1, stream=False, host="disk"),
        GroupOffload("leaf", stream=False, host="pinned"),
    ],
    ids=lambda offload: f"{offload.level}-{offload.host}",
)
def test_group_offload_draws_the_same(offload: GroupOffload, on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of a group is left behind, and the table's plan finds the time embedding on the device."""
    expected = on_cpu("diffusers")
    with emulated_mac(monkeypatch, fp32_vae=True), torch.inference_mode():
        parts = loading.load(NAME, "diffusers", "fp32", "fp32", offload=offload)
        drawn = draw(parts)
    assert error(drawn.pixels, expected.pixels) <= TOLERANCE
    tabulated = [layer for layer in parts[0].model.modules() if isinstance(layer, TabulatedLinear)]
    assert tabulated and not any(list(layer.parameters()) for layer in tabulated)  # nothing that a group could move


def test_group_offload_with_a_stream_needs_a_device_that_has_them(mac: None) -> None:
    with pytest.raises(LongCatError, match="with a stream does not work"):
        loading.load(NAME, "diffusers", "fp32", "fp32", offload=GroupOffload("leaf"))


def test_float8_weights_on_the_device_would_be_seen(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DevicePolicy, "holds", lambda *args: True)
    monkeypatch.setattr(DevicePolicy, "require", lambda *args, **kwargs: None)
    with pytest.raises(fake_mps.MpsError, match="float8"):
        load("core", "fp8", "bf16")


def test_the_policy_of_a_mac(mac: None) -> None:
    policy = devices.policy()
    assert (policy.kind, policy.compute_dtype("transformer")) == ("mps", torch.bfloat16)
    assert policy.products == frozenset()
    for dtype in fake_mps.FORBIDDEN & {torch.float64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2}:
        assert not policy.holds(dtype)
    assert devices.policy(torch.device("cpu")).holds(torch.float64)


def test_macos_13_has_no_bf16(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_mac(monkeypatch, version=(13, 6)):
        policy = devices.policy()
        assert policy.compute_dtype("transformer") == torch.float16
        assert policy.compute_dtype("text_encoder") == torch.float32
        with pytest.raises(LongCatError, match="bf16.*fp16, fp32"):
            load("core", "bf16", "fp32")
