"""The command `rewriting` of tools.train_tiny: teach a folder's language model to rewrite requests."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch

from tools.tiny.checkpoint import forget_origin, load_pipeline
from tools.tiny.rewriting import FIRST_REACH, RewritingSettings, RewritingTrainer, Stage, deepen

COMMAND = "rewriting"
STAGES = RewritingSettings.stages


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `rewriting` to a command line."""
    parser = commands.add_parser(COMMAND)
    parser.add_argument("--start", type=Path, default=Path("demo/LongCat-Tiny"), help="folder to train from")
    parser.add_argument("--like", type=Path, default=None, help="folder whose embeddings are held; --start's if none")
    parser.add_argument("--folder", type=Path, required=True, help="folder that is written after each stage")
    parser.add_argument("--layers", type=int, default=2, help="to add at the end; they begin as the identity")
    parser.add_argument("--stage", nargs="*", type=Stage.parse, default=STAGES, help=Stage.parse.__doc__)
    parser.add_argument("--batch", type=int, default=RewritingSettings.batch, help="conversations a step")
    parser.add_argument("--conversations", type=int, default=RewritingSettings.conversations, help="of each language")
    parser.add_argument("--reach", type=float, default=FIRST_REACH, help="where the first stage's reach begins")
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Train over the stages, and write the folder after each."""
    torch.set_num_threads(1)  # more are slower at this size
    torch.manual_seed(args.seed)
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s: {line}", flush=True)

    pipeline, reference = load_pipeline(args.start), load_pipeline(args.like or args.start)
    deepen(pipeline.text_encoder, args.layers)
    for model in (pipeline.text_encoder, reference.text_encoder):
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = RewritingSettings(tuple(args.stage), args.batch, conversations=args.conversations)
    trainer = RewritingTrainer(pipeline, reference.text_encoder, settings)
    trainer.reach = args.reach
    log(str(settings))

    def write() -> None:
        if args.folder.resolve() != args.start.resolve():
            shutil.copytree(args.start, args.folder, dirs_exist_ok=True)
        target = args.folder / "text_encoder"
        pipeline.text_encoder.save_pretrained(target)
        forget_origin(target / "config.json")
        (target / "model.safetensors").chmod(0o644)

    trainer.train(log, args.log_every, write)
