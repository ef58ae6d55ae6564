"""What ComfyUI says of a device becomes its policy: NVIDIA, AMD, Intel and CPU. Macs have tests of their own."""

from types import SimpleNamespace
from typing import Any

import comfy.model_management as host
import comfy_kitchen
import pytest
import torch

from longcat_pack.longcat_backend.comfy_bridge import devices

KITCHEN = {"float8_e4m3fn", "int8_tensorwise"}
BY_ROW = "float8_dynamic_rowwise"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes ComfyUI see a GPU: its device type, architecture, and what ComfyUI itself concludes from them."""

    def see(kind: str, capability: tuple[int, int] = (0, 0), architecture: str = "", **answers: Any) -> torch.device:
        device = torch.device(kind, 0)
        monkeypatch.setattr(host, "cpu_state", host.CPUState.GPU)
        monkeypatch.setattr(host, "get_torch_device", lambda: device)
        monkeypatch.setattr(torch.version, "hip", "7.0" if architecture else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda _: SimpleNamespace(gcnArchName=architecture, major=capability[0]),
        )
        for name, answer in answers.items():
            monkeypatch.setattr(host, name, lambda *args, _answer=answer, **kwargs: _answer)
        return device

    return see


def kernels(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(comfy_kitchen.registry, "get_capable_backend", lambda *args, **kwargs: backend)


def test_a_hopper_card(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, "cuda")
    device = gpu("cuda", (9, 0), should_use_bf16=True, should_use_fp16=True, supports_fp8_compute=True)
    policy = devices.policy()
    assert (policy.device, policy.kind, policy.products) == (device, "cuda", {*KITCHEN, BY_ROW})
    assert policy.compute_dtype("transformer") == torch.bfloat16
    assert policy.holds(torch.float64)


def test_a_turing_card(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, "cuda")
    gpu("cuda", (7, 5), should_use_bf16=False, should_use_fp16=True, supports_fp8_compute=False)
    policy = devices.policy()
    assert policy.products == {"int8_tensorwise"}
    assert (policy.bf16, policy.holds(torch.bfloat16), policy.holds(torch.float8_e4m3fn)) == (False, True, True)
    assert policy.compute_dtype("transformer") == torch.float16


@pytest.mark.parametrize(
    ("architecture", "comfy_says_fp8", "backend", "products"),
    [
        ("gfx942:sramecc+", False, "eager", {BY_ROW}),
        ("gfx1201", True, "triton", KITCHEN),
        ("gfx1030", False, "eager", set()),
    ],
)
def test_amd_cards(
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    comfy_says_fp8: bool,
    backend: str,
    products: set[str],
) -> None:
    """torch calls them cuda, and gives them a capability that says nothing of NVIDIA's kernels."""
    kernels(monkeypatch, backend)
    bf16 = architecture != "gfx1030"
    gpu("cuda", (9, 4), architecture, should_use_bf16=bf16, should_use_fp16=True, supports_fp8_compute=comfy_says_fp8)
    policy = devices.policy()
    assert (policy.kind, policy.products) == ("rocm", products)
    assert policy.compute_dtype("transformer") == (torch.bfloat16 if bf16 else torch.float16)


def test_an_intel_card(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, "eager")
    gpu("xpu", should_use_bf16=True, should_use_fp16=True, is_intel_xpu=True)
    policy = devices.policy()
    assert (policy.kind, policy.products) == ("xpu", set())
    assert not policy.holds(torch.float64)  # ComfyUI: cards for desktops have none


def test_directml_has_neither_bf16_nor_float8(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, "eager")
    gpu("privateuseone", should_use_bf16=False, should_use_fp16=True, is_directml_enabled=True)
    policy = devices.policy()
    assert policy.kind == "other"
    assert not any(policy.holds(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float64))


def test_the_cpu(comfy_dir: Any) -> None:
    policy = devices.policy(torch.device("cpu"))
    assert (policy.kind, policy.products) == ("cpu", set())
    assert policy.compute_dtype("transformer") == policy.compute_dtype("text_encoder") == torch.float32
    assert all(policy.holds(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float64))
