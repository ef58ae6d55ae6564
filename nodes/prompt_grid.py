"""LongCatPromptGrid."""

from typing import Any

from comfy_api.latest import io, ui

from ..longcat_backend import latents
from ..longcat_backend.comfy_bridge import lora as lora_bridge
from ..longcat_backend.comfy_bridge import prompt_grid
from ..longcat_backend.errors import LongCatError
from .latents import CUSTOM, check_sides, side_input
from .loading import CATEGORY
from .sampling import guidance_input, steps_input

NO_LORA = "none"


class LongCatPromptGrid(io.ComfyNode):
    """Many pictures in one, to be compared."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatPromptGrid",
            display_name="LongCat Prompt Grid",
            category=CATEGORY,
            description="Draws prompts × seeds × LoRA strengths in one labelled picture. Each is the picture that "
            "LongCat Sampler draws of the same settings.",
            is_output_node=True,
            search_aliases=["longcat grid", "xy plot", "contact sheet", "validation", "网格", "对比图"],
            inputs=[
                io.Model.Input("model", tooltip="A LongCat-Image MODEL."),
                io.Clip.Input("clip", tooltip="The CLIP of LongCatLoader."),
                io.Vae.Input("vae", tooltip="The VAE of LongCatLoader."),
                io.String.Input(
                    "prompts", multiline=True, tooltip="One prompt a line, in Chinese or English. Each is a row."
                ),
                io.String.Input("seeds", default="0", tooltip="Seeds with commas between them. Each is a column."),
                io.DynamicCombo.Input(
                    "size",
                    options=[io.DynamicCombo.Option(name, []) for name in latents.ASPECTS]
                    + [io.DynamicCombo.Option(CUSTOM, [side_input("width"), side_input("height")])],
                    tooltip="Size of each picture. With an image to edit, every choice but custom means one megapixel "
                    "in the image's own ratio.",
                ),
                steps_input(),
                guidance_input(),
                io.Combo.Input(
                    "lora",
                    options=[NO_LORA, *lora_bridge.names()],
                    default=NO_LORA,
                    optional=True,
                    tooltip="A LoRA of models/loras, to be drawn at each of the strengths.",
                ),
                io.String.Input(
                    "strengths",
                    default="0, 1",
                    optional=True,
                    tooltip="Strengths of the LoRA with commas between them. Each is a column; 0 is without it.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture that each prompt edits, for LongCat-Image-Edit. None: draw from text.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What to avoid in every picture; officially empty.",
                ),
                io.Boolean.Input(
                    "renorm",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="LongCat's CFG renormalisation, on for text to image. Edits are drawn without, always.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All pictures in one, with labels."),
                io.Image.Output(display_name="pictures", tooltip="The single pictures as a batch, row by row."),
                io.String.Output(display_name="legend", tooltip="The prompts by the numbers of their rows."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        size: Any = None,
        prompts: str | None = None,
        seeds: str | None = None,
        strengths: str | None = None,
        **inputs: Any,
    ) -> bool | str:
        """A sentence for lists that cannot be read and sizes off the grid, before any model is loaded.

        ``inputs`` is for ComfyUI, which gives the sides only to a method that takes everything. None comes from another
        node.
        """
        try:
            check_sides(size, (*latents.ASPECTS, CUSTOM))
            if prompts is not None:
                prompt_grid.prompt_lines(prompts)
            if seeds is not None:
                prompt_grid.numbers(seeds, "seeds", int)
            if strengths is not None:
                prompt_grid.numbers(strengths, "strengths", float)
        except LongCatError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora: str = NO_LORA, **_: Any) -> str:
        """Draw again when the LoRA's file changed."""
        return "" if lora == NO_LORA else lora_bridge.fingerprint(lora)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompts: str,
        seeds: str,
        size: dict[str, Any],
        steps: int,
        guidance: float,
        lora: str = NO_LORA,
        strengths: str = "0, 1",
        image: Any = None,
        negative_prompt: str = "",
        renorm: bool = True,
    ) -> io.NodeOutput:
        """Draw, and show the legend on the node."""
        sides = (size["width"], size["height"]) if size["size"] == CUSTOM else latents.ASPECTS[size["size"]]
        official_edit = image is not None and size["size"] != CUSTOM
        settings = prompt_grid.Settings(None if official_edit else sides, steps, guidance, renorm, negative_prompt)
        variants = [prompt_grid.Variant("", model)]
        if lora != NO_LORA:
            variants = prompt_grid.lora_variants(model, lora, prompt_grid.numbers(strengths, "strengths", float))
        lines, numbers = prompt_grid.prompt_lines(prompts), prompt_grid.numbers(seeds, "seeds", int)
        grid, pictures, legend = prompt_grid.draw(variants, clip, vae, lines, numbers, settings, image)
        return io.NodeOutput(grid, pictures, legend, ui=ui.PreviewImage(grid, cls=cls))


NODES = [LongCatPromptGrid]
