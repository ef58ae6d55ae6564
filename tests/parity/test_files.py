"""Single files are listed beside folders, and the files of their other parts are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import single_files as files

from longcat_pack.longcat_backend.errors import LongCatError

KINDS = ("diffusion_models", "text_encoders", "vae")


@pytest.fixture
def models(comfy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty model folders of ComfyUI."""
    import folder_paths

    from longcat_pack.longcat_backend.comfy_bridge import host

    host.register_model_folder()
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors", ".pt"})
        )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def put(models: Path, *names: str) -> None:
    for name in names:
        path = models / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def found(name: str, *choices: str) -> dict[str, str]:
    from longcat_pack.longcat_backend.comfy_bridge import files as bridge

    return {part: path.name for part, path in bridge.find(name, *choices).files}


def test_longcat_files_are_listed_after_the_folders(models: Path) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import files as bridge

    put(models, "diffusion_models/longcat_image.safetensors", "diffusion_models/sub/LongCat-Dev.SAFETENSORS")
    put(
        models,
        "diffusion_models/flux.safetensors",
        "diffusion_models/longcat.pt",
        "diffusion_models/my_longcat.safetensors",
    )
    demos = ["LongCat-Tiny", "LongCat-Tiny-Edit", "LongCat-Tiny-Edit-Turbo"]
    assert bridge.names() == [*demos, "longcat_image.safetensors", "sub/LongCat-Dev.SAFETENSORS"]
    put(models, "text_encoders/b.safetensors", "text_encoders/a/c.safetensors")
    assert bridge.choices("text_encoder") == ["auto", "a/c.safetensors", "b.safetensors"]


def test_auto_takes_the_published_files(models: Path) -> None:
    put(models, "diffusion_models/longcat_image.safetensors", "vae/ae.safetensors", "vae/sdxl.safetensors")
    put(models, "text_encoders/Qwen_2.5_vl_7b_fp8_scaled.safetensors", "text_encoders/t5.safetensors")
    assert found("longcat_image.safetensors") == {
        "transformer": "longcat_image.safetensors",
        "text_encoder": "Qwen_2.5_vl_7b_fp8_scaled.safetensors",
        "vae": "ae.safetensors",
    }


def test_auto_takes_the_files_that_were_saved_together(models: Path) -> None:
    put(models, "diffusion_models/a/longcat_x.safetensors", "vae/a/longcat_x_vae.safetensors", "vae/ae.safetensors")
    put(models, "text_encoders/a/longcat_x_text_encoder.safetensors")
    put(models, "text_encoders/qwen_2.5_vl_7b.safetensors", "text_encoders/qwen_2.5_vl_7b_fp8.safetensors")
    expected = {
        "transformer": "longcat_x.safetensors",
        "text_encoder": "longcat_x_text_encoder.safetensors",
        "vae": "longcat_x_vae.safetensors",
    }
    assert found("a/longcat_x.safetensors") == found("a\\longcat_x.safetensors") == expected
    assert found("a/longcat_x.safetensors", "qwen_2.5_vl_7b.safetensors", "ae.safetensors") == {
        **expected,
        "text_encoder": "qwen_2.5_vl_7b.safetensors",
        "vae": "ae.safetensors",
    }


def test_none_or_several_are_an_error_that_names_them(models: Path) -> None:
    put(models, "diffusion_models/longcat_x.safetensors", "text_encoders/t5.safetensors", "vae/ae.safetensors")
    with pytest.raises(LongCatError, match=r"no file is called .*qwen_2\.5_vl_7b.*text_encoder_file.*t5\.safetensors"):
        found("longcat_x.safetensors")
    put(models, "text_encoders/qwen_2.5_vl_7b.safetensors", "vae/ae2.safetensors")
    with pytest.raises(LongCatError, match=r"2 files fit ae.*vae_file.*ae\.safetensors, ae2\.safetensors"):
        found("longcat_x.safetensors")
    assert found("longcat_x.safetensors", "auto", "ae2.safetensors")["vae"] == "ae2.safetensors"


@pytest.mark.parametrize("name", ["gone.safetensors", "../vae/ae.safetensors", "/etc/passwd", ""])
def test_only_listed_files_are_opened(name: str, models: Path) -> None:
    put(models, "diffusion_models/longcat_x.safetensors", "vae/ae.safetensors", "outside.safetensors")
    with pytest.raises(LongCatError, match="text_encoder_file"):
        found("longcat_x.safetensors", name)
    with pytest.raises(LongCatError, match="checkpoint"):
        found(name)


def test_a_place_opens_and_follows_its_files(models: Path, folder: Path) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import files as bridge

    paths = files.write(folder, models / "written", "longcat_y")
    paths["transformer"].rename(models / "diffusion_models" / "longcat_y.safetensors")
    paths["text_encoder"].rename(models / "text_encoders" / "longcat_y_text_encoder.safetensors")
    vae = paths["vae"].rename(models / "vae" / "longcat_y_vae.safetensors")
    place = bridge.find("longcat_y.safetensors")
    assert place.open().configs == bridge.find("LongCat-Tiny").open().configs
    before = place.fingerprint()
    assert before == bridge.find("longcat_y.safetensors").fingerprint()
    vae.write_bytes(vae.read_bytes() + b" ")
    assert place.fingerprint() != before
    assert bridge.find("LongCat-Tiny").fingerprint() not in (before, place.fingerprint())


def test_comfyuis_tokenizer_is_that_of_the_published_encoder(comfy_dir: Path) -> None:
    from transformers import AutoTokenizer

    from longcat_pack.longcat_backend import official
    from longcat_pack.longcat_backend.comfy_bridge import files as bridge

    tokenizer = AutoTokenizer.from_pretrained(bridge.tokenizer_folder(), local_files_only=True)
    config = official.TEXT_ENCODER
    assert len(tokenizer) <= config["vocab_size"]
    assert tokenizer.pad_token_id == config["bos_token_id"]
    names = ("vision_start", "vision_end", "image", "video")
    texts = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    assert [tokenizer.convert_tokens_to_ids(text) for text in texts] == [config[f"{name}_token_id"] for name in names]
