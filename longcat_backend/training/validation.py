"""The loss on pictures that are not trained on, without chance: fixed noise, at fixed noise levels."""

from statistics import NormalDist

import torch

from ..transformer import VelocityModel
from . import engine, objective
from .draws import Draw, draw
from .objective import Shift
from .run import Data

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the law that noise levels of training follow


@torch.no_grad()
def held_out_loss(model: VelocityModel, data: Data, shift: Shift, seed: int, device: torch.device) -> float:
    """The mean over all held-out pictures and the five quantiles; a picture has the same noise at every step."""
    normals = [NormalDist().inv_cdf(quantile) for quantile in QUANTILES]
    total = 0.0
    for index in data.held_out:
        example = data[index]
        noise = draw(example.latent.shape, seed, "held-out", index).noise
        for normal in normals:
            sample = objective.sample(example, Draw(normal, noise, 1.0), shift, dropout=0.0)
            with engine.attention(device):
                total += float(objective.losses(model, [sample], model.dtype, device))
    return total / (len(data.held_out) * len(normals))
