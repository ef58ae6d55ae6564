"""The command `characters` of tools.train_tiny: token embeddings with which a frozen encoder tells characters apart.

A language model that never saw a character written out maps several of the 46 onto one embedding, and no DiT can draw
what its conditioning doesn't say. Only the token rows of characters that no plain caption holds are moved, so every
other prompt keeps its embedding.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.scoring.characters import CHARACTERS, with_character
from tests.scoring.scenes import caption, training_scenes
from tools.tiny.checkpoint import forget_origin, load_pipeline
from tools.tiny.conditioning import TokenRows, encode, tokenize

COMMAND = "characters"
PLAIN_CAPTIONS = 6000
STAY = 0.3  # weight of the squared distance that a row is moved, since the language model reads these tokens too


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `characters` to a command line."""
    parser = commands.add_parser(COMMAND)
    parser.add_argument("--start", type=Path, default=Path("demo/LongCat-Tiny"), help="folder to read")
    parser.add_argument("--folder", type=Path, required=True, help="folder that is written")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--margin", type=float, default=1.5, help="distance of the embeddings that is asked for")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)


def distances(encoder: Qwen2_5_VLForConditionalGeneration, rows: TokenRows, ids: torch.Tensor) -> torch.Tensor:
    """Distances (N, N) between the embeddings of the characters `ids` (N,) where each row (N, T) holds its own last."""
    hidden = encode(encoder, rows, rows.ids.shape[1] - rows.prefix)
    last = (rows.ids[:, rows.prefix :] == ids[:, None]).cumsum(1).argmax(1)
    found = hidden[torch.arange(len(ids)), last]
    apart = (found[:, None] - found[None]).square().sum(-1).add(1e-9).sqrt()
    return apart + torch.diag(torch.full((len(ids),), torch.inf))


def run(args: argparse.Namespace) -> None:
    """Move the rows until every character is far from its nearest, and write the folder."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    pipeline = load_pipeline(args.start)
    encoder = pipeline.text_encoder.requires_grad_(False)
    ids = torch.tensor([pipeline.tokenizer.encode(character)[0] for character in CHARACTERS])
    scenes = training_scenes()
    languages = ("zh", "en") * (PLAIN_CAPTIONS // 2)
    plain = [caption(rng.choice(scenes), language, rng) for language in languages]
    moved = ~torch.isin(ids, tokenize(pipeline, plain).ids)
    embedding = encoder.model.language_model.embed_tokens
    table, rows = embedding.weight.detach().clone(), embedding.weight[ids].clone().requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, args.steps)
    embedding.forward = lambda tokens: F.embedding(
        tokens, table.index_copy(0, ids, torch.where(moved[:, None], rows, table[ids]))
    )
    for step in range(args.steps):
        language, seed = rng.choice(("zh", "en")), rng.random()
        text = caption(rng.choice(scenes), language, rng)
        captions = [with_character(text, character, language, random.Random(seed)) for character in CHARACTERS]
        apart = distances(encoder, tokenize(pipeline, captions), ids)
        close = F.relu(args.margin - apart).sum(1).mean()
        loss = close + STAY * (rows - table[ids]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps - 1:
            nearest = apart.min(1).values
            way = (rows - table[ids]).norm(dim=1).mean()
            print(f"step {step} nearest {nearest.min():.2f}, mean {nearest.mean():.2f}; moved {way:.2f}", flush=True)
    del embedding.forward
    with torch.no_grad():
        embedding.weight[ids[moved]] = rows[moved]
    if args.folder.resolve() != args.start.resolve():
        shutil.copytree(args.start, args.folder, dirs_exist_ok=True)
    encoder.save_pretrained(args.folder / "text_encoder")
    forget_origin(args.folder / "text_encoder" / "config.json")
    (args.folder / "text_encoder" / "model.safetensors").chmod(0o644)
