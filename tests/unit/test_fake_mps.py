"""The emulated MPS device refuses what a real one refuses, and computes what the CPU computes."""

import copy
from collections.abc import Callable, Iterator

import fake_mps
import pytest
import torch
from fake_mps import MpsError
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "float64 factory": lambda x: torch.ones(3, device="mps", dtype=torch.float64),
    "float64 from a float64 default": lambda x: torch.tensor(2.0, dtype=torch.float64, device="mps"),
    "cast to float64": lambda x: x.double(),
    "cast on the way to the CPU": lambda x: x.to("mps", torch.float64).cpu(),
    "copy of float64": lambda x: torch.ones(2, dtype=torch.float64).to("mps"),
    "copy of complex128": lambda x: torch.ones(2, dtype=torch.complex128).to(x.device),
    "float64 promotion": lambda x: x * torch.ones(1, dtype=torch.float64).to("mps"),
    "module of float64": lambda x: nn.Linear(4, 4).double().to("mps"),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "copy of float8": lambda x: torch.ones(2).to(torch.float8_e5m2).to("mps"),
    "view as float8": lambda x: x.view(torch.float8_e4m3fn),
    "sum with a CPU tensor": lambda x: x + torch.ones(3, 4),
    "CPU sum with one of its tensors": lambda x: torch.ones(3, 4).add_(x),
    "product with a CPU tensor": lambda x: functional.linear(x, torch.ones(2, 4)),
    "concatenation with a CPU tensor": lambda x: torch.cat([x, torch.ones(1, 4)]),
    "indices of it for a CPU tensor": lambda x: torch.ones(3)[torch.tensor([0], device="mps")],
    "no kernel": lambda x: torch._int_mm(x.to(torch.int8), x.to(torch.int8)),
    "generator of the CPU": lambda x: torch.randn(2, device="mps", generator=torch.Generator("cpu")),
}


@pytest.fixture
def mps() -> Iterator[None]:
    """An emulated device."""
    with fake_mps.device():
        yield


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(name: str, mps: None) -> None:
    x = torch.ones(3, 4, device="mps")
    with pytest.raises(MpsError):
        REFUSED[name](x)


def test_the_cpu_keeps_every_dtype_beside_it(mps: None) -> None:
    assert (torch.ones(2, dtype=torch.float64) * 2).sum().item() == 4
    assert torch.ones(2).to(torch.float8_e4m3fn).float().sum().item() == 2
    assert torch.ones(2, dtype=torch.float64).to("mps", torch.float32).dtype == torch.float32


def test_tensors_say_where_they_are(mps: None) -> None:
    x = torch.arange(3, device="mps")
    assert (x.device, x.is_mps, x.is_meta, x.is_cuda) == (torch.device("mps", 0), True, False, False)
    for made in (x + 1, x[1:], torch.zeros_like(x), x.new_ones(2), torch.tensor([1], device=x.device), x.float()):
        assert made.device == x.device
    assert x.cpu().device.type == "cpu"
    assert type(x.cpu()) is torch.Tensor
    assert torch.ones(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert nn.Linear(2, 2).weight.is_meta


def test_scalars_and_indices_may_stay_on_the_cpu(mps: None) -> None:
    x = torch.arange(4.0, device="mps")
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert x[torch.tensor([1, 3])].tolist() == [1, 3]
    assert (x.sum().item(), bool(x[1] == 1), int(x[2])) == (6, True, 2)


def test_views_share_their_values(mps: None) -> None:
    x = torch.zeros(2, 3, device="mps")
    x[1].add_(1)
    x.view(-1)[0] = 7
    x[:, 2].copy_(torch.tensor([5.0, 6.0], dtype=torch.float64))
    assert x.tolist() == [[7, 0, 5], [1, 1, 6]]
    with torch.inference_mode():
        assert x[0].view(3, 1).sum().item() == 12


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(approximate="tanh"), nn.RMSNorm(8), nn.Linear(8, 4))


def train(model: nn.Module, device: str) -> list[torch.Tensor]:
    """The weights after two steps, with checkpointing and attention on the way."""
    model.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.linspace(-1, 1, 24).reshape(1, 2, 3, 4).to(device)
    for _ in range(2):
        optimiser.zero_grad()
        y = checkpoint(model, x, use_reentrant=False)
        functional.scaled_dot_product_attention(y, x, x).pow(2).sum().backward()
        optimiser.step()
    return [weight.detach().cpu() for weight in model.parameters()]


def test_training_on_it_equals_training_on_the_cpu() -> None:
    expected = train(network(), "cpu")
    with fake_mps.device():
        model = network()
        weights = list(model.parameters())
        trained = train(model, "mps")
        assert all(a is b and a.is_mps for a, b in zip(model.parameters(), weights, strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained, expected, strict=True))


def test_modules_move_and_are_copied(mps: None) -> None:
    model = network().to("mps")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.data = torch.ones(8)
    assert (model[0].weight.is_mps, model[0].bias.is_mps) == (True, False)
    assert twin[0].weight.is_mps
    assert isinstance(twin[0].weight, nn.Parameter)
    assert twin[0].weight.abs().sum().item() > 0
    assert type(twin.cpu()[0].weight) is nn.Parameter
    assert twin[0].weight.device.type == "cpu"


def test_it_is_gone_afterwards() -> None:
    available = torch.backends.mps.is_available()
    with fake_mps.device():
        assert torch.backends.mps.is_available()
    assert torch.backends.mps.is_available() is available
    assert not torch._C._only_lift_cpu_tensors()


@pytest.mark.parametrize(
    ("operator", "there"),
    [
        ("add.Tensor", True),
        ("convolution", True),
        ("native_group_norm", True),
        ("linalg_vector_norm", True),
        ("_int_mm", False),
        ("_scaled_mm", False),
        ("_scaled_dot_product_flash_attention_for_cpu", False),
    ],
)
def test_torchs_own_table_says_which_operators_have_kernels(operator: str, there: bool) -> None:
    assert fake_mps.has_kernel(operator) is there
