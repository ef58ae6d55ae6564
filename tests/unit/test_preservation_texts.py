"""What the help pages and READMEs say of preservation is what the trainer does."""

from pathlib import Path

import pytest
import torch

from longcat_pack.longcat_backend import latents
from longcat_pack.longcat_backend.training import preservation, sources
from longcat_pack.longcat_backend.training.settings import TrainSettings

STEPS, FEWEST = preservation.STEPS, preservation.FEWEST
WEIGHT = f"{TrainSettings().preservation_weight:g}"
FOLDER = f"`{sources.PRESERVED}`"
# What is kept of a point is the noisy latent and the velocity.
MIB = 2 * latents.empty_latent(1024, 1024, 1).numel() * torch.bfloat16.itemsize / 2**20

TRAINER = {
    "en": (
        f"({WEIGHT}; 0: off)",
        f"{STEPS} steps each and at least {FEWEST} drawings",
        f"{STEPS * FEWEST} forwards or more and {MIB:g} MiB each in the cache at 1024x1024 in bf16",
        FOLDER,
    ),
    "zh": (
        f"（默认 {WEIGHT}，0 为关闭）",
        f"每次 {STEPS} 步，总共至少 {FEWEST} 次",
        f"{STEPS * FEWEST} 次或更多前向计算，每次在缓存中占 {MIB:g} MiB（1024x1024，bf16）",
        FOLDER,
    ),
}
DATASET = {"en": (f"(only with source `folder`): a folder {FOLDER}",), "zh": ("（仅限来源 `folder`）", FOLDER)}
README = {
    "README.md": ("*preservation_weight* says how strongly (0: off)", f"{FEWEST} times {STEPS} steps", FOLDER),
    "README.zh.md": ("力度由“保留权重”决定（0 为关闭）", f"至少绘制 {FEWEST} 次、每次 {STEPS} 步", FOLDER),
}
PAGES = {
    **{f"web/docs/LongCatTrainLora/{language}.md": facts for language, facts in TRAINER.items()},
    **{f"web/docs/LongCatDataset/{language}.md": facts for language, facts in DATASET.items()},
    **README,
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_how_preservation_works(page: str, pack_dir: Path) -> None:
    text = (pack_dir / page).read_text(encoding="utf-8")
    wrapped = "" if page.endswith("zh.md") else " "  # how a line goes on in the next one
    text = wrapped.join(line.strip() for line in text.splitlines())
    assert [fact for fact in PAGES[page] if fact not in text] == []


def test_a_weight_of_zero_is_off() -> None:
    assert TrainSettings(preservation_prompts=("a star",)).preserves
    assert not TrainSettings(preservation_prompts=("a star",), preservation_weight=0.0).preserves
    assert not TrainSettings().preserves
