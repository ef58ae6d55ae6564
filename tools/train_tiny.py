"""Build and train LongCat-Tiny: `python -m tools.train_tiny train`, then `export` and `check`.

`train` does on one GPU whatever its work folder still lacks: the VAE first, then the DiT with the text encoder, from
random weights or with `--start` from those of a folder.
It stops after `--stop-after` seconds and picks up where it stopped when it is run again. `export` writes the official
folder layout. `check` lets diffusers' own pipeline draw the held-out prompts and scores them. `rewriting` teaches the
language model to write and keeps the embeddings that the DiT knows, `characters` makes it tell characters apart;
`train --freeze-text` trains the DiT beside both.
`edit` trains LongCat-Tiny-Edit from LongCat-Tiny, and `turbo` its variant of 8 steps. Run it from the repository root.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, LongCatImagePipeline
from safetensors.torch import load_file, save_file

from tools.tiny.characters_apart import COMMAND as CHARACTERS
from tools.tiny.characters_apart import add_command as add_characters
from tools.tiny.characters_apart import run as run_characters
from tools.tiny.check import check_folder, write_sheet
from tools.tiny.checkpoint import build_pipeline, load_pipeline, save_pipeline
from tools.tiny.edit_run import COMMANDS as EDIT_COMMANDS
from tools.tiny.edit_run import add_commands as add_edit_commands
from tools.tiny.edit_run import run as run_edit
from tools.tiny.examples import Sizes, prepare_examples
from tools.tiny.flow import FlowSettings, FlowTrainer, Phase
from tools.tiny.pictures import VaePictures, free_masks, ink_masks, placement_masks
from tools.tiny.rewriting_run import COMMAND as REWRITING
from tools.tiny.rewriting_run import add_command as add_rewriting
from tools.tiny.rewriting_run import run as run_rewriting
from tools.tiny.vae import VaeSettings, measure, train_vae

JITTERS = 16
FREE_MASKS = 2000


class Log:
    """Prints, and appends to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def save_state(trainer: FlowTrainer, folder: Path) -> None:
    """Write what resuming needs: fp32 weights, in bf16 Adam's squared gradients, and averages as they are exported."""
    names = list(trainer.named)
    parts = {"weights": trainer.parameters, "average": trainer.average, "moments": trainer.second_moments()}
    for part, tensors in parts.items():
        state = {}
        for name, tensor in zip(names, tensors, strict=True):
            short = part == "moments" or (part == "average" and name.startswith("transformer."))
            dtype = torch.bfloat16 if short else torch.float32
            state[name] = tensor.detach().to("cpu", dtype).contiguous()
        save_file(state, folder / f"{part}.safetensors", metadata={"step": str(trainer.step)})
    (folder / "step.json").write_text(json.dumps({"step": trainer.step}))


def load_state(trainer: FlowTrainer, folder: Path) -> None:
    """Continue from what `save_state` wrote."""
    names = list(trainer.named)
    weights, average, moments = (load_file(folder / f"{p}.safetensors") for p in ("weights", "average", "moments"))
    trainer.step = json.loads((folder / "step.json").read_text())["step"]
    with torch.no_grad():
        for index, name in enumerate(names):
            trainer.parameters[index].copy_(weights[name])
            trainer.average[index].copy_(average[name])
    trainer.load_moments([moments[name] for name in names], trainer.step)


def start_pipeline(args: argparse.Namespace) -> LongCatImagePipeline:
    """The pipeline that training starts from, fp32 on the CPU."""
    return load_pipeline(args.start) if args.start else build_pipeline(args.seed)


def prepare_vae(
    pipeline: LongCatImagePipeline,
    masks: torch.Tensor,
    inks: torch.Tensor,
    args: argparse.Namespace,
    log: Log,
    device: torch.device,
) -> None:
    """Load the work folder's VAE, or train and save it (bf16, as it ships)."""
    folder = args.work / "vae"
    if not folder.exists():
        settings = VaeSettings(
            steps=args.vae_steps,
            batch=args.vae_batch,
            learning_rate=args.vae_learning_rate,
            compile=args.compile and args.vae_compile,
            seconds=args.vae_seconds,
        )
        log(f"seed {args.seed} {settings}")
        torch.manual_seed(args.seed)
        pictures = VaePictures(masks, inks, free_masks(args.free_masks), device)
        train_vae(pipeline.vae.to(device), pictures, settings, log)
        pipeline.vae.to(torch.bfloat16).float()
        psnr = measure(pipeline.vae, pictures.batch(4 * args.vae_batch))
        config = pipeline.vae.config
        log(f"vae psnr {psnr:.2f} dB scaling {config.scaling_factor} shift {config.shift_factor}")
        pipeline.vae.to(torch.bfloat16).save_pretrained(folder)
    pipeline.vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(device)


def flow_settings(args: argparse.Namespace) -> FlowSettings:
    """The command line's phases in a FlowSettings."""
    return FlowSettings(
        phases=tuple(args.phase),
        learning_rate=args.learning_rate,
        score_prompts=args.score_prompts,
        compile=args.compile,
        freeze_text=args.freeze_text,
    )


def train(args: argparse.Namespace) -> None:
    """Do what the work folder lacks, until done or out of time."""
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails at these shapes
    log = Log(args.work / "train.log")
    masks, inks = placement_masks(args.jitters), ink_masks(args.jitters)
    pipeline = start_pipeline(args)
    log(f"{time.monotonic() - started:.0f} s: masks and pipeline ready")
    prepare_vae(pipeline, masks, inks, args, log, device)
    pipeline.to(device)
    settings = flow_settings(args)
    sizes = Sizes(args.captions, args.character_captions, args.character_pictures, args.scene_limit)
    examples = prepare_examples(pipeline, masks, inks, sizes)
    log(f"{time.monotonic() - started:.0f} s: {sizes}")
    trainer = FlowTrainer(pipeline, examples, settings, args.seed)
    if (args.work / "step.json").exists():
        load_state(trainer, args.work)
    log(f"{time.monotonic() - started:.0f} s: from step {trainer.step}, latents {tuple(examples.latents.shape)}")
    log(str(settings))
    done = trainer.train(started + args.stop_after, log, args.log_every, args.score_every)
    save_state(trainer, args.work)
    write_sheet(trainer.draw(args.score_prompts)[0], args.work / "samples.png")
    log(f"{time.monotonic() - started:.0f} s: step {trainer.step}, {'finished' if done else 'stopped'}")


def export(args: argparse.Namespace) -> None:
    """Write the work folder's averaged weights in the official layout."""
    pipeline = start_pipeline(args)
    pipeline.vae = AutoencoderKL.from_pretrained(args.work / "vae", torch_dtype=torch.float32)
    average = load_file(args.work / "average.safetensors")
    for component in ("transformer", "text_encoder"):
        own = {name.removeprefix(component + "."): t for name, t in average.items() if name.startswith(component)}
        missing, unexpected = getattr(pipeline, component).load_state_dict(own, strict=False)
        untrained = [n for n in missing if own and not n.startswith(("model.visual.", "lm_head."))]
        if unexpected or untrained:
            raise ValueError(f"{component}: not in the work folder {untrained}, not in the model {unexpected}")
    save_pipeline(pipeline, args.folder)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("train")
    run.add_argument("--phase", nargs="*", type=Phase.parse, default=FlowSettings.phases, help=Phase.parse.__doc__)
    run.add_argument("--stop-after", type=float, default=3600.0, help="seconds")
    run.add_argument("--vae-steps", type=int, default=VaeSettings.steps)
    run.add_argument("--vae-batch", type=int, default=VaeSettings.batch)
    run.add_argument("--vae-learning-rate", type=float, default=VaeSettings.learning_rate)
    run.add_argument("--vae-compile", action=argparse.BooleanOptionalAction, default=True)
    run.add_argument("--vae-seconds", type=float, default=VaeSettings.seconds)
    run.add_argument("--learning-rate", type=float, default=FlowSettings.learning_rate)
    run.add_argument("--captions", type=int, default=Sizes.captions, help="a scene and language")
    run.add_argument("--character-captions", type=int, default=Sizes.character_captions, help="likewise, a character")
    run.add_argument("--character-pictures", type=int, default=Sizes.character_pictures, help="a scene and character")
    run.add_argument("--freeze-text", action="store_true", help="leave the text encoder as --start has it")
    run.add_argument("--score-prompts", type=int, default=FlowSettings.score_prompts, help="a language")
    run.add_argument("--jitters", type=int, default=JITTERS)
    run.add_argument("--free-masks", type=int, default=FREE_MASKS)
    run.add_argument("--scene-limit", type=int, default=None, help="fewer scenes, to try the program out")
    run.add_argument("--log-every", type=int, default=500)
    run.add_argument("--score-every", type=int, default=2000)
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    write = commands.add_parser("export")
    write.add_argument("--folder", type=Path, default=Path("demo/LongCat-Tiny"))
    for command in (run, write):
        command.add_argument("--work", type=Path, required=True, help="folder of the VAE and the training state")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--start", type=Path, default=None, help="folder of the weights to start from")
    judge = commands.add_parser("check")
    judge.add_argument("--folder", type=Path, default=Path("demo/LongCat-Tiny"))
    judge.add_argument("--per-language", type=int, default=100)
    judge.add_argument("--stock-positions", action="store_true", help="leave the text positions to transformers")
    judge.add_argument("--at-once", action="store_true", help="draw all prompts of a kind together, from one seed")
    judge.add_argument("--pictures", type=Path, default=None, help="write the drawn pictures as one PNG")
    add_edit_commands(commands)
    add_rewriting(commands)
    add_characters(commands)
    return parser.parse_args()


def main() -> None:
    """Run one command."""
    args = parse_arguments()
    if args.command == "train":
        train(args)
    elif args.command == "export":
        export(args)
    elif args.command in EDIT_COMMANDS:
        run_edit(args)
    elif args.command == REWRITING:
        run_rewriting(args)
    elif args.command == CHARACTERS:
        run_characters(args)
    else:
        check_folder(args.folder, args.per_language, args.stock_positions, args.pictures, args.at_once)


if __name__ == "__main__":
    main()
