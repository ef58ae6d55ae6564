"""LongCatTextEncode."""

from typing import Any

from comfy_api.latest import io

from ..longcat_backend.comfy_bridge import clip as clip_bridge
from .loading import CATEGORY


def normalise_quotes_input() -> io.Boolean.Input:
    """The switch for quotes of another kind than the model knows, for every node that encodes a prompt."""
    return io.Boolean.Input(
        "normalise_quotes",
        default=False,
        optional=True,
        tooltip="Encode text in 「…」『…』《…》〈…〉«…» as if it were in “…”, which is what the model was trained on. "
        "The report shows the prompt that was encoded.",
    )


class LongCatTextEncode(io.ComfyNode):
    """Prompt to CONDITIONING, and a report of what was encoded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatTextEncode",
            display_name="LongCat Text Encode",
            category=CATEGORY,
            description="Encodes a Chinese or English prompt as LongCat-Image was trained. Put text that is to be "
            "drawn in quotes.",
            search_aliases=["longcat prompt", "提示词"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of LongCatLoader."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to draw, in Chinese or English, up to 512 tokens. Text in '…', \"…\", ‘…’ or “…” is "
                    "encoded character by character so that the model can draw it. Empty is allowed.",
                ),
                normalise_quotes_input(),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="The encoded prompt."),
                io.String.Output(
                    "report", display_name="report", tooltip="Token count, quoted text, warnings, and what was cut off."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, prompt: str, normalise_quotes: bool = False) -> io.NodeOutput:
        """Encode and report."""
        return io.NodeOutput(*clip_bridge.encode(clip, prompt, normalise_quotes))


NODES = [LongCatTextEncode]
