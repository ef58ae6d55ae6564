"""A LoRA of any dialect gives the picture of merged weights, on every engine and precision, and leaves no trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_loras import DIALECTS, Changes, foreign, linear_shapes
from safetensors.torch import load_file, save_file

from longcat_pack.longcat_backend import checkpoints, lora, lora_files, transformer
from longcat_pack.longcat_backend.checkpoints import Checkpoint
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.memory import GroupOffload

MOST = 1e-4
STRENGTH = 0.7
# Engine, precision, whether there is a modulation table.
EXACT = [("core", "fp32", True), ("core", "fp32", False), ("diffusers", "fp32", True), ("diffusers", "fp32", False)]
BESIDE = ("diffusers", "int8-quanto", True)
GROUPS = ("diffusers", "group offload", True)
ALL = [
    *EXACT,
    BESIDE,
    ("diffusers", "int8-quanto", False),
    ("diffusers", "int4-quanto", True),
    ("core", "int8", True),
    ("core", "fp8", True),
    GROUPS,
]

Kind = tuple[str, str, bool]


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """LongCat-Tiny with fewer blocks and random weights, modulation and biases included."""
    target = tmp_path_factory.mktemp("checkpoint") / "random"
    shutil.copytree(folder, target)
    place = target / "transformer" / "config.json"
    config = {**json.loads(place.read_text("utf-8")), "num_layers": 1, "num_single_layers": 2}
    place.write_text(json.dumps(config), "utf-8")
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(value.shape, generator=generator) * 0.1
        for key, value in transformer.empty_transformer(config).state_dict().items()
    }
    save_file(weights, target / "transformer" / "diffusion_pytorch_model.safetensors")
    return checkpoints.open_checkpoint(target)


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> Any:
    """The reference: diffusers' transformer with ordinary weights."""
    return transformer.load_transformer(checkpoint, torch.float32)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, comfy_dir: Path) -> Callable[[Kind], Any]:
    """A MODEL of a kind, loaded once; LoRAs go on clones."""
    from longcat_pack.longcat_backend.comfy_bridge import loading

    models: dict[Kind, Any] = {}

    def load(kind: Kind) -> Any:
        engine, precision, tabulate = kind
        if kind not in models:
            offload = GroupOffload("leaf", stream=False, host="low") if precision == "group offload" else None
            name = "fp32" if offload else precision
            # As in a node; and the group offload itself does not work on a CPU.
            with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(GroupOffload, "apply", lambda *args: None)
                models[kind] = loading.load_model(checkpoint, engine, name, tabulate, offload)
        return models[kind]

    return load


@pytest.fixture(scope="module")
def inputs(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = checkpoint.configs["transformer"]["joint_attention_dim"]
    return torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 20, width, generator=generator)


@pytest.fixture
def velocity(inputs: Any) -> Callable[[Any], torch.Tensor]:
    """What a MODEL says at a noise level that needs no rounding."""
    import comfy.model_management

    latent, text = inputs

    @torch.inference_mode()
    def run(model: Any) -> torch.Tensor:
        comfy.model_management.load_models_gpu([model])
        denoised = model.model.apply_model(latent, torch.tensor([0.5]), c_crossattn=text)
        return ((latent - denoised) / 0.5).clone()

    return run


@torch.inference_mode()
def merged(plain: Any, inputs: Any, changes: list[tuple[Changes, float]], base: Any = None) -> torch.Tensor:
    """What the reference says with changes in its weights; ``base``: with the weights of another transformer."""
    latent, text = inputs
    kept = {name: tensor.clone() for name, tensor in plain.transformer.state_dict().items()}
    if base is not None:
        for name, layer in base.named_modules():
            if hasattr(layer, "weight") and f"{name}.weight" in kept:
                weight = layer.weight
                value = weight.dequantize() if hasattr(weight, "dequantize") else weight
                plain.transformer.get_parameter(f"{name}.weight").copy_(value)
    for change, strength in changes:
        for name, value in change.items():
            parameter = plain.transformer.get_parameter(name)
            parameter.copy_((parameter.double() + strength * value).float())
    try:
        return plain(latent, torch.tensor([0.5]), text).clone()
    finally:
        plain.transformer.load_state_dict(kept)


def apply(model: Any, path: Path, strength: float = STRENGTH) -> Any:
    from longcat_pack.longcat_backend.comfy_bridge import lora as bridge

    return bridge.apply(model, lora_files.read(path).adapters, strength)[0]


def by_core(model: Any, path: Path, strength: float = STRENGTH) -> Any:
    """As core's LoraLoaderModelOnly does it."""
    import comfy.sd
    import comfy.utils

    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0, lora_metadata=metadata)[0]


def random_adapters(plain: Any, seed: int = 0, without: str = "nothing") -> list[lora.Adapter]:
    """LoRAs on all linear layers, of several ranks and alphas."""
    generator = torch.Generator().manual_seed(seed)
    adapters = []
    for number, (name, (rows, columns)) in enumerate(linear_shapes(plain.transformer).items()):
        rank = 2 + number % 3
        down, up = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        if not name.startswith(without):
            adapters.append(lora.Adapter(name, down * 0.15, up * 0.15, 1.0 + number % 4))
    return adapters


def changes_of(adapters: list[lora.Adapter]) -> Changes:
    return {f"{a.module}.weight": a.alpha / a.down.shape[0] * (a.up.double() @ a.down.double()) for a in adapters}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_picture_of_merged_weights(
    dialect: str, plain: Any, model: Any, velocity: Any, inputs: Any, tmp_path: Path
) -> None:
    path, changes = foreign(dialect, plain.transformer, tmp_path)
    base, expected = merged(plain, inputs, []), merged(plain, inputs, [(changes, STRENGTH)])
    assert (expected - base).abs().max() > 0.3
    for kind in EXACT:
        assert (velocity(apply(model(kind), path)) - expected).abs().max() <= MOST, kind
        assert (velocity(model(kind)) - base).abs().max() <= MOST, kind


@pytest.mark.parametrize("dialect", DIALECTS)
def test_beside_quantised_weights_it_gives_the_picture_of_merged_dequantised_ones(
    dialect: str, plain: Any, model: Any, velocity: Any, inputs: Any, tmp_path: Path
) -> None:
    path, changes = foreign(dialect, plain.transformer, tmp_path)
    quantised = model(BESIDE)
    base = velocity(quantised)
    weights = quantised.model.diffusion_model.velocity.transformer
    expected = merged(plain, inputs, [(changes, STRENGTH)], weights)
    assert (merged(plain, inputs, [], weights) - base).abs().max() <= MOST
    assert (velocity(apply(quantised, path)) - expected).abs().max() <= MOST
    assert torch.equal(velocity(quantised), base)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: " ".join(map(str, kind)))
def test_it_comes_and_goes_without_a_trace(kind: Kind, plain: Any, model: Any, velocity: Any, tmp_path: Path) -> None:
    """Strengths, stacks, switches between clones, unloading in any order, and an error in the middle of a run."""
    import comfy.model_management

    bare = model(kind)
    base = velocity(bare)
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for seed, path in enumerate(paths):
        lora_files.write(path, random_adapters(plain, seed), dtype=torch.float32)
    assert torch.equal(velocity(apply(bare, paths[0], 0.0)), base)
    weak, strong = apply(bare, paths[0], 0.2), apply(bare, paths[0], 0.6)
    both = apply(strong, paths[1], -0.3)
    results = {name: velocity(one) for name, one in (("weak", weak), ("strong", strong), ("both", both))}
    values = [base, *results.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert torch.equal(velocity(weak), results["weak"])
    assert torch.equal(velocity(bare), base)
    assert torch.equal(velocity(both.clone()), results["both"])
    comfy.model_management.unload_all_models()
    assert torch.equal(velocity(strong), results["strong"])
    del both  # its parent takes its place in ComfyUI's list of loaded models
    assert torch.equal(velocity(bare), base)

    broken = strong.clone()
    layer = broken.model.diffusion_model

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    handle = layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        velocity(broken)
    handle.remove()
    assert torch.equal(velocity(bare), base)
    assert torch.equal(velocity(strong), results["strong"])
    strong.detach()  # and what ran beside the weights is gone from the device
    assert not any(layer._forward_hooks for layer in bare.model.diffusion_model.modules())
    assert torch.equal(velocity(bare), base)


@pytest.mark.parametrize("kind", [*EXACT, BESIDE, GROUPS], ids=lambda kind: " ".join(map(str, kind)))
def test_loras_add_up(kind: Kind, plain: Any, model: Any, velocity: Any, inputs: Any, tmp_path: Path) -> None:
    first, second = random_adapters(plain, 0), random_adapters(plain, 1)
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for path, adapters in zip(paths, (first, second), strict=True):
        lora_files.write(path, adapters, dtype=torch.float32)
    stacked = apply(apply(model(kind), paths[0], 0.8), paths[1], -0.5)
    base = model(kind).model.diffusion_model.velocity.transformer if kind == BESIDE else None
    expected = merged(plain, inputs, [(changes_of(first), 0.8), (changes_of(second), -0.5)], base)
    assert (velocity(stacked) - expected).abs().max() <= MOST


def test_running_out_of_memory_half_way_leaves_nothing_behind(
    plain: Any, model: Any, velocity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import side_branches

    lora_files.write(tmp_path / "ours.safetensors", random_adapters(plain), dtype=torch.float32)
    bare = model(BESIDE)
    patched = apply(bare, tmp_path / "ours.safetensors")
    expected = {patched: velocity(patched), bare: velocity(bare)}
    branch = side_branches._branch
    for following in (patched, bare):
        calls: list[str] = []

        def short(*args: Any, calls: list[str] = calls) -> Any:
            calls.append("")
            if len(calls) > 5:
                raise torch.OutOfMemoryError("no memory left")
            return branch(*args)

        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(side_branches, "_branch", short)
            velocity(patched)
        assert torch.equal(velocity(following), expected[following])
        velocity(bare)


def test_another_strength_moves_no_weights(plain: Any, model: Any, velocity: Any, tmp_path: Path) -> None:
    """Quantised weights are moved as one piece, gigabytes of them, and a LoRA does not touch them."""
    lora_files.write(tmp_path / "ours.safetensors", random_adapters(plain), dtype=torch.float32)
    bare = model(BESIDE)
    velocity(bare)
    weight = bare.model.diffusion_model.velocity.transformer.transformer_blocks[0].attn.to_q.weight
    for strength in (0.3, 0.6):
        velocity(apply(bare, tmp_path / "ours.safetensors", strength))
        assert bare.model.diffusion_model.velocity.transformer.transformer_blocks[0].attn.to_q.weight is weight


# Dialects whose keys core's loader finds, by what the layers of the MODEL are called.
FOUND_ON_OFFICIAL = {
    "transformer, alpha tensors",
    "transformer, lora.down",
    "transformer, default",
    "bare",
    "bare, lora.down, no alpha",
    "OneTrainer",
    "LyCORIS",
    "LyCORIS LoHa",
    "LyCORIS LoKr",
    "LyCORIS LoKr, whole",
}
FOUND_ON_NATIVE = {
    *FOUND_ON_OFFICIAL,
    "native",
    "native, differences",
    "native, whole differences",
    "kohya, native",
    "kohya LoHa, native",
    "kohya LoKr, native",
}
IGNORED_HEADER = {"transformer, header"}


@pytest.mark.parametrize("kind", [EXACT[0], EXACT[2], BESIDE], ids=lambda kind: " ".join(map(str, kind)))
@pytest.mark.parametrize("dialect", DIALECTS)
def test_cores_own_loader_gives_the_same_picture_or_an_error(
    dialect: str, kind: Kind, plain: Any, model: Any, velocity: Any, tmp_path: Path
) -> None:
    """But for the time embedding, which core knows by another name."""
    path, _ = foreign(dialect, plain.transformer, tmp_path, without="time_embed")
    if dialect in (FOUND_ON_NATIVE if kind[0] == "core" else FOUND_ON_OFFICIAL):
        ours, theirs = velocity(apply(model(kind), path)), velocity(by_core(model(kind), path))
        assert (ours - theirs).abs().max() <= MOST
        assert (ours - velocity(model(kind))).abs().max() > 0.3
    else:
        said = "which ComfyUI's loader does not read" if dialect in IGNORED_HEADER else "found no layer of this model"
        with pytest.raises(LongCatError, match=said):
            by_core(model(kind), path)


def test_core_reads_what_is_written(plain: Any, model: Any, velocity: Any, inputs: Any, tmp_path: Path) -> None:
    """All layers, those of the time embedding too, which core finds by its own names only."""
    adapters = random_adapters(plain)
    lora_files.write(tmp_path / "ours.safetensors", adapters, dtype=torch.float32)
    expected = merged(plain, inputs, [(changes_of(adapters), STRENGTH)])
    patched = by_core(model(EXACT[0]), tmp_path / "ours.safetensors")
    assert (velocity(patched) - expected).abs().max() <= MOST


@pytest.mark.parametrize("options", [{}, {"use_safetensors": True}], ids=["as it is", "with the header"])
def test_diffusers_reads_what_is_written(
    options: dict[str, bool], checkpoint: Checkpoint, plain: Any, inputs: Any, tmp_path: Path
) -> None:
    adapters = random_adapters(plain)
    lora_files.write(tmp_path / "ours.safetensors", adapters, dtype=torch.float32)
    expected = merged(plain, inputs, [(changes_of(adapters), 1.0)])
    theirs = transformer.load_transformer(checkpoint, torch.float32)
    theirs.transformer.load_lora_adapter(tmp_path / "ours.safetensors", **options)
    latent, text = inputs
    with torch.inference_mode():
        assert (theirs(latent, torch.tensor([0.5]), text) - expected).abs().max() <= MOST


@pytest.mark.parametrize("reader", ["resume", "pipeline"])
def test_simpletuner_reads_what_is_written(
    reader: str, checkpoint: Checkpoint, plain: Any, inputs: Any, tmp_path: Path
) -> None:
    """Its pipeline has diffusers' reader for Flux; to resume it takes the matrices from that, and alpha from its own
    settings, where the default is the rank."""
    from diffusers import DiffusionPipeline
    from diffusers.loaders import FluxLoraLoaderMixin
    from peft import LoraConfig, set_peft_model_state_dict

    class Pipeline(DiffusionPipeline, FluxLoraLoaderMixin):
        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)
            self.text_encoder = None

    adapters = [
        lora.Adapter(a.module, torch.cat([a.down] * 2)[:4], torch.cat([a.up] * 2, 1)[:, :4], 2.0)
        for a in random_adapters(plain)
    ]
    path = tmp_path / "pytorch_lora_weights.safetensors"
    lora_files.write(path, adapters, dtype=torch.float32)
    expected = merged(plain, inputs, [(changes_of(adapters), 1.0)])
    theirs = transformer.load_transformer(checkpoint, torch.float32)
    if reader == "resume":
        modules = [adapter.module for adapter in adapters]
        theirs.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=modules))
        stored = FluxLoraLoaderMixin.lora_state_dict(path)
        own = {
            key.removeprefix("transformer."): value for key, value in stored.items() if key.startswith("transformer.")
        }
        set_peft_model_state_dict(theirs.transformer, own, adapter_name="default")
    else:
        pipeline = Pipeline(theirs.transformer)
        pipeline.load_lora_weights(path)
    latent, text = inputs
    with torch.inference_mode():
        assert (theirs(latent, torch.tensor([0.5]), text) - expected).abs().max() <= MOST


def test_a_lora_for_another_model_is_refused(plain: Any, model: Any, tmp_path: Path) -> None:
    """FLUX has the same names and more blocks; another LongCat has other sizes."""
    adapters = random_adapters(plain)
    more = [lora.Adapter("single_transformer_blocks.37.proj_mlp", adapters[0].down, adapters[0].up, 1.0)]
    wider = [lora.Adapter(adapters[0].module, torch.ones(2, 3072), torch.ones(64, 2), 1.0)]
    from longcat_pack.longcat_backend.comfy_bridge import lora as bridge

    for kind in (EXACT[0], EXACT[2], BESIDE):
        with pytest.raises(LongCatError, match="single_transformer_blocks.37.proj_mlp.*does not have"):
            bridge.apply(model(kind), [*adapters, *more], 1.0)
        with pytest.raises(LongCatError, match="has the shape"):
            bridge.apply(model(kind), wider, 1.0)
        with pytest.raises(LongCatError, match="matches no layer"):
            bridge.apply(model(kind), [], 1.0)


def test_what_cannot_run_beside_weights_is_refused(plain: Any, model: Any) -> None:
    import comfy.weight_adapter

    place = "diffusion_model.velocity.transformer.transformer_blocks.0.attn.to_q.weight"
    adapter = random_adapters(plain)[0]
    dora = comfy.weight_adapter.LoRAAdapter(set(), (adapter.up, adapter.down, 1.0, None, torch.ones(1), None))
    for patch in (dora, ("set", (torch.ones(1),))):
        with pytest.raises(LongCatError, match="cannot be applied to the weights of this precision"):
            model(BESIDE).clone().add_patches({place: patch})
    with pytest.raises(LongCatError, match="does not fit this model"):
        model(EXACT[2]).clone().add_patches({"diffusion_model.double_blocks.7.img_attn.proj.weight": dora})


@pytest.mark.parametrize("kind", [EXACT[0], EXACT[2], BESIDE], ids=lambda kind: " ".join(map(str, kind)))
def test_a_lora_that_comes_and_goes_while_it_samples_arrives_or_is_refused(
    kind: Kind, plain: Any, model: Any, tmp_path: Path
) -> None:
    """Core's hooks, as of Create Hook LoRA."""
    import comfy.hooks
    import comfy.lora
    import comfy.utils

    path, _ = foreign("transformer, alpha tensors", plain.transformer, tmp_path, without="time_embed")
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    patched = model(kind).clone()
    patches = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(patched.model, {}))
    hook = comfy.hooks.WeightHook()
    if kind == BESIDE:
        with pytest.raises(LongCatError, match="while it samples"):
            patched.add_hook_patches(hook, patches)
        return
    patched.add_hook_patches(hook, patches)
    (found,) = patched.hook_patches.values()
    assert sum(len(patches) for patches in found.values()) == len(linear_shapes(plain.transformer)) - 2
    with pytest.raises(LongCatError, match="found no layer of this model"):
        patched.add_hook_patches(hook, {})


def test_tabulated_layers_are_changed_too(plain: Any, model: Any, velocity: Any, tmp_path: Path) -> None:
    """A LoRA on modulation layers alone changes their tabulated rows, beside quantised weights too."""
    only = [adapter for adapter in random_adapters(plain) if ".norm" in adapter.module or "norm_out" in adapter.module]
    assert only
    lora_files.write(tmp_path / "modulation.safetensors", only, dtype=torch.float32)
    for tabulated, without in ((EXACT[2], EXACT[3]), (BESIDE, ("diffusers", "int8-quanto", False))):
        first, second = (
            velocity(apply(model(kind), tmp_path / "modulation.safetensors")) for kind in (tabulated, without)
        )
        assert (first - second).abs().max() <= MOST
        assert (first - velocity(model(tabulated))).abs().max() > 0.3


def test_the_file_that_is_written_says_the_same_and_has_alpha_in_one_place(plain: Any, tmp_path: Path) -> None:
    adapters = random_adapters(plain)
    lora_files.write(tmp_path / "ours.safetensors", adapters, dtype=torch.float32)
    again = {adapter.module: adapter for adapter in lora_files.read(tmp_path / "ours.safetensors").adapters}
    assert len(again) == len(adapters)
    for adapter in adapters:
        found = again[adapter.module]
        assert torch.equal(found.down, adapter.down)
        assert torch.allclose(lora.delta(found), lora.delta(adapter), atol=1e-6)
        assert found.alpha == found.rank == adapter.rank
    assert not any(key.endswith(".alpha") for key in load_file(tmp_path / "ours.safetensors"))
