"""Sizes, latents and positions. A core LATENT is unscaled; packed and scaled latents stay inside the backend."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import LongCatError

PIXELS_PER_LATENT = 8
PATCH = 2
GRID = PIXELS_PER_LATENT * PATCH
CHANNELS = 16
PACKED_CHANNELS = CHANNELS * PATCH * PATCH
LARGEST_SIDE = 4096
LARGEST_BATCH = 64

# Width and height: buckets of the official training at about one megapixel; the ratios are the nearest usual ones.
ASPECTS = {
    "1:1 (1024x1024)": (1024, 1024),
    "16:9 (1344x768)": (1344, 768),
    "5:3 (1280x768)": (1280, 768),
    "3:2 (1216x832)": (1216, 832),
    "4:3 (1152x896)": (1152, 896),
    "2:1 (1408x704)": (1408, 704),
    "9:16 (768x1344)": (768, 1344),
    "3:5 (768x1280)": (768, 1280),
    "2:3 (832x1216)": (832, 1216),
    "3:4 (896x1152)": (896, 1152),
    "1:2 (704x1408)": (704, 1408),
}


def check_size(width: int, height: int) -> None:
    """Refuse a size that the model cannot draw exactly.

    Raises:
        LongCatError: a side is not a multiple of 16 pixels (8 in the VAE, 2 in the DiT's patches) up to 4096.
    """
    for name, name_zh, side in (("width", "宽度", width), ("height", "高度", height)):
        if side % GRID or not GRID <= side <= LARGEST_SIDE:
            lower = min(max(GRID, side // GRID * GRID), LARGEST_SIDE)
            near = f"{lower}" if lower == LARGEST_SIDE else f"{lower} / {lower + GRID}"
            raise LongCatError(
                f"{name} {side} is not a multiple of {GRID} between {GRID} and {LARGEST_SIDE}. Use {near}.",
                f"{name_zh} {side} 不是 {GRID} 到 {LARGEST_SIDE} 之间 {GRID} 的倍数。请改用 {near}。",
            )


def check_batch(batch: int) -> None:
    """Refuse a batch size out of range.

    Raises:
        LongCatError: it is below 1 or above 64.
    """
    if not 1 <= batch <= LARGEST_BATCH:
        raise LongCatError(
            f"batch_size is {batch}. Set it between 1 and {LARGEST_BATCH}.",
            f"batch_size 为 {batch}。请设为 1 到 {LARGEST_BATCH}。",
        )


def check_unpacked(samples: torch.Tensor, channels: int = CHANNELS) -> None:
    """Refuse a latent of another model, a video or packed latents.

    Raises:
        LongCatError: the shape is not (batch, channels, h, w) with at least one value.
    """
    if samples.is_nested or samples.ndim != 4 or samples.shape[1] != channels or not samples.numel():
        shape = "nested" if samples.is_nested else tuple(samples.shape)
        raise LongCatError(
            f"The latent has shape {shape}; expected (batch, {channels}, height / 8, width / 8). It is from another "
            "model or packed: make it with LongCatEmptyLatent, or VAEEncode with the VAE of LongCatLoader.",
            f"潜变量的形状为 {shape}，应为 (batch, {channels}, 高 / 8, 宽 / 8)。它来自其他模型或是打包格式："
            "请用 LongCatEmptyLatent，或用 LongCatLoader 的 VAE 通过 VAEEncode 生成。",
        )


def check_finite(samples: torch.Tensor) -> None:
    """Refuse a latent that would turn the whole picture black.

    Raises:
        LongCatError: the latent holds NaN or infinity.
    """
    bad = int((~torch.isfinite(samples)).sum())
    if bad:
        raise LongCatError(
            f"The latent holds {bad} values that are NaN or infinite. The node that made it failed: encode the image "
            "again, or use a precision with more range (bf16 or fp32 in place of fp16).",
            f"潜变量中有 {bad} 个 NaN 或无穷大。生成它的节点出错了：请重新编码图像，"
            "或使用范围更大的精度（用 bf16 或 fp32 代替 fp16）。",
        )


def empty_latent(width: int, height: int, batch: int) -> torch.Tensor:
    """Zeros of shape (batch, 16, height / 8, width / 8).

    Raises:
        LongCatError: see :func:`check_size` and :func:`check_batch`.
    """
    check_size(width, height)
    check_batch(batch)
    return torch.zeros(batch, CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)


def token_count(samples: torch.Tensor) -> int:
    """Number of image tokens of a latent (batch, 16, h, w); an odd side is padded to a whole patch."""
    height, width = samples.shape[-2:]
    return -(-height // PATCH) * -(-width // PATCH)


def pack(samples: torch.Tensor) -> torch.Tensor:
    """(batch, 16, h, w) to (batch, h/2 · w/2, 64): channel, then row, then column within a 2×2 patch."""
    batch, channels, height, width = samples.shape
    patches = samples.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Inverse of :func:`pack` for a latent of ``height`` by ``width``."""
    batch, _, packed = tokens.shape
    channels = packed // (PATCH * PATCH)
    patches = tokens.view(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def unpack_scaled(tokens: torch.Tensor, vae_config: Mapping[str, Any], width: int, height: int) -> torch.Tensor:
    """A pipeline's packed latents (``output_type="latent"``) as an unscaled LATENT.

    Args:
        tokens: (batch, tokens, 64), scaled and shifted.
        width, height: of the picture in pixels; 0 for both means a square.

    Raises:
        LongCatError: the size is off the grid or does not give this number of tokens.
    """
    if not width and not height:
        width = height = round(tokens.shape[1] ** 0.5) * GRID
    check_size(width, height)
    rows, columns = height // GRID, width // GRID
    if rows * columns != tokens.shape[1] or tokens.shape[2] != PACKED_CHANNELS:
        raise LongCatError(
            f"Packed latents of shape {tuple(tokens.shape)} are not a picture of {width}x{height}: that needs "
            f"({rows * columns}, {PACKED_CHANNELS}). Set the width and height the latents were made for.",
            f"形状为 {tuple(tokens.shape)} 的打包潜变量不是 {width}x{height} 的图像"
            f"（应为 ({rows * columns}, {PACKED_CHANNELS})）。"
            "请填写生成它时的宽和高。",
        )
    samples = unpack(tokens, rows * PATCH, columns * PATCH)
    return samples / vae_config["scaling_factor"] + vae_config["shift_factor"]


def text_position_ids(length: int) -> torch.Tensor:
    """(length, 3) of modality 0 and the token's index twice."""
    ids = torch.arange(length, dtype=torch.float32)
    return torch.stack([torch.zeros_like(ids), ids, ids], dim=1)


def image_position_ids(rows: int, columns: int, start: int, modality: int = 1) -> torch.Tensor:
    """(rows · columns, 3) of modality, start + row, start + column.

    Args:
        start: the conditioning's real length. The text takes the positions below it.
        modality: 1 for the picture being drawn, 2 and up for reference images.

    float32, as in the reference pipeline: whole numbers are exact in it, and MPS has no float64.
    """
    row = torch.arange(rows, dtype=torch.float32) + start
    column = torch.arange(columns, dtype=torch.float32) + start
    grid = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.cat([torch.full_like(grid[:, :1], modality), grid], dim=1)


def position_ids(text_length: int, sizes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a text of ``text_length`` and of latents of the given (h, w): the picture first, then references.

    They stay on the host, where the rotary table is made of them.
    """
    images = [
        image_position_ids(height // PATCH, width // PATCH, text_length, modality)
        for modality, (height, width) in enumerate(sizes, start=1)
    ]
    return text_position_ids(text_length), torch.cat(images)
