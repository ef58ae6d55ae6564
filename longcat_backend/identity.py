"""What a set of weights is, by its content: the same wherever it was loaded from, another where any layer differs."""

import hashlib
from collections.abc import Iterable

import torch

from . import quantisation

SAMPLE = 4096


def of_weights(tensors: Iterable[tuple[str, torch.Tensor]], *more: object) -> str:
    """A hash of names, dtypes, shapes, and up to 4,096 values of each tensor at even distances.

    Not all values, because a text encoder has 14 GB of them; weights that were trained further differ in nearly all.

    Args:
        more: what the results depend on besides the weights.
    """
    digest = hashlib.sha256(repr(more).encode())
    leaves = (leaf for name, tensor in tensors for leaf in quantisation.leaves(tensor, name))
    for name, leaf in sorted(leaves, key=lambda named: named[0]):
        digest.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
        flat = leaf.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
