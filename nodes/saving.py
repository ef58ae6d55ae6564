"""LongCatSaveCheckpoint."""

from typing import Any

from comfy_api.latest import io, ui

from ..longcat_backend.comfy_bridge import saving
from ..longcat_backend.errors import LongCatError
from .loading import CATEGORY


class LongCatSaveCheckpoint(io.ComfyNode):
    """What is loaded to files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatSaveCheckpoint",
            display_name="LongCat Save Checkpoint",
            category=CATEGORY,
            description="Writes what is loaded as an official folder or as ComfyUI's single files, in another "
            "precision if you like. Either everything is there afterwards or nothing.",
            search_aliases=["longcat save", "longcat convert", "longcat quantize", "保存"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The MODEL of LongCatLoader. LoRAs and other weight patches on it are baked in, as in "
                    "core's Save Model; beside weights in int8-quanto, int4-quanto or fp8-torchao they are refused.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP of LongCatLoader, with its tokenizer. Vision tower and output head, which are "
                    "not loaded, are copied from the checkpoint that it was loaded from.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of LongCatLoader."),
                io.String.Input(
                    "name",
                    default="LongCat-Image-mine",
                    tooltip="Name of the folder or of the files; with / in a subfolder. Files get longcat_ in front "
                    "unless they begin with longcat.",
                ),
                io.Combo.Input(
                    "layout",
                    options=list(saving.LAYOUTS),
                    default=saving.FILES,
                    tooltip="folder: the official layout, in models/longcat_image; needs model, clip and vae; "
                    "the one for int8-quanto, int4-quanto and fp8-torchao. comfyui: one file for each, in "
                    "models/diffusion_models, text_encoders and vae, that core's loaders read too.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(saving.PRECISIONS),
                    default=saving.KEEP,
                    tooltip="keep: as it is loaded. fp8 and int8: the large layers of transformer and text encoder in "
                    "ComfyUI's own quantised format, layout comfyui only.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace a checkpoint of that name. Off: refuse instead."
                ),
            ],
            outputs=[io.String.Output("report", display_name="report", tooltip="What was written, and where.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None, layout: str | None, precision: str | None) -> bool | str:
        """Whether the name can be written in that layout and precision; a sentence if not."""
        if name is None or layout is None or precision is None:  # comes from another node
            return True
        if layout not in saving.LAYOUTS or precision not in saving.PRECISIONS:
            known = f"{', '.join(saving.LAYOUTS)}; {', '.join(saving.PRECISIONS)}"
            return f"There is no such layout or precision. Choose from: {known}.\n没有该结构或精度。请选择：{known}。"
        try:
            saving.check(name, layout, precision)
        except LongCatError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        name: str,
        layout: str,
        precision: str,
        overwrite: bool,
        model: Any = None,
        clip: Any = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        """Write, and show the report on the node."""
        report = saving.save(model, clip, vae, name, layout, precision, overwrite)
        return io.NodeOutput(report, ui=ui.PreviewText(report))


NODES = [LongCatSaveCheckpoint]
