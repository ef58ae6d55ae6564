"""Seconds and memory of a LoRA step at full size, beside a plain diffusers + peft loop: python run.py bench training.

Needs a GPU with 40 GB for the rows without recomputation; every row that does not fit says so. Random weights of the
published sizes, random latents and embeddings, batch 1, rank 16 on the 100 attention layers (SimpleTuner's set).
Writes benchmarks/results/training.json after every row. ``--tiny --device cpu`` proves the program on LongCat-Tiny.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "training.json"
GIB = 2**30
TEXT_TOKENS = 512
WARM_UP = 4  # steps that are not counted: compilation, and kernels that are chosen
FULL = {"num_layers": 10, "num_single_layers": 20}
PACKAGES = ("torch", "diffusers", "peft", "accelerate", "optimum-quanto", "torchao")

NAMES = {"loop": "ours", "base_precision": "bf16", "compile": False, "offload": "none"}  # where a row says nothing
# Most important first, since time on a GPU may end. "plain" is diffusers + peft as their examples do it; "cap_gib" is
# all the memory that the row may have, as on a smaller card. The modulation table is on where nothing else is said.
ROWS: list[dict[str, Any]] = [
    {"loop": "plain", "checkpointing": "block"},
    {"checkpointing": "block", "compile": True},
    {"checkpointing": "block"},
    {"base_precision": "int8-quanto", "checkpointing": "block"},
    {"base_precision": "int8-quanto", "checkpointing": "block", "compile": True},
    {"checkpointing": "every-second", "compile": True},
    {"checkpointing": "none", "compile": True},
    {"checkpointing": "block", "modulation_table": False},
    {"checkpointing": "block", "cap_gib": 12},
    {"base_precision": "int8-quanto", "checkpointing": "block", "cap_gib": 8},
    {"checkpointing": "every-second", "cap_gib": 16},
    {"base_precision": "fp8-torchao", "checkpointing": "block", "compile": True},
    {"base_precision": "fp8-torchao", "checkpointing": "block"},
    {"loop": "plain", "checkpointing": "none"},
    {"checkpointing": "none"},
    {"checkpointing": "every-second"},
    {"base_precision": "int4-quanto", "checkpointing": "block"},
    {"checkpointing": "block", "offload": "block"},
    {"checkpointing": "block", "offload": "leaf"},
    {"base_precision": "int8-quanto", "checkpointing": "none"},
]


@dataclass(frozen=True)
class Picture:
    """One encoded picture of random numbers."""

    latent: torch.Tensor
    text: torch.Tensor
    empty: torch.Tensor
    reference: None = None
    mask: None = None


class Pictures:
    """A few of them, as the trainer takes them."""

    held_out: tuple[int, ...] = ()
    identity = "random"
    dropout = 0.1

    def __init__(self, size: int, width: int) -> None:
        self.examples = [
            Picture(torch.randn(16, size // 8, size // 8), *torch.randn(2, TEXT_TOKENS, width)) for _ in range(4)
        ]
        self.buckets = {(size, size): tuple(range(4))}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Picture:
        return self.examples[index]


class Bench:
    """What the rows share: the device, the sizes of the model, and how many steps are counted."""

    def __init__(self, tiny: bool, device: torch.device, steps: int) -> None:
        self.device = device
        self.steps = steps
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        demo = ROOT / "demo" / "LongCat-Tiny" / "transformer" / "config.json"
        self.config: dict[str, Any] = json.loads(demo.read_text(encoding="utf-8")) if tiny else FULL

    def transformer(self) -> Any:
        """Random weights, made on the device."""
        from diffusers import LongCatImageTransformer2DModel

        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return LongCatImageTransformer2DModel(**config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)

    def measure(self, row: Mapping[str, Any], size: int) -> dict[str, Any]:
        """Seconds of a step (median) and the peak of the device's memory, of one row."""
        torch.manual_seed(0)
        torch.compiler.reset()
        loop = plain_loop if row.get("loop") == "plain" else our_loop
        began = time.perf_counter()
        meter = Meter(self.device)
        loop(self, row, size, meter)
        return {**meter.result(), "total_s": round(time.perf_counter() - began, 1)}


class Meter:
    """The times of steps; memory before the counted steps (building the model left out) and in them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.warm_up: dict[str, float] = {}

    def start(self) -> None:
        """The model is there; what comes is the first step."""
        self._forget_peaks()
        self.last = time.perf_counter()

    def step(self) -> None:
        """A step has ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.last)
        if len(self.times) == WARM_UP:
            self.warm_up = self._peaks()
            self._forget_peaks()
        self.last = time.perf_counter()

    def result(self) -> dict[str, Any]:
        """The row's figures."""
        return {
            "s_per_step": round(statistics.median(self.times[WARM_UP:]), 4),
            "first_step_s": round(self.times[0], 2),
            **self._peaks(),
            **{f"warm_up_{name}": value for name, value in self.warm_up.items()},
        }

    def _peaks(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {
            "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        }

    def _forget_peaks(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def our_loop(bench: Bench, row: Mapping[str, Any], size: int, meter: Meter) -> None:
    """The pack's trainer."""
    from longcat_pack.longcat_backend import precision, quantisation
    from longcat_pack.longcat_backend.training import base, loop
    from longcat_pack.longcat_backend.training.settings import TrainSettings
    from longcat_pack.longcat_backend.transformer import VelocityModel

    settings = TrainSettings(
        steps=WARM_UP + bench.steps, targets="attention", save_every=0, validate_every=0, **settings_of(row)
    )
    transformer = bench.transformer()
    preset = precision.PRESETS[settings.base_precision]
    if preset.backend:
        quantisation.quantise(transformer, "transformer", preset)
        base.let_gradients_through(transformer)
    if settings.offload != "none" or "cap_gib" in row:
        transformer.to("cpu")
    data = Pictures(size, transformer.config.joint_attention_dim)
    events = loop.Events(on_step=lambda progress: meter.step())
    with tempfile.TemporaryDirectory() as folder, capped(row.get("cap_gib"), bench.device):
        meter.start()
        loop.train(VelocityModel(transformer), data, settings, Path(folder), events, bench.device)


def settings_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's training settings."""
    return {key: value for key, value in row.items() if key not in ("loop", "cap_gib")}


@contextmanager
def capped(gib: float | None, device: torch.device) -> Iterator[None]:
    """Let the process have that much of the device's memory, its cache included."""
    if gib is None or device.type != "cuda":
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(device).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def plain_loop(bench: Bench, row: Mapping[str, Any], size: int, meter: Meter) -> None:
    """A loop as in diffusers' examples: autocast, peft's adapters in fp32, AdamW, clipping."""
    from diffusers import LongCatImagePipeline
    from peft import LoraConfig
    from torch.nn.attention import SDPBackend, sdpa_kernel

    transformer = bench.transformer()
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    adapters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    if row["checkpointing"] == "block":
        transformer.enable_gradient_checkpointing()
    optimiser = torch.optim.AdamW(adapters, lr=1e-4)
    pictures = Pictures(size, transformer.config.joint_attention_dim)
    side = size // 16
    text_ids, image_ids = (ids.to(bench.device) for ids in position_ids(side))
    meter.start()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    autocast = torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.dtype is torch.bfloat16)
    for step in range(WARM_UP + bench.steps):
        picture = pictures[step % 4]
        clean = picture.latent[None].to(bench.device)
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(1, device=bench.device) + 1.15)
        noisy = (1 - sigma) * clean + sigma * noise
        tokens = LongCatImagePipeline._pack_latents(noisy, 1, 16, 2 * side, 2 * side).to(bench.dtype)
        target = LongCatImagePipeline._pack_latents(noise - clean, 1, 16, 2 * side, 2 * side)
        with sdpa_kernel(kernels), autocast:
            velocity = transformer(
                tokens,
                encoder_hidden_states=picture.text[None].to(bench.device, bench.dtype),
                timestep=sigma.to(bench.dtype),
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
            (velocity.float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        meter.step()


def position_ids(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of 512 text tokens and of a square picture of ``side`` tokens a side, as the pipeline makes them."""
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

    text = prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=TEXT_TOKENS)
    image = prepare_pos_ids(modality_id=1, type="image", start=(TEXT_TOKENS, TEXT_TOKENS), height=side, width=side)
    return text, image


def run_all(
    bench: Bench, sizes: list[int], rows: list[dict[str, Any]], write: Callable[[Any], None], end: float
) -> None:
    """Measure every row at every size; the table is written after each."""
    found: list[dict[str, Any]] = []
    for row in rows:
        for size in sizes:
            if time.perf_counter() > end:
                print(f"no time left for {row} at {size}", flush=True)
                continue
            ours = row.get("loop", "ours") == "ours"
            name = {**NAMES, "modulation_table": ours and row.get("base_precision") != "fp32", **row, "size": size}
            try:
                found.append({**name, **bench.measure(row, size)})
            except Exception as error:  # noqa: BLE001  (a row that fails is a result, and must not end the others)
                found.append({**name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"})
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
            print(json.dumps(found[-1]), flush=True)
            write(found)


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="LongCat-Tiny's sizes, at 128 px")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=10, help="steps that are counted")
    parser.add_argument("--sizes", type=int, nargs="*", default=[])
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="numbers of the rows to run (default: all)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after so many")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))  # how the tests load the pack
    device = torch.device(options.device)
    bench = Bench(options.tiny, device, options.steps)

    def write(rows: Any) -> None:
        report = {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({platform.machine()})",
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "settings": {"batch": 1, "rank": 16, "targets": "attention", "model": "tiny" if options.tiny else "full"},
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    sizes = options.sizes or ([128] if options.tiny else [1024, 512])
    rows = [ROWS[number] for number in options.rows] or ROWS
    run_all(bench, sizes, rows, write, time.perf_counter() + options.seconds)


if __name__ == "__main__":
    main()
