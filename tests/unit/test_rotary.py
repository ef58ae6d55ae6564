"""The host's rotary table is the reference module's, kept, and made only once for each set of positions."""

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_longcat_image import LongCatImagePosEmbed, LongCatImageTransformer2DModel

from longcat_pack.longcat_backend import latents, rotary
from longcat_pack.longcat_backend.transformer import VelocityModel

AXES = [16, 56, 56]
# A square, an odd grid, and a picture with two references of other sizes.
SIZES = ([(8, 8)], [(6, 14)], [(4, 8), (10, 2), (2, 2)])


class Counting(LongCatImagePosEmbed):
    """The reference module; counts how often it is run."""

    calls = 0

    def forward(self, ids: torch.Tensor) -> Any:
        self.calls += 1
        return super().forward(ids)


def reference() -> Counting:
    return Counting(theta=10000, axes_dim=AXES)


def ids(*sizes: tuple[int, int], length: int = 512) -> torch.Tensor:
    return torch.cat(latents.position_ids(length, sizes or [(8, 8)]))


def tiny() -> LongCatImageTransformer2DModel:
    torch.manual_seed(0)
    return LongCatImageTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=[4, 6, 6],
    )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("length", [512, 701])
def test_bit_equal_to_the_reference_module(sizes: list[tuple[int, int]], length: int) -> None:
    positions = ids(*sizes, length=length)
    host = rotary.HostRotary(reference())
    for _ in range(2):  # made, then kept
        for value, expected in zip(host(positions), reference()(positions), strict=True):
            assert value.dtype == torch.float32
            assert torch.equal(value, expected)


def test_the_reference_computes_in_float64_and_float32_would_differ() -> None:
    """What the table would be if it were made on a device without float64."""
    positions = ids((64, 64))
    exact, _ = rotary.HostRotary(reference())(positions)
    frequencies = 1.0 / (10000 ** (torch.arange(0, AXES[1], 2, dtype=torch.float32) / AXES[1]))
    coarse = torch.outer(positions[:, 1], frequencies).cos().repeat_interleave(2, dim=1)
    assert not torch.equal(exact[:, AXES[0] : AXES[0] + AXES[1]], coarse)


def test_each_set_of_ids_is_computed_once() -> None:
    counting = reference()
    host = rotary.HostRotary(counting)
    for _ in range(3):
        for size in ((8, 8), (16, 8)):
            for length in (512, 700):
                host(ids(size, length=length))
    assert counting.calls == 4


def test_only_the_latest_tables_are_kept() -> None:
    counting = reference()
    host = rotary.HostRotary(counting)
    used = [2, 4, 6, 8, 2, 10]  # the fifth size takes the place of 4, since 2 was used again
    for side in used:
        host(ids((side, 8)))
    assert counting.calls == 5
    for side in (2, 6, 8, 10):
        host(ids((side, 8)))
    assert counting.calls == 5
    host(ids((4, 8)))
    assert counting.calls == 6
    assert len(host._entries) == 4


def test_a_table_is_copied_to_the_device_once_and_leaves_it_with_the_model() -> None:
    host = rotary.HostRotary(reference())
    host.device = torch.device("meta")
    first, _ = host(ids())
    second, _ = host(ids())
    assert first.device.type == "meta"
    assert first is second
    host.to("cpu")
    assert all(part.device.type == "cpu" for entry in host._entries for part in entry.placed)
    assert host(ids())[0].device.type == "meta"


def test_half_precision_of_the_model_leaves_the_table_alone() -> None:
    host = rotary.HostRotary(reference())
    before = host(ids())
    after = host.half()(ids())
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(before, after, strict=True))


def test_a_table_made_while_sampling_serves_training() -> None:
    """Nodes run in inference mode, whose tensors autograd cannot save."""
    host = rotary.HostRotary(reference())
    with torch.inference_mode():
        host(ids())
    cosines, sines = host(ids())
    x = torch.ones(cosines.shape, requires_grad=True)
    (x * cosines + x * sines).sum().backward()
    assert torch.equal(x.grad, cosines + sines)


@pytest.mark.parametrize("references", [(), ((2, 16, 6, 4), (2, 16, 2, 8))], ids=["text", "edit"])
def test_velocity_is_bit_equal_to_that_of_an_untouched_transformer(references: tuple[tuple[int, ...], ...]) -> None:
    plain, model = tiny().eval(), VelocityModel(tiny().eval())
    given: dict[str, Any] = {}
    model.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    kept: list[torch.Tensor] = []
    model.transformer.register_forward_hook(lambda _, args, output: kept.append(output[0]))
    images = [torch.randn(*shape) for shape in references]
    with torch.no_grad():
        model(torch.randn(2, 16, 8, 4), torch.full((2,), 0.7), torch.randn(2, 21, 8), images)
        assert isinstance(plain.pos_embed, LongCatImagePosEmbed)
        assert torch.equal(kept[0], plain(**given)[0])


def test_install_does_so_once_and_adds_no_weights() -> None:
    transformer = tiny()
    keys = transformer.state_dict().keys()
    first = rotary.install(transformer)
    assert rotary.install(transformer) is first
    assert VelocityModel(transformer).transformer.pos_embed is first
    assert transformer.state_dict().keys() == keys
