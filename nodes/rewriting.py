"""LongCatPromptRewrite."""

from typing import Any

from comfy_api.latest import io, ui

from ..longcat_backend import rewriting
from ..longcat_backend.comfy_bridge import rewriting as rewriting_bridge
from ..longcat_backend.comfy_bridge.sampling import MAX_SEED
from ..longcat_backend.prompts import MAX_TOKENS
from ..longcat_backend.rewriting import Sampling
from .loading import CATEGORY

ENCODER, ENDPOINT = "text encoder", "endpoint"


def _source_input() -> io.DynamicCombo.Input:
    return io.DynamicCombo.Input(
        "source",
        options=[
            io.DynamicCombo.Option(ENCODER, []),
            io.DynamicCombo.Option(
                ENDPOINT,
                [
                    io.String.Input(
                        "base_url",
                        default="",
                        tooltip="Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1. Your prompt "
                        "is sent there on every run that uses this source.",
                    ),
                    io.String.Input("model", default="", tooltip="The name that the server has for the model."),
                    io.Int.Input(
                        "timeout", default=60, min=1, max=600, tooltip="Seconds to wait for the answer at most."
                    ),
                ],
            ),
        ],
        tooltip="Who writes. text encoder: the loaded CLIP, on this machine. endpoint: a server that you name; its key "
        "comes from the environment variables LONGCAT_REWRITE_API_KEY and LONGCAT_REWRITE_API_URL.",
    )


class LongCatPromptRewrite(io.ComfyNode):
    """A short prompt to a full caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatPromptRewrite",
            display_name="LongCat Prompt Rewrite",
            category=CATEGORY,
            description="Turns a short prompt into a full caption, with LongCat-Image's own instructions. The official "
            "pipeline does this by default.",
            search_aliases=["longcat rewrite", "longcat enhance prompt", "llm", "改写", "扩写"],
            inputs=[
                io.String.Input(
                    "prompt", multiline=True, dynamic_prompts=True, tooltip="What to draw, in Chinese or English."
                ),
                _source_input(),
                io.Combo.Input(
                    "language",
                    options=list(rewriting.LANGUAGES),
                    default=rewriting.AUTO,
                    tooltip="Language of the instructions, and so of the caption. auto: Chinese where the prompt has a "
                    "Chinese character, as in the official pipeline.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Same seed, same text. Without effect at temperature 0.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="0: always the likeliest word, as in the official pipeline. More: more variety.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=MAX_TOKENS,
                    min=1,
                    max=2048,
                    tooltip="Longest text, in tokens. The model that draws reads 512.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The CLIP of LongCatLoader. Only needed for source text encoder."
                ),
                io.String.Input(
                    "edited",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="If there is a text here, it goes out as it is and nothing is rewritten: paste the result "
                    "here to change it by hand.",
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="The new prompt, for LongCatTextEncode."),
                io.String.Output(
                    "report", display_name="report", tooltip="Who wrote it, in which language, and how many tokens."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt: Any = None, source: Any = None) -> bool | str:
        """Whether there is such a source; a sentence if not."""
        if isinstance(source, dict):
            return True
        # ComfyUI leaves out a dynamic input whose value it does not know, and asks only about inputs that it has.
        known = f"{ENCODER}, {ENDPOINT}"
        return f"There is no such source. Choose one of: {known}.\n没有这个来源。请选择：{known}。"

    @classmethod
    def execute(
        cls,
        prompt: str,
        source: dict[str, Any],
        language: str,
        seed: int,
        temperature: float,
        max_tokens: int,
        clip: Any = None,
        edited: str = "",
    ) -> io.NodeOutput:
        """Write, and show the text on the node."""
        sampling = Sampling(seed, temperature, max_tokens)
        if edited.strip():
            text, report = edited, "edited by hand, nothing rewritten 手工修改，未改写"
        elif source["source"] == ENDPOINT:
            place = source["base_url"], source["model"], source["timeout"]
            text, report = rewriting_bridge.by_endpoint(*place, prompt, language, sampling)
        else:
            text, report = rewriting_bridge.by_encoder(clip, prompt, language, sampling)
        return io.NodeOutput(text, report, ui=ui.PreviewText(text))


NODES = [LongCatPromptRewrite]
