"""LongCatLoader."""

from typing import Any

from comfy_api.latest import io

from ..longcat_backend import checkpoints, precision
from ..longcat_backend.comfy_bridge import host, loading
from ..longcat_backend.errors import LongCatError

CATEGORY = "LongCat-Image"


def _precision_input(name: str, part: str) -> io.Combo.Input:
    return io.Combo.Input(
        name,
        options=list(precision.CHOICES),
        default=precision.AUTO,
        tooltip=f"Number format of the {part}. auto: the best that this device computes in (bf16 on recent GPUs).",
    )


class LongCatLoader(io.ComfyNode):
    """Official folder to MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatLoader",
            display_name="LongCat Loader",
            category=CATEGORY,
            description="Loads a LongCat-Image folder in the official layout, from models/longcat_image or "
            "models/diffusers. Every part is built from its own config and every weight is checked.",
            search_aliases=["longcat", "longcat image", "meituan", "美团", "龙猫"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=sorted(checkpoints.list_checkpoints(host.checkpoint_roots())),
                    tooltip="The checkpoint folder. Demo checkpoints that come with the pack are listed too.",
                ),
                io.DynamicCombo.Input(
                    "engine",
                    options=[
                        io.DynamicCombo.Option(name, [_precision_input("precision", "transformer")])
                        for name in (precision.AUTO, *loading.ENGINES)
                    ],
                    tooltip="Who runs the transformer. core: ComfyUI's own class, with its memory management, LoRA "
                    "loader and patches. diffusers: the reference implementation. auto: core.",
                ),
                _precision_input("text_encoder_precision", "text encoder"),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer, for every node that takes a MODEL."),
                io.Clip.Output(tooltip="The text encoder and tokenizer."),
                io.Vae.Output(tooltip="Turns pictures into latents and back."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None, engine: Any = None) -> bool | str:
        """Whether the name stands for a LongCat-Image folder that can be loaded; a sentence if not."""
        if not isinstance(engine, dict):  # ComfyUI leaves out a dynamic input whose value it does not know
            known = ", ".join((precision.AUTO, *loading.ENGINES))
            return f"There is no such engine. Choose one of: {known}.\n没有这个引擎。请选择：{known}。"
        if checkpoint is None:  # comes from another node
            return True
        try:
            loading.verify(checkpoint)
        except LongCatError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **_: Any) -> str:
        """Load again only when a file of the checkpoint changed."""
        return checkpoints.fingerprint(loading.find(checkpoint))

    @classmethod
    def execute(cls, checkpoint: str, engine: dict[str, str], text_encoder_precision: str) -> io.NodeOutput:
        """Load the three parts."""
        return io.NodeOutput(*loading.load(checkpoint, engine["engine"], engine["precision"], text_encoder_precision))


NODES = [LongCatLoader]
