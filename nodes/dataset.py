"""LongCatDataset."""

from dataclasses import fields
from typing import Any

from comfy_api.latest import io, ui

from ..longcat_backend.comfy_bridge import datasets
from ..longcat_backend.errors import LongCatError
from ..longcat_backend.training import buckets
from ..longcat_backend.training.dataset import MOST_HELD_OUT, MOST_REPEATS, DatasetSettings
from .loading import CATEGORY

FOLDER = "folder"
IMAGES = "images"

DatasetType = io.Custom("LONGCAT_DATASET")


def _source_input() -> io.DynamicCombo.Input:
    return io.DynamicCombo.Input(
        "source",
        options=[
            io.DynamicCombo.Option(
                FOLDER,
                [
                    io.String.Input(
                        "folder",
                        default="",
                        tooltip="A folder in ComfyUI's input folder, or below a place that the machine's owner listed "
                        "in LONGCAT_DATASET_ROOTS. Captions: .txt or .json files beside the pictures, or one table "
                        "metadata.jsonl, metadata.json or metadata.csv. Masks (white is learnt): same names in a "
                        "folder 'masks' in it.",
                    ),
                    io.String.Input(
                        "reference_folder",
                        default="",
                        optional=True,
                        tooltip="For an edit LoRA: the pictures before the edit, under the same names. Empty: a folder "
                        "'references' in the folder, if there is one.",
                    ),
                ],
            ),
            io.DynamicCombo.Option(
                IMAGES,
                [
                    io.Image.Input("images", tooltip="The pictures to learn."),
                    io.String.Input(
                        "captions",
                        multiline=True,
                        default="",
                        tooltip="One caption a line, in the order of the pictures, or one line for all of them.",
                    ),
                    io.Image.Input(
                        "references",
                        optional=True,
                        tooltip="For an edit LoRA: the pictures before the edit, in the same order.",
                    ),
                    io.Mask.Input(
                        "masks", optional=True, tooltip="1 where a picture is learnt: one for each picture, or for all."
                    ),
                ],
            ),
        ],
        tooltip="Where the pictures come from: files, or what is drawn or loaded in this graph.",
    )


def _settings_inputs() -> list[Any]:
    return [
        io.String.Input(
            "resolutions",
            default="1024",
            tooltip="Areas such as 1024 (1024x1024 pixels, each picture in the bucket nearest to its ratio), or sizes "
            "such as 1024x1024,1344x768. A picture is trained at each of the areas, and at the nearest of the sizes.",
        ),
        io.Combo.Input(
            "grid",
            options=[str(grid) for grid in buckets.GRIDS],
            default=str(buckets.GRIDS[0]),
            tooltip="Sides of buckets are multiples of this. 64: as LongCat-Image was trained. 16: the finest that the "
            "model can take; crops less, but few pictures share a bucket.",
        ),
        io.Int.Input(
            "repeats", default=1, min=1, max=MOST_REPEATS, tooltip="How often each picture comes in one epoch."
        ),
        io.String.Input(
            "trigger_word",
            default="",
            tooltip="A word for what is learnt. It goes in the place of {trigger} in a caption, else in front of the "
            "caption unless it is in there. A picture without a caption is trained with this word alone.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How often a picture is trained with the empty prompt, which guidance needs.",
        ),
        io.Float.Input(
            "held_out",
            default=0.0,
            min=0.0,
            max=MOST_HELD_OUT,
            step=0.01,
            tooltip="Share of the pictures that is never trained on and measures the progress, at least one of four. "
            "Which ones depends on their content alone.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="The CLIP of LongCatLoader, to find captions over 512 tokens; may be left open.",
        ),
    ]


class LongCatDataset(io.ComfyNode):
    """Pictures and captions to train on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="LongCatDataset",
            display_name="LongCat Dataset",
            category=CATEGORY,
            description="Pictures and captions for a LoRA: read with care, sorted into aspect buckets, and shown as "
            "they will be trained, with everything that is wrong with them.",
            search_aliases=["longcat training data", "dataset", "captions", "数据集", "训练集"],
            is_output_node=True,
            inputs=[_source_input(), *_settings_inputs()],
            outputs=[
                DatasetType.Output(display_name="dataset", tooltip="For LongCatTrainLora."),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip="Each picture as it is trained, with its bucket, its caption and what is wrong.",
                ),
                io.String.Output(
                    display_name="report", tooltip="Pictures in each bucket, and everything that was noticed."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, source: Any = None, **inputs: Any) -> bool | str:
        """Whether the settings make sense and the folders may be read; a sentence if not."""
        if not isinstance(source, dict):  # ComfyUI leaves out a dynamic input whose value it does not know
            return f"There is no such source. Choose {FOLDER} or {IMAGES}.\n没有这个来源。请选择 {FOLDER} 或 {IMAGES}。"
        try:
            folders = (source.get("folder"), source.get("reference_folder") or None)
            # None comes from another node, and is known only when that has run.
            datasets.check(_settings(source, inputs), [name for name in folders if name is not None])
        except LongCatError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, source: Any = None, **_: Any) -> str:
        """Read again only when a file of the folders changed."""
        if not isinstance(source, dict) or source["source"] != FOLDER:
            return IMAGES
        return datasets.fingerprint(source["folder"], source.get("reference_folder") or "")

    @classmethod
    def execute(cls, source: dict[str, Any], clip: Any = None, **inputs: Any) -> io.NodeOutput:
        """Read, and show the report on the node."""
        settings = _settings(source, inputs)
        if source["source"] == FOLDER:
            made = datasets.from_folder(settings, clip)
        else:
            references, masks = source.get("references"), source.get("masks")
            made = datasets.from_images(settings, source.get("images"), source["captions"], references, masks, clip)
        shown = {**ui.PreviewImage(made[1], cls=cls).as_dict(), **ui.PreviewText(made[2]).as_dict()}
        return io.NodeOutput(*made, ui=shown)


def _settings(source: dict[str, Any], inputs: dict[str, Any]) -> DatasetSettings:
    """What is not known yet, because it comes from another node, keeps its default."""
    given = {**source, **inputs}
    names = (each.name for each in fields(DatasetSettings))
    values = {name: given[name] for name in names if given.get(name) is not None}
    if "grid" in values:
        values["grid"] = int(values["grid"]) if str(values["grid"]).isdecimal() else 0
    return DatasetSettings.from_json(values)


NODES = [LongCatDataset]
