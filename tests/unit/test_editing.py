"""Sizes, template and positions of an edit, and what is refused with a reason."""

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edit_checkpoint
import pytest
import torch
from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import calculate_dimensions
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from longcat_pack.longcat_backend import checkpoints, editing, official, single_files, vision
from longcat_pack.longcat_backend.errors import LongCatError

SIDES = (1, 17, 512, 768, 1024, 1023, 1452, 1920, 4000, 6000)


@pytest.fixture(scope="module")
def demo(pack_dir: Path) -> Path:
    return pack_dir / "demo" / "LongCat-Tiny"


@pytest.fixture(scope="module")
def parts(comfy_dir: Path, demo: Path) -> tuple[Any, Any]:
    """CLIP and VAE of the text-to-image demo."""
    from longcat_pack.longcat_backend.comfy_bridge import files, loading, vae

    checkpoint = files.Place(folder=demo).open()
    return loading.load_encoder(checkpoint, "fp32"), vae.load(checkpoint)


@pytest.mark.parametrize("width", SIDES)
@pytest.mark.parametrize("height", SIDES)
def test_the_official_size_is_the_pipelines(width: int, height: int) -> None:
    expected = calculate_dimensions(1024 * 1024, width / height)
    if max(expected) > 4096:
        with pytest.raises(LongCatError, match=f"{width}x{height}.*Crop"):
            editing.canvas_size(width, height)
    else:
        assert editing.canvas_size(width, height) == expected


def test_a_known_size() -> None:
    assert editing.canvas_size(1452, 1920) == (896, 1184)
    assert editing.canvas_size(1, 1) == (1024, 1024)


def test_the_template_is_split_around_the_picture(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer", local_files_only=True)
    before, after = editing.split_template(tokenizer)
    assert tokenizer.decode(before).endswith("<|im_start|>user\n<|vision_start|>")
    assert tokenizer.decode(after) == "<|vision_end|>"


def test_a_tokenizer_without_pictures_is_refused(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer", local_files_only=True)
    tokenizer.convert_tokens_to_ids = lambda _: None
    with pytest.raises(LongCatError, match="does not know <|image_pad|>".replace("|", r"\|")):
        editing.split_template(tokenizer)


def test_positions_count_on_from_the_longer_side() -> None:
    assert editing.positions(2, 2, 3, 2).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_the_vision_tower_is_loaded_for_the_first_picture_and_stays_out_of_the_text_encoder(parts: Any) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge

    clip, vae = parts
    model = clip.cond_stage_model
    model.vision = None
    size = clip.patcher.model_size()
    clip_bridge.encode(clip, "a red circle")
    assert model.vision is None
    bridge.encode(clip, vae, torch.rand(1, 40, 40, 3), "red", "", (64, 64))
    first = model.vision
    bridge.encode(clip, vae, torch.rand(1, 40, 40, 3), "blue", "", (64, 64))
    assert model.vision is first
    assert not any("visual" in name or "tower" in name for name in model.state_dict())
    assert clip.patcher.model_size() == size


def test_a_batch_edits_each_picture(parts: Any) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge

    clip, vae = parts
    images = torch.rand(2, 48, 64, 3)
    positive, negative, latent, _ = bridge.encode(clip, vae, images, "red", "", (64, 48))
    assert latent["samples"].shape == (2, 16, 6, 8)
    for index in range(2):
        one = bridge.encode(clip, vae, images[index : index + 1], "red", "", (64, 48))
        assert torch.allclose(positive[0][0][index], one[0][0][0][0], atol=1e-5)
        assert torch.allclose(negative[0][0][index], one[1][0][0][0], atol=1e-5)
        assert torch.allclose(latent["samples"][index], one[2]["samples"][0], atol=1e-4)
    assert not torch.allclose(positive[0][0][0], positive[0][0][1], atol=1e-3)


def test_eight_bits_survive_the_way_to_the_pipelines_picture_and_alpha_is_left_out(comfy_dir: Path) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge

    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 4)
    (picture,) = bridge._pictures(values.float() / 255)
    assert picture.mode == "RGB"
    assert bytes(picture.tobytes()) == bytes(values[0, ..., :3].contiguous().numpy().tobytes())
    assert torch.equal(bridge._pixels(picture), values[0, ..., :3].float() / 255)
    (between,) = bridge._pictures(torch.tensor([100.6, -3.0, 300.0]).reshape(1, 1, 1, 3) / 255)
    assert between.getpixel((0, 0)) == (101, 0, 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda given: given.update(clip=None),
            "LongCatEditEncode needs the CLIP.*or CLIPLoader with type longcat_image",
        ),
        (lambda given: given.update(vae=None), "needs the VAE of LongCatLoader .* got nothing"),
        (lambda given: given.update(image=None), "needs a picture to edit"),
        (lambda given: given.update(image=torch.rand(0, 8, 8, 3)), "needs a picture to edit"),
        (lambda given: given.update(image=torch.rand(1, 8, 8, 1)), "needs a picture to edit"),
        (lambda given: given.update(image=[torch.rand(1, 8, 8, 3)] * 2), "There are 2 reference images"),
        (lambda given: given.update(size=(60, 64)), "width 60 is not a multiple of 16"),
        (lambda given: given.update(prompt="a <|image_pad|>"), "The prompt contains <.image_pad.>"),
    ],
)
def test_what_cannot_be_edited_is_refused(change: Callable[[Any], None], message: str, parts: Any) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge

    clip, vae = parts
    given = {"clip": clip, "vae": vae, "image": torch.rand(1, 32, 32, 3), "prompt": "red", "negative_prompt": ""}
    given["size"] = (32, 32)
    change(given)
    with pytest.raises(LongCatError, match=message) as raised:
        bridge.encode(**given)
    assert any("一" <= letter <= "鿿" for letter in raised.value.zh)


def test_another_models_vae_is_refused(parts: Any) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge

    class Other:
        latent_dim, latent_channels = 2, 4

    with pytest.raises(LongCatError, match="got one with 4 channels"):
        bridge.encode(parts[0], Other(), torch.rand(1, 32, 32, 3), "", "")  # type: ignore[arg-type]


def test_a_second_reference_is_refused_when_sampling(comfy_dir: Path) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge

    latent = torch.zeros(1, 16, 8, 8)
    plain, one = [{}], [{"reference_latents": [latent]}]
    bridge.require_one_reference(plain, one, None)
    with pytest.raises(LongCatError, match="2 reference images.*official pipeline takes one"):
        bridge.require_one_reference([{"reference_latents": [latent] * 2}], plain)


def test_pictures_in_a_node_of_another_model_are_not_left_out_silently(parts: Any) -> None:
    with pytest.raises(LongCatError, match="Use LongCatEditEncode"):
        parts[0].tokenize("red", images=[torch.rand(1, 8, 8, 3)])
    assert parts[0].tokenize("red", images=[])


def test_the_other_flavour_is_warned_of_once_per_encode(
    parts: Any, demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge
    from longcat_pack.longcat_backend.comfy_bridge import files, loading

    caplog.set_level(logging.WARNING)
    edit_clip = loading.load_encoder(files.Place(folder=edit_checkpoint.make(demo, tmp_path / "Edit")).open(), "fp32")
    clip_bridge.encode(parts[0], "a red circle")
    bridge.encode(edit_clip, parts[1], torch.rand(1, 32, 32, 3), "red", "", (32, 32))
    assert "checkpoint is" not in caplog.text
    bridge.encode(parts[0], parts[1], torch.rand(1, 32, 32, 3), "red", "", (32, 32))
    assert caplog.text.count("LongCatEditEncode: the checkpoint is LongCat-Image final") == 1
    clip_bridge.encode(edit_clip, "a red circle")
    assert caplog.text.count("LongCatTextEncode: the checkpoint is LongCat-Image edit") == 1


def test_an_instruction_gets_the_care_of_a_prompt(parts: Any, caplog: pytest.LogCaptureFixture) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge

    def edit(prompt: str, negative: str = "", normalise: bool = False) -> tuple[torch.Tensor, str, str]:
        caplog.clear()
        image = torch.full((1, 32, 32, 3), 0.5)
        positive, _, _, report = bridge.encode(*parts, image, prompt, negative, (32, 32), normalise)
        return positive[0][0], report, caplog.text

    caplog.set_level(logging.WARNING, "longcat_pack.longcat_backend.comfy_bridge.clip")
    for prompt, warning in (("在招牌上写「店」", "UNKNOWN QUOTES"), ("add a sign that says OPEN", "NOT QUOTED")):
        _, report, log = edit(prompt)
        assert warning in report and f"LongCatEditEncode: {warning}" in log
    _, report, log = edit('add a sign that says "OPEN"')
    assert 'character by character 引号文字（逐字编码）: "OPEN"' in report and "size 尺寸: 32x32" in report
    assert "QUOTE" not in log and "negative prompt" not in report
    _, report, log = edit("red " * 600, "blue " * 600)
    assert report.count("CUT") == 2 and "negative prompt 负面提示词" in report and log.count("CUT") == 2
    normalised, report, _ = edit("在招牌上写「店」", normalise=True)
    assert "在招牌上写“店”" in report
    assert torch.equal(normalised, edit("在招牌上写“店”")[0])


def test_a_checkpoint_without_tower_or_processor_is_refused(demo: Path, tmp_path: Path) -> None:
    folder = edit_checkpoint.make(demo, tmp_path / "Edit")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    save_file({key: value for key, value in weights.items() if "visual." not in key}, file)
    with pytest.raises(LongCatError, match="no vision tower"):
        vision.load_vision(checkpoints.open_checkpoint(folder), torch.float32)
    bad = {key: value[..., :1].contiguous() if "visual.patch" in key else value for key, value in weights.items()}
    save_file(bad, file)
    with pytest.raises(LongCatError, match="wrong shape.*patch_embed.proj.weight"):
        vision.load_vision(checkpoints.open_checkpoint(folder), torch.float32)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / "text_processor" / name).unlink()
    with pytest.raises(LongCatError, match="preprocessor_config.json' is missing"):
        vision.load_vision(checkpoints.open_checkpoint(folder), torch.float32)


def test_an_older_processor_config_gives_the_same_tokens(demo: Path, tmp_path: Path) -> None:
    picture = Image.linear_gradient("L").convert("RGB").resize((60, 90))
    folder = edit_checkpoint.make(demo, tmp_path / "Edit")
    first = vision.load_vision(checkpoints.open_checkpoint(folder), torch.float32).encode(picture)
    (folder / "text_processor" / "processor_config.json").unlink()
    second = vision.load_vision(checkpoints.open_checkpoint(folder), torch.float32).encode(picture)
    assert (first.rows, first.columns) == (3, 2)
    assert torch.equal(first.features, second.features)


def test_single_files_bring_their_tower_and_the_published_processor(demo: Path, tmp_path: Path) -> None:
    folder = checkpoints.open_checkpoint(demo)
    files = {}
    for part in single_files.PARTS:
        files[part] = tmp_path / f"{part}.safetensors"
        extra = {"pipeline": "LongCatImageEditPipeline"} if part == "transformer" else {}
        configs = {part: folder.configs[part]}
        save_file(folder.weights(part), files[part], metadata=single_files.metadata(configs, **extra))
    opened = single_files.open_single_files(files, demo / "tokenizer")
    assert opened.flavour.edits
    assert opened.processor_config() == official.PROCESSOR
    picture = Image.linear_gradient("L").convert("RGB").resize((56, 84))
    found = vision.load_vision(opened, torch.float32).encode(picture)
    expected = vision.load_vision(folder, torch.float32).encode(picture)
    assert torch.allclose(found.features, expected.features, atol=1e-6)


@pytest.mark.parametrize(("preset", "tolerance"), [("bf16", 0.03), ("fp8", 0.1), ("int8", 0.05), ("int8-quanto", 0.05)])
@torch.inference_mode()
def test_every_encoder_precision_edits(preset: str, tolerance: float, parts: Any, demo: Path) -> None:
    """The tower keeps the precision of the computation, whatever the decoder's weights are stored in."""
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge
    from longcat_pack.longcat_backend.comfy_bridge import files, loading

    image = torch.linspace(0, 1, 64 * 64 * 3).reshape(1, 64, 64, 3)
    expected = bridge.encode(*parts, image, "a red circle", "", (64, 64))[0][0][0]
    clip = loading.load_encoder(files.Place(folder=demo).open(), preset)
    found = bridge.encode(clip, parts[1], image, "a red circle", "", (64, 64))[0][0][0]
    assert float((found - expected).norm() / expected.norm()) <= tolerance
    assert {weight.dtype for weight in clip.cond_stage_model.vision.encoder.parameters()} == {
        clip.cond_stage_model.encoder.dtype
    }


def test_the_tower_goes_with_its_clip(parts: Any, demo: Path) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import editing as bridge
    from longcat_pack.longcat_backend.comfy_bridge import files, loading

    clip = loading.load_encoder(files.Place(folder=demo).open(), "fp32")
    bridge.encode(clip, parts[1], torch.rand(1, 32, 32, 3), "red", "", (32, 32))
    tower = weakref.ref(clip.cond_stage_model.vision.encoder.tower)
    assert tower() is not None
    del clip
    gc.collect()
    assert tower() is None
