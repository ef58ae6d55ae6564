"""LongCatTrainLora."""

from typing import Any

from comfy_api.latest import io, ui

from ..longcat_backend import precision, saving
from ..longcat_backend.comfy_bridge import prompt_grid, sampling, training, training_request
from ..longcat_backend.errors import LongCatError
from ..longcat_backend.training import settings as choices
from ..longcat_backend.training.settings import TrainSettings
from .dataset import DatasetType
from .loading import CATEGORY

GO_ON = "go on"
START_OVER = "start over"
FIXED = "fixed"
NONE = "none"
GROUP_OFFLOAD = "group offload"
# Inputs of the node that are settings of the run under the same name.
_PLAIN = (
    "steps",
    "learning_rate",
    "rank",
    "targets",
    "base_precision",
    "seed",
    "batch",
    "accumulation",
    "optimiser",
    "schedule",
    "warmup",
    "weight_decay",
    "ema",
    "checkpointing",
    "compile",
    "modulation_table",
    "save_every",
    "keep",
    "validate_every",
    "preservation_weight",
)


def _common_inputs() -> list[Any]:
    """What is set for every LoRA."""
    return [
        io.Model.Input(
            "model", tooltip="The MODEL of LongCatLoader. Its checkpoint is read once more, to be trained on."
        ),
        io.Clip.Input("clip", tooltip="The CLIP of LongCatLoader: it encodes the captions."),
        io.Vae.Input("vae", tooltip="The VAE of LongCatLoader: it encodes the pictures."),
        DatasetType.Input("dataset", tooltip="The pictures and captions of LongCatDataset."),
        io.String.Input(
            "name",
            default="my-lora",
            tooltip="Name of the LoRA: models/loras/name.safetensors, with / in a subfolder. It is the name of the run "
            "too, which goes on where it stopped when it is queued again.",
        ),
        io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Updates of the LoRA."),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=0.0,
            max=10.0,
            step=1e-6,
            round=1e-9,
            tooltip="Size of each update: about 1e-4 for adamw, 1 for prodigy.",
        ),
        io.Int.Input(
            "rank", default=16, min=1, max=1024, tooltip="Size of the LoRA: 47 MB at 16 with targets official."
        ),
        io.Combo.Input(
            "targets",
            options=list(choices.TARGETS),
            default="official",
            tooltip="Layers that learn. attention: 100 layers, as SimpleTuner. official: also the text stream and the "
            "MLPs of the double blocks, 180 layers, as the official script. all: all 220 linear layers of the blocks.",
        ),
        io.Combo.Input(
            "base_precision",
            options=[precision.AUTO, *choices.BASE_PRECISIONS],
            default=precision.AUTO,
            tooltip="Number format of the frozen base. auto: bf16, or fp32 where the device lacks it. The quantised "
            "ones need less memory and are slower. The LoRA fits every precision.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=sampling.MAX_SEED,
            control_after_generate=False,  # another seed would be another run
            tooltip="Seed of everything that is left to chance.",
        ),
        io.String.Input(
            "validation_prompts",
            multiline=True,
            default="",
            optional=True,
            tooltip="One prompt a line, drawn without and with the LoRA while it learns. Empty: captions of the "
            "dataset. For an edit LoRA each edits the same picture of the dataset.",
        ),
        io.Combo.Input(
            "if_begun",
            options=[GO_ON, START_OVER],
            default=GO_ON,
            optional=True,
            tooltip="Where there is a run of this name. go on: from its last state, with the same settings. start "
            "over: delete its saved states first, each time it is queued, after an interruption too; its LoRA is "
            "replaced at the end. Set go on to continue.",
        ),
    ]


def _advanced_inputs() -> list[Any]:
    """What has a good value already."""
    return [
        *_numbers(),
        io.Combo.Input(
            "optimiser",
            options=list(choices.OPTIMISERS),
            default="adamw",
            optional=True,
            advanced=True,
            tooltip="prodigy and lion need the packages prodigyopt and lion-pytorch; adamw-8bit is torchao's.",
        ),
        io.Combo.Input(
            "schedule",
            options=list(choices.SCHEDULES),
            default="constant",
            optional=True,
            advanced=True,
            tooltip="The learning rate after the warm-up. cosine and linear fall to 0 over the run: with another "
            "number of steps a run goes on at other rates, which the report says.",
        ),
        io.DynamicCombo.Input(
            "flow_shift",
            options=[
                *(io.DynamicCombo.Option(name, []) for name in choices.FLOW_SHIFTS),
                io.DynamicCombo.Option(
                    FIXED,
                    [io.Float.Input("shift", default=3.0, min=0.01, max=100.0, step=0.01, tooltip="The shift itself.")],
                ),
            ],
            optional=True,
            tooltip="Which noise levels are learnt most. batch: the shift that drawing has at each picture's size. "
            "run: one for all, of the mean size. fixed: a number.",
        ),
        io.Combo.Input(
            "checkpointing",
            options=list(choices.CHECKPOINTING),
            default="block",
            optional=True,
            advanced=True,
            tooltip="What is computed again in place of being kept. block: least memory. every-second: between. none: "
            "fastest. The numbers are the same.",
        ),
        io.Boolean.Input(
            "compile",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Compile the blocks: about a third faster after a few slow first steps. Needs a compiler (Triton).",
        ),
        io.DynamicCombo.Input(
            "offload",
            options=[
                io.DynamicCombo.Option(NONE, []),
                io.DynamicCombo.Option(GROUP_OFFLOAD, _offload_inputs()),
            ],
            optional=True,
            tooltip="Keep the base in the computer's memory and bring it to the GPU in parts; not a quantised one.",
        ),
        *_validation_inputs(),
        *_preservation_inputs(),
        io.Boolean.Input(
            "modulation_table",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Keep the 27 % of the base that depend on the noise level alone on the CPU, behind a table of "
            "their results: 3.2 GiB less, the same numbers. Not with base_precision fp32, in which every level is new.",
        ),
    ]


def _numbers() -> list[Any]:
    shared: dict[str, Any] = {"optional": True, "advanced": True}
    return [
        io.Float.Input(
            "alpha",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.5,
            tooltip="The LoRA counts alpha / rank times. 0: the rank, so once, which every program understands.",
            **shared,
        ),
        io.Int.Input("batch", default=1, min=1, max=256, tooltip="Pictures of one size in a forward.", **shared),
        io.Int.Input(
            "accumulation", default=1, min=1, max=1024, tooltip="Forwards whose gradients make one update.", **shared
        ),
        io.Int.Input(
            "warmup",
            default=0,
            min=0,
            max=100_000,
            tooltip="Steps over which the rate rises from 0.",
            **shared,
        ),
        io.Float.Input(
            "weight_decay", default=1e-3, min=0.0, max=10.0, step=1e-4, round=1e-9, tooltip="Pull to zero.", **shared
        ),
        io.Float.Input(
            "max_grad_norm",
            default=1.0,
            min=0.0,
            max=1000.0,
            step=0.1,
            tooltip="The gradient is scaled down to this norm; 0: never.",
            **shared,
        ),
        io.Float.Input(
            "ema",
            default=0.0,
            min=0.0,
            max=0.999999,
            step=0.001,
            round=1e-6,
            tooltip="Decay of a running average of the LoRA, which is then the result; 0: none.",
            **shared,
        ),
        io.Int.Input(
            "save_every",
            default=250,
            min=0,
            max=1_000_000,
            tooltip="Steps between saved states; 0: only at the end and when interrupted.",
            **shared,
        ),
        io.Int.Input(
            "keep", default=3, min=1, max=1000, tooltip="How many states stay on the disk, besides the best.", **shared
        ),
    ]


def _offload_inputs() -> list[Any]:
    return [
        io.Combo.Input("level", options=["block", "leaf"], tooltip="What comes at a time: blocks, or single layers."),
        io.Int.Input(
            "blocks_per_group", default=1, min=1, max=30, tooltip="Blocks that come at a time, without stream."
        ),
        io.Boolean.Input("stream", default=True, tooltip="Copy the next group while this one computes (CUDA)."),
    ]


def _validation_inputs() -> list[Any]:
    shared: dict[str, Any] = {"optional": True, "advanced": True}
    return [
        io.Int.Input(
            "validate_every",
            default=250,
            min=0,
            max=1_000_000,
            tooltip="Steps between validation pictures and held-out losses; 0: only pictures, at the end.",
            **shared,
        ),
        io.Int.Input("validation_steps", default=30, min=1, max=1000, tooltip="Sampling steps of a picture.", **shared),
        io.Float.Input(
            "validation_guidance", default=4.5, min=0.0, max=20.0, step=0.1, tooltip="Guidance of a picture.", **shared
        ),
        io.Int.Input(
            "validation_seed", default=0, min=0, max=sampling.MAX_SEED, tooltip="Seed of the pictures.", **shared
        ),
    ]


def _preservation_inputs() -> list[Any]:
    return [
        io.String.Input(
            "preservation_prompts",
            multiline=True,
            default="",
            optional=True,
            tooltip="What the model must go on drawing as before, one prompt a line; a few dozen are best. The base "
            "draws them once before the first step, and each step computes half as many samples again. Empty: off.",
        ),
        io.Float.Input(
            "preservation_weight",
            default=1.0,
            min=0.0,
            max=1000.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="How much the preservation prompts count beside the pictures; 0: off.",
        ),
    ]


class LongCatTrainLora(io.ComfyNode):
    """Pictures with captions to a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatTrainLora",
            display_name="LongCat Train LoRA",
            category=CATEGORY,
            description="Trains a LoRA on the pictures of LongCatDataset. Interrupting saves; queueing the same "
            "settings goes on where it stopped.",
            search_aliases=["longcat lora", "train lora", "fine-tune", "finetune", "训练", "微调"],
            is_output_node=True,
            inputs=[*_common_inputs(), *_advanced_inputs()],
            outputs=[
                io.Model.Output(tooltip="The MODEL with the LoRA live, at strength 1."),
                io.LoraModel.Output(display_name="lora", tooltip="The LoRA itself, for core's Load LoRA Model."),
                io.String.Output(display_name="path", tooltip="The file in models/loras."),
                io.Image.Output(display_name="loss", tooltip="Loss, smoothed loss and held-out loss."),
                io.Image.Output(display_name="grid", tooltip="The validation prompts without and with the LoRA."),
                io.String.Output(
                    display_name="config", tooltip="The run as JSON, for python -m longcat_backend.training."
                ),
                io.String.Output(display_name="report", tooltip="What was trained, and where everything is."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None, **inputs: Any) -> bool | str:
        """A sentence for settings that cannot be trained with, before any model is loaded.

        None comes from another node.
        """
        try:
            if name is not None:
                saving.check_name(name)
            if None not in inputs.values():
                _settings(inputs)
        except LongCatError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, dataset: Any, name: str, **inputs: Any) -> io.NodeOutput:
        """Train, and show the grid on the node."""
        _refuse_unknown(cls.hidden, inputs)
        request = training_request.Request(
            name,
            _settings(inputs),
            inputs.get("validation_prompts", ""),
            inputs.get("validation_steps", 30),
            inputs.get("validation_guidance", 4.5),
            inputs.get("validation_seed", 0),
            inputs.get("if_begun", GO_ON) == START_OVER,
        )
        made = training.train(model, clip, vae, dataset, request)
        outputs = (made.model, made.lora, str(made.file), made.chart, made.grid, made.config, made.report)
        return io.NodeOutput(*outputs, ui=ui.PreviewImage(made.grid, cls=cls))


def _refuse_unknown(hidden: Any, inputs: dict[str, Any]) -> None:
    """ComfyUI leaves out a dynamic input whose value it does not know, as if it had not been set."""
    given = (hidden.prompt or {}).get(hidden.unique_id, {}).get("inputs", {})
    known = {"flow_shift": (*choices.FLOW_SHIFTS, FIXED), "offload": (NONE, GROUP_OFFLOAD)}
    for name, values in known.items():
        if name in given and not isinstance(inputs.get(name), dict):
            raise LongCatError(
                f"There is no {name} '{given[name]}'. Choose one of: {', '.join(values)}.",
                f"{name} 没有“{given[name]}”这一选项。请选择：{', '.join(values)}。",
            )


def _settings(inputs: dict[str, Any]) -> TrainSettings:
    """The run's settings from those inputs that were given.

    Raises:
        LongCatError: see :class:`TrainSettings` and :func:`training_request.base_precision`.
    """
    values = {name: inputs[name] for name in _PLAIN if name in inputs}
    values["base_precision"] = training_request.base_precision(inputs["base_precision"])
    shift, offload = inputs.get("flow_shift"), inputs.get("offload")
    if isinstance(shift, dict):
        values["flow_shift"] = shift["shift"] if shift["flow_shift"] == FIXED else shift["flow_shift"]
    if isinstance(offload, dict) and offload["offload"] == GROUP_OFFLOAD:
        values["offload"] = offload["level"]
        values["offload_blocks"] = offload["blocks_per_group"]
        values["offload_stream"] = offload["stream"]
    if "max_grad_norm" in inputs:
        values["clip"] = inputs["max_grad_norm"]
    if inputs.get("preservation_prompts", "").strip():
        values["preservation_prompts"] = tuple(prompt_grid.prompt_lines(inputs["preservation_prompts"]))
    return TrainSettings(alpha=inputs.get("alpha") or None, **values)


NODES = [LongCatTrainLora]
