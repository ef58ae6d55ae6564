"""LongCatLoraLoader."""

from typing import Any

from comfy_api.latest import io, ui

from ..longcat_backend.comfy_bridge import lora as lora_bridge
from .loading import CATEGORY


class LongCatLoraLoader(io.ComfyNode):
    """A LoRA on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatLoraLoader",
            display_name="LongCat LoRA Loader",
            category=CATEGORY,
            description="Applies a LoRA of any layout that LongCat-Image LoRAs come in, on every engine and precision, "
            "and says what it matched. Put several in a row to stack them.",
            search_aliases=["longcat lora", "lokr", "loha", "lycoris", "peft"],
            inputs=[
                io.Model.Input("model", tooltip="A LongCat-Image MODEL, with LoRAs on it or without."),
                io.Combo.Input(
                    "lora",
                    options=lora_bridge.names(),
                    tooltip="A .safetensors file in models/loras. For a PEFT folder choose its "
                    "adapter_model.safetensors: the adapter_config.json beside it is read too.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How strongly: 1 as it was trained, 0 not at all, below 0 the opposite.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA, for a sampler or the next LoRA."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Which layout the file has, how many layers it matched, with which rank and alpha, and "
                    "which keys are for no layer of the model.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **kwargs: Any) -> str:
        """Run again when the file has changed, as after a training."""
        return lora_bridge.fingerprint(lora)

    @classmethod
    def execute(cls, model: Any, lora: str, strength: float) -> io.NodeOutput:
        """Apply, and show the report on the node."""
        patched, report = lora_bridge.load(model, lora, strength)
        return io.NodeOutput(patched, report, ui=ui.PreviewText(report))


NODES = [LongCatLoraLoader]
