"""The exception that the user reads."""

from pathlib import Path

import pytest
import torch

from longcat_pack.longcat_backend.errors import LongCatError


def test_the_text_is_english_then_chinese() -> None:
    error = LongCatError("The file is gone. Download it again.", "文件不见了。请重新下载。")
    assert str(error) == "The file is gone. Download it again.\n文件不见了。请重新下载。"
    assert (error.en, error.zh) == tuple(str(error).split("\n"))
    assert isinstance(error, ValueError)


def test_a_loader_that_brought_nothing_is_named(comfy_dir: Path) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import clip, formats, vae

    with pytest.raises(
        LongCatError, match="LongCatTextEncode needs the CLIP of LongCatLoader, but got one with nothing"
    ):
        clip.encode(None, "")
    with pytest.raises(LongCatError, match="the MODEL is nothing"):
        formats.scheduler_config(None)
    with pytest.raises(LongCatError, match="There is no VAE"):
        vae.decode(None, torch.zeros(1, 16, 8, 8), False)
