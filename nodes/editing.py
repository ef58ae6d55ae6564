"""LongCatEditEncode."""

from typing import Any

from comfy_api.latest import io

from ..longcat_backend.comfy_bridge import editing as editing_bridge
from ..longcat_backend.errors import LongCatError
from .conditioning import normalise_quotes_input
from .latents import CUSTOM, check_sides, side_input
from .loading import CATEGORY

OFFICIAL = "1 megapixel"


class LongCatEditEncode(io.ComfyNode):
    """A picture and an instruction to what a sampler needs to edit it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatEditEncode",
            display_name="LongCat Edit Encode",
            category=CATEGORY,
            description="Prepares the edit of a picture as LongCat-Image-Edit was trained: one size for canvas and "
            "reference, the picture in the prompt and in the negative prompt, and its latents beside the canvas.",
            search_aliases=["longcat edit", "image edit", "instruction", "编辑", "改图"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP of LongCatLoader, from a LongCat-Image-Edit checkpoint, or of CLIPLoader with "
                    "type longcat_image.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of LongCatLoader, or of VAELoader with FLUX's ae.safetensors."),
                io.Image.Input(
                    "image",
                    tooltip="The picture to edit. A batch is edited picture by picture; several references for one "
                    "picture are not supported by the model.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to change, in Chinese or English, up to 512 tokens. Put text that is to be drawn in "
                    "'…', \"…\", ‘…’ or “…”.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to avoid; officially empty. It sees the picture too.",
                ),
                io.DynamicCombo.Input(
                    "size",
                    options=[
                        io.DynamicCombo.Option(OFFICIAL, []),
                        io.DynamicCombo.Option(CUSTOM, [side_input("width"), side_input("height")]),
                    ],
                    tooltip="Size of canvas and reference. 1 megapixel: the official one, with the picture's ratio, "
                    "rounded up to multiples of 16. custom: your own, to which the picture is stretched.",
                ),
                normalise_quotes_input(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The instruction with the picture."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the picture."),
                io.Latent.Output(
                    tooltip="The canvas: the picture's own latents, which denoise 1 overwrites wholly and a noise mask "
                    "keeps outside."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Size, token count, quoted text, warnings, and what was cut off.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, size: Any = None, **inputs: Any) -> bool | str:
        """Name the nearest sizes when a custom side is off the grid, before any model is loaded.

        ``inputs`` is for ComfyUI, which gives the sides only to a method that takes everything.
        """
        try:
            check_sides(size, (OFFICIAL, CUSTOM))
        except LongCatError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        clip: Any,
        vae: Any,
        image: Any,
        prompt: str,
        negative_prompt: str,
        size: dict[str, Any],
        normalise_quotes: bool = False,
    ) -> io.NodeOutput:
        """Encode picture and prompts."""
        sides = (size["width"], size["height"]) if size["size"] == CUSTOM else None
        encoded = editing_bridge.encode(clip, vae, image, prompt, negative_prompt, sides, normalise_quotes)
        return io.NodeOutput(*encoded)


NODES = [LongCatEditEncode]
