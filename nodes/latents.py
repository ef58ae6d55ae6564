"""LongCatEmptyLatent and LongCatDecode."""

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..longcat_backend import latents
from ..longcat_backend.comfy_bridge import vae as vae_bridge
from ..longcat_backend.errors import LongCatError
from .loading import CATEGORY

CUSTOM = "custom"


def side_input(name: str) -> io.Int.Input:
    """A side of a custom size."""
    return io.Int.Input(
        name,
        default=1024,
        min=latents.GRID,
        max=latents.LARGEST_SIDE,
        step=latents.GRID,
        tooltip=f"The picture's {name} in pixels, a multiple of {latents.GRID}.",
    )


def check_sides(size: Any, choices: Sequence[str]) -> None:
    """Refuse a custom size off the grid, before any model is loaded.

    Raises:
        LongCatError: see :func:`latents.check_size`; or the choice is unknown, which ComfyUI leaves out.
    """
    if not isinstance(size, dict):
        known = ", ".join(choices)
        raise LongCatError(f"There is no such size. Choose one of: {known}.", f"没有这个尺寸。请选择：{known}。")
    width, height = size.get("width"), size.get("height")  # None comes from another node
    latents.check_size(latents.GRID if width is None else width, latents.GRID if height is None else height)


class LongCatEmptyLatent(io.ComfyNode):
    """The canvas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatEmptyLatent",
            display_name="LongCat Empty Latent",
            category=CATEGORY,
            description="An empty canvas in a size that LongCat-Image was trained on, or any multiple of 16.",
            search_aliases=["longcat size", "aspect ratio", "尺寸", "画布"],
            inputs=[
                io.DynamicCombo.Input(
                    "size",
                    options=[io.DynamicCombo.Option(name, []) for name in latents.ASPECTS]
                    + [io.DynamicCombo.Option(CUSTOM, [side_input("width"), side_input("height")])],
                    tooltip="The training sizes of about one megapixel, or custom.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=latents.LARGEST_BATCH,
                    tooltip="How many pictures to draw at once.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The empty canvas.")],
        )

    @classmethod
    def validate_inputs(cls, size: Any = None, **inputs: Any) -> bool | str:
        """Name the nearest sizes when a custom side is off the grid, before any model is loaded."""
        batch = inputs.get("batch_size")
        try:
            check_sides(size, (*latents.ASPECTS, CUSTOM))
            if batch is not None:  # None comes from another node
                latents.check_batch(batch)
        except LongCatError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, size: dict[str, Any], batch_size: int) -> io.NodeOutput:
        """Zeros of the chosen size."""
        width, height = latents.ASPECTS.get(size["size"]) or (size["width"], size["height"])
        return io.NodeOutput({"samples": latents.empty_latent(width, height, batch_size)})


class LongCatDecode(io.ComfyNode):
    """Latents to pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        side = {"default": 0, "min": 0, "max": latents.LARGEST_SIDE, "step": latents.GRID, "advanced": True}
        tip = "Only for packed latents (batch, tokens, 64): the picture's {} in pixels, 0 for a square."
        return io.Schema(
            node_id="LongCatDecode",
            display_name="LongCat Decode",
            category=CATEGORY,
            description="Decodes a LATENT, also the packed kind that the diffusers pipeline and trainers write, "
            "whole or in tiles.",
            search_aliases=["longcat vae decode", "解码"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of LongCatLoader."),
                io.Latent.Input("latent", tooltip="Latents (batch, 16, h, w), or packed (batch, tokens, 64)."),
                io.Boolean.Input(
                    "tiled",
                    default=False,
                    tooltip="Decode in overlapping tiles of 512 pixels: less memory, faint differences at the seams.",
                ),
                io.Int.Input("width", **side, tooltip=tip.format("width")),
                io.Int.Input("height", **side, tooltip=tip.format("height")),
            ],
            outputs=[io.Image.Output(tooltip="The pictures.")],
        )

    @classmethod
    def execute(cls, vae: Any, latent: dict[str, Any], tiled: bool, width: int, height: int) -> io.NodeOutput:
        """Unpack if needed, then decode."""
        return io.NodeOutput(vae_bridge.decode(vae, latent["samples"], tiled, width, height))


NODES = [LongCatEmptyLatent, LongCatDecode]
