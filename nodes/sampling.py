"""LongCatSchedule, LongCatGuidance and LongCatSampler."""

from typing import Any

from comfy_api.latest import io

from ..longcat_backend import flow
from ..longcat_backend.comfy_bridge import guidance as guidance_bridge
from ..longcat_backend.comfy_bridge import sampling
from ..longcat_backend.errors import LongCatError
from .loading import CATEGORY

MAX_STEPS = 1000


def _model_input() -> io.Model.Input:
    return io.Model.Input("model", tooltip="A LongCat-Image MODEL.")


def steps_input() -> io.Int.Input:
    """Sampling steps."""
    return io.Int.Input(
        "steps", default=50, min=1, max=MAX_STEPS, tooltip="Sampling steps: 50 officially, 8 for edit-turbo."
    )


def guidance_input() -> io.Float.Input:
    """Guidance scale."""
    return io.Float.Input(
        "guidance",
        default=4.5,
        min=0.0,
        max=20.0,
        step=0.1,
        tooltip="Guidance scale: 4 to 5 officially. 1 and less is off and twice as fast.",
    )


def _denoise_input() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Share of the schedule to run: 1 draws from noise, less keeps more of the given latent.",
    )


def _renorm_inputs() -> list[io.Boolean.Input | io.Float.Input]:
    return [
        io.Boolean.Input(
            "renorm",
            default=True,
            tooltip="LongCat's CFG renormalisation: no token of the guided velocity gets longer than without "
            "guidance. For text to image; editing officially has none and never gets it.",
        ),
        io.Float.Input(
            "renorm_min",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="The least factor that renormalisation may apply; 1 switches it off.",
        ),
    ]


class LongCatSchedule(io.ComfyNode):
    """The official sigmas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatSchedule",
            display_name="LongCat Schedule",
            category=CATEGORY,
            description="The official noise schedule for the latent's size, for SamplerCustomAdvanced. KSampler's own "
            "schedule has one shift for every size, right only at 1024x1024.",
            search_aliases=["longcat sigmas", "longcat scheduler", "调度"],
            inputs=[
                _model_input(),
                io.Latent.Input("latent", tooltip="The latent to be sampled; its size sets the shift."),
                steps_input(),
                _denoise_input(),
            ],
            outputs=[io.Sigmas.Output(tooltip="The noise levels from the first step to the last.")],
        )

    @classmethod
    def validate_inputs(cls, steps: int | None, denoise: float | None) -> bool | str:
        """A sentence for a schedule that cannot be run."""
        return _check_schedule(steps, denoise)

    @classmethod
    def execute(cls, model: Any, latent: dict[str, Any], steps: int, denoise: float) -> io.NodeOutput:
        """Sigmas from the checkpoint's scheduler config."""
        return io.NodeOutput(sampling.schedule(model, latent, steps, denoise))


class LongCatGuidance(io.ComfyNode):
    """LongCat's guidance for core samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatGuidance",
            display_name="LongCat Guidance",
            category=CATEGORY,
            description="Gives a MODEL LongCat's guidance, for KSampler and every other core sampler: guidance in "
            "velocity space with renormalisation over packed tokens. The strength is the sampler's cfg. "
            "Core's CFGNorm is another formula.",
            search_aliases=["longcat cfg", "cfg renorm", "引导"],
            inputs=[
                _model_input(),
                *_renorm_inputs(),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where in the schedule guidance begins; before it the unconditional pass is saved.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where in the schedule guidance ends; after it the unconditional pass is saved.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with its guidance, for a sampler.")],
        )

    @classmethod
    def execute(
        cls, model: Any, renorm: bool, renorm_min: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        """Patch a clone of the MODEL."""
        return io.NodeOutput(guidance_bridge.patch(model, renorm, renorm_min, start_percent, end_percent))


class LongCatSampler(io.ComfyNode):
    """The official way to sample, in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatSampler",
            display_name="LongCat Sampler",
            category=CATEGORY,
            description="Samples as the official pipeline does: Euler steps on the schedule for the latent's size, "
            "guidance with renormalisation. The same seed gives the same noise as in the pipeline.",
            search_aliases=["longcat ksampler", "采样"],
            inputs=[
                _model_input(),
                io.Conditioning.Input("positive", tooltip="What to draw."),
                io.Conditioning.Input("negative", tooltip="What to avoid; officially an empty prompt."),
                io.Latent.Input("latent", tooltip="The canvas, or a picture to start from with denoise below 1."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=sampling.MAX_SEED,
                    control_after_generate=True,
                    tooltip="The random seed of the noise.",
                ),
                steps_input(),
                guidance_input(),
                *_renorm_inputs(),
                _denoise_input(),
                io.Boolean.Input(
                    "flavour_defaults",
                    default=False,
                    optional=True,
                    tooltip="Sample with the official steps, guidance and renorm of the MODEL's flavour, whatever is "
                    "set above: 50 steps and 4.5; edit-turbo 8 steps and 1.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The sampled latent, to be decoded.")],
        )

    @classmethod
    def validate_inputs(cls, steps: int | None, denoise: float | None) -> bool | str:
        """A sentence for a schedule that cannot be run."""
        return _check_schedule(steps, denoise)

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        guidance: float,
        renorm: bool,
        renorm_min: float,
        denoise: float,
        flavour_defaults: bool = False,
    ) -> io.NodeOutput:
        """Patch, schedule, sample."""
        own = sampling.Settings(steps, guidance, renorm)
        settings = sampling.settle(model, positive, own, flavour_defaults)
        patched = guidance_bridge.patch_renorm(model, settings.renorm, renorm_min)
        sigmas = sampling.schedule(patched, latent, settings.steps, denoise)
        return io.NodeOutput(sampling.sample(patched, positive, negative, latent, sigmas, settings.guidance, seed))


def _check_schedule(steps: int | None, denoise: float | None) -> bool | str:
    if denoise is not None:  # None: comes from another node
        try:
            flow.check_denoise(denoise)
        except LongCatError as error:
            return str(error)
    if steps is None or 1 <= steps <= MAX_STEPS:
        return True
    return (
        f"steps is {steps}; set it between 1 and {MAX_STEPS} (50 officially, 8 for edit-turbo).\n"
        f"步数为 {steps}；请设为 1 到 {MAX_STEPS}（官方为 50，edit-turbo 为 8）。"
    )


NODES = [LongCatSchedule, LongCatGuidance, LongCatSampler]
