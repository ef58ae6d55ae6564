"""A set of weights is known by what is in it."""

import torch

from longcat_pack.longcat_backend import identity


def weights(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    values = torch.arange(20000, dtype=torch.float32).reshape(100, 200) * scale
    return [("b", torch.ones(3)), ("a", values.to(dtype))]


def test_the_same_content_is_the_same_in_any_order() -> None:
    assert identity.of_weights(weights()) == identity.of_weights(reversed(weights()))


def test_values_names_dtypes_shapes_and_what_else_matters_tell_apart() -> None:
    others = [
        identity.of_weights(weights(1.0001)),
        identity.of_weights(weights(dtype=torch.bfloat16)),
        identity.of_weights([("c", torch.ones(3)), weights()[1]]),
        identity.of_weights([("b", torch.ones(1, 3)), weights()[1]]),
        identity.of_weights(weights(), "bf16"),
    ]
    assert len({identity.of_weights(weights()), *others}) == 6
