"""LongCatLoader."""

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..longcat_backend import precision
from ..longcat_backend.comfy_bridge import auto, downloading, files, loading
from ..longcat_backend.comfy_bridge.report import report
from ..longcat_backend.errors import LongCatError
from ..longcat_backend.memory import GroupOffload

CATEGORY = "LongCat-Image"


GROUP_OFFLOAD = "group offload"
MODEL_PRECISION = (
    "Number format of the transformer. auto: the exact one that this device computes in best (bf16 on recent GPUs). "
    "fp8, int8: half the memory, computed in 8 bits (engine core). int8-quanto, int4-quanto: less memory, slower; "
    "fp8-torchao: computed in fp8 (engine diffusers). A checkpoint that was saved in one of these three keeps it."
)
ENCODER_PRECISION = (
    "Number format of the text encoder. auto: bf16, or fp32 on a device without it. fp8, int8, int8-quanto: half "
    "the memory; each weight is unpacked when it is used. A checkpoint that was saved in int8-quanto keeps it."
)


def _precision_input(name: str, choices: Sequence[str], tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(name, options=[precision.AUTO, *choices], default=precision.AUTO, tooltip=tooltip)


def _engine_input() -> io.DynamicCombo.Input:
    choices = {precision.AUTO: tuple(precision.PRESETS), **precision.ENGINE_PRESETS}
    return io.DynamicCombo.Input(
        "engine",
        options=[
            io.DynamicCombo.Option(name, [_precision_input("precision", names, MODEL_PRECISION)])
            for name, names in choices.items()
        ],
        tooltip="Who runs the transformer. core: ComfyUI's own class, with its block patches. diffusers: "
        "the reference implementation. auto: core, unless the precision or offload belongs to diffusers.",
    )


def _offload_input() -> io.DynamicCombo.Input:
    return io.DynamicCombo.Input(
        "offload",
        options=[
            io.DynamicCombo.Option(precision.AUTO, []),
            io.DynamicCombo.Option(
                GROUP_OFFLOAD,
                [
                    io.Combo.Input(
                        "level",
                        options=["block", "leaf"],
                        tooltip="What comes to the GPU at a time: blocks of the transformer, or single layers.",
                    ),
                    io.Int.Input(
                        "blocks_per_group",
                        default=1,
                        min=1,
                        max=30,
                        tooltip="Blocks that come at a time, at level block and without stream.",
                    ),
                    io.Boolean.Input(
                        "stream", default=True, tooltip="Copy the next group while this one computes (CUDA)."
                    ),
                    io.Combo.Input(
                        "host_memory",
                        options=["pinned", "low", "disk"],
                        tooltip="Where the weights wait. pinned: page-locked memory, fastest. low: ordinary memory. "
                        "disk: files in ComfyUI's temp folder.",
                    ),
                ],
            ),
        ],
        tooltip="How the transformer gets by with less GPU memory than it has weights. auto: ComfyUI keeps as much on "
        "the GPU as fits and streams the rest. group offload: diffusers' own, for the diffusers engine.",
        optional=True,
    )


def _file_input(name: str, part: str, pattern: str, folder: str) -> io.Combo.Input:
    return io.Combo.Input(
        name,
        options=files.choices(part),
        default=files.AUTO,
        optional=True,
        tooltip=f"Only where checkpoint is a single file: the file in models/{folder} that goes with it. auto: the one "
        f"that LongCatSaveCheckpoint wrote with it, else the only one called {pattern}.",
    )


class LongCatLoader(io.ComfyNode):
    """A folder or single files to MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatLoader",
            display_name="LongCat Loader",
            category=CATEGORY,
            description="Loads a LongCat-Image folder in the official layout, from models/longcat_image or "
            "models/diffusers, or ComfyUI's single files. Every part is built from its own config and every weight is "
            "checked.",
            search_aliases=["longcat", "longcat image", "meituan", "美团", "龙猫"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=downloading.choices(),
                    tooltip="A checkpoint folder, or a longcat….safetensors of models/diffusion_models. Demo "
                    "checkpoints that come with the pack are listed too. Official checkpoints that are not there yet "
                    "come last, see download_missing.",
                ),
                _engine_input(),
                _precision_input("text_encoder_precision", precision.ENCODER_PRESETS, ENCODER_PRECISION),
                _offload_input(),
                io.Boolean.Input(
                    "modulation_table",
                    default=True,
                    optional=True,
                    tooltip="Keep the 27 % of the transformer that depend on the noise level alone on the CPU, behind "
                    "a table of their results. Changes no bit of the picture, and saves 3.2 GiB of GPU memory.",
                ),
                _file_input("text_encoder_file", "text_encoder", "qwen_2.5_vl_7b*", "text_encoders"),
                _file_input("vae_file", "vae", "ae*.safetensors", "vae"),
                io.Boolean.Input(
                    "download_missing",
                    default=False,
                    optional=True,
                    tooltip="Where checkpoint is an official one that is not there: download it into "
                    "models/longcat_image now (about 29 GB), from huggingface.co or HF_ENDPOINT. It goes on where it "
                    "stopped. Off: nothing is downloaded.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer, for every node that takes a MODEL."),
                io.Clip.Output(tooltip="The text encoder and tokenizer."),
                io.Vae.Output(tooltip="Turns pictures into latents and back."),
                io.String.Output(
                    display_name="report",
                    tooltip="Where each part lives, its format and size, and the estimated peak for some sizes.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        checkpoint: str | None,
        engine: Any = None,
        offload: Any = None,
        text_encoder_precision: str | None = precision.AUTO,
        text_encoder_file: str | None = files.AUTO,
        vae_file: str | None = files.AUTO,
        download_missing: bool | None = False,
    ) -> bool | str:
        """Whether the settings make sense and the names stand for what can be loaded; a sentence if not."""
        if not isinstance(engine, dict):  # ComfyUI leaves out a dynamic input whose value it does not know
            known = ", ".join((precision.AUTO, *loading.ENGINES))
            return f"There is no such engine. Choose one of: {known}.\n没有这个引擎。请选择：{known}。"
        try:
            group = _group_offload(offload)
            auto.engine(engine["engine"], engine["precision"], group)
            # None comes from another node, and is known only when that has run; or it is part of a dynamic input.
            choices = (engine["engine"], engine["precision"], text_encoder_precision, group)
            if text_encoder_precision not in (precision.AUTO, None):
                precision.preset(text_encoder_precision, precision.ENCODER_PRESETS)
            named = checkpoint is not None and text_encoder_file is not None and vae_file is not None
            if named and not downloading.awaits(str(checkpoint), download_missing is not False):
                loading.check(str(checkpoint), *choices, str(text_encoder_file), str(vae_file))
        except LongCatError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, checkpoint: str, text_encoder_file: str = files.AUTO, vae_file: str = files.AUTO, **_: Any
    ) -> str | float:
        """Load again only when a file of the checkpoint changed."""
        if downloading.awaits(checkpoint, allowed=True):
            return float("nan")  # unlike itself: what a run downloads is never taken from ComfyUI's cache
        return files.find(checkpoint, text_encoder_file, vae_file).fingerprint()

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        engine: dict[str, str],
        text_encoder_precision: str,
        offload: dict[str, Any] | None = None,
        modulation_table: bool = True,
        text_encoder_file: str = files.AUTO,
        vae_file: str = files.AUTO,
        download_missing: bool = False,
    ) -> io.NodeOutput:
        """Load the three parts, downloaded before where that is asked for."""
        if offload is None:
            _refuse_unknown_offload(cls.hidden)
        downloading.provide(checkpoint, download_missing)
        parts = loading.load(
            checkpoint,
            engine["engine"],
            engine["precision"],
            text_encoder_precision,
            modulation_table,
            _group_offload(offload),
            text_encoder_file,
            vae_file,
        )
        revision = downloading.revision(checkpoint)
        return io.NodeOutput(*parts, "\n".join(filter(None, (revision, report(*parts)))))


def _refuse_unknown_offload(hidden: Any) -> None:
    """ComfyUI leaves out a dynamic input whose value it does not know, as if it had not been set."""
    node = (hidden.prompt or {}).get(hidden.unique_id, {})
    given = node.get("inputs", {}).get("offload", precision.AUTO)
    if given != precision.AUTO:
        raise LongCatError(
            f"There is no offload '{given}'. Choose {precision.AUTO} or {GROUP_OFFLOAD}.",
            f"没有卸载方式“{given}”。请选择 {precision.AUTO} 或 {GROUP_OFFLOAD}。",
        )


def _group_offload(offload: dict[str, Any] | None) -> GroupOffload | None:
    if not isinstance(offload, dict) or offload["offload"] == precision.AUTO:
        return None
    settings = GroupOffload(offload["level"], offload["blocks_per_group"], offload["stream"], offload["host_memory"])
    settings.check()
    return settings


NODES = [LongCatLoader]
