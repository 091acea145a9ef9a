"""Runs of OFT, LoKr and DoRA in other programs: as what they are in peft, as a LoRA, and merged."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.adapters import OFT, DoRA, LoKr, changed_layers, peft_layers, without_adapters
from sfumato.errors import CheckpointError, ConfigError
from sfumato.generation.pipeline import Pipeline
from sfumato.interop import peft_export
from sfumato.interop.diffusers_folder import read_folder
from sfumato.interop.lora_conversion import low_rank
from sfumato.interop.lora_export import lora_diffusers, lora_kohya, lora_peft
from sfumato.interop.merging import merge
from sfumato.interop.trained_model import TrainedModel
from sfumato.recipes.model import build_model
from sfumato.sampling import KeyedNoise
from tests.adapters.test_peft_kinds import learn
from tests.helpers.cli import sfumato as cli
from tests.helpers.diffusers_models import stable_diffusion
from tests.helpers.lora import of_peft
from tests.helpers.trained_models import line_with
from tests.parity.test_finetune import SHORT, photos

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of peft, where diffusers misleads it
]
SOME = {"layers": ("down_blocks.*attn1", "mid_block.*net", "conv_in", "mid_block.*conv1")}
KINDS = {
    "oft": OFT(block_size=8, **SOME),
    "lokr": LoKr(rank=2, alpha=3.0, convolutions=True, **SOME),
    "dora": DoRA(rank=2, alpha=3.0, convolutions=True, **SOME),
}
TYPES = {"oft": "OFT", "lokr": "LOKR", "dora": "LORA"}
F32 = torch.float32
ASKED = {"prompt": "a thing number 3", "steps": 3}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    stable_diffusion(root / "model")
    photos(root / "photos")
    return root


@pytest.fixture(scope="module")
def trained(place: Path) -> dict[str, TrainedModel]:
    """The model with adapters that have learned something, as finished runs would give it."""
    content, found = read_folder(place / "model"), {}
    for kind, adapter in KINDS.items():
        run = replace(content.run, adapter=adapter)
        model = build_model(run, content.info).eval().requires_grad_(False)
        learn(model.network)
        pipeline = replace(sfumato.load(place / "model"), model=model)
        found[kind] = TrainedModel(pipeline=pipeline, run=run, directory=place / kind, step=7)
    return found


@pytest.fixture(scope="module")
def folders(place: Path, trained: dict[str, TrainedModel]) -> dict[str, tuple[Path, list[str]]]:
    """Each kind as a folder of peft, and the lines that were said."""
    paths = {kind: place / f"{kind}-peft" for kind in KINDS}
    return {kind: (path, lora_peft(trained[kind], path, F32)) for kind, path in paths.items()}


@pytest.fixture(scope="module")
def base(place: Path) -> Pipeline:
    return sfumato.load(place / "model")


def theirs(place: Path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(place / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def predicted(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 77, 32)))
    with torch.no_grad():
        return unet(x, torch.tensor([3, 700]), text).sample


def network_of(pipeline: Pipeline) -> torch.nn.Module:
    return pipeline.model.network.implementation


def network(trained: TrainedModel) -> torch.nn.Module:
    return network_of(trained.pipeline)


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A run that trained by OFT."""
    settings = (
        *SHORT, "adapter.kind=oft", "adapter.block_size=8", "optimizer.learning_rate=0.05",
        "optimizer.warmup_steps=0",
    )  # fmt: skip
    result = cli("finetune", place / "model", place / "photos", *settings, "--run", place / "run")
    assert result.code == 0, result.err
    assert "OFT with blocks of 8: the base stays as it is" in result.err
    assert "preservation: what the base predicts" in result.err
    assert (place / "run" / "finetuning" / "report.json").is_file()
    return place / "run"


@pytest.mark.slow
def test_a_model_is_tuned_by_oft_and_makes_the_same_images_in_peft(place: Path, run: Path) -> None:
    tuned, base = sfumato.load(run), sfumato.load(place / "model").sample(1, seed=3, **ASKED)
    expected = tuned.sample(1, seed=3, **ASKED)
    assert float((expected - base).abs().max()) > 0.01
    with without_adapters(tuned.model):
        assert float((tuned.sample(1, seed=3, **ASKED) - base).abs().max()) < 1e-5
    result = cli("export", run, "--format", "lora-peft")
    assert result.code == 0, result.err
    count = len(peft_layers(tuned.model))
    said = f"opened by peft: {count} of {count} layers, largest relative difference of a layer's"
    assert f"{said} outputs 0\n" in result.err
    step = json.loads((run / "best" / "verdict.json").read_text())["best_step"]
    folder = run / "exports" / f"lora-peft-{step}"
    pipeline = theirs(place)
    pipeline.unet = peft.PeftModel.from_pretrained(pipeline.unet, folder)
    images = pipeline(
        ASKED["prompt"], latents=KeyedNoise(3)(torch.empty(1, 4, 16, 16)), height=32, width=32,
        num_inference_steps=3, guidance_scale=7.5, output_type="np",
    ).images  # fmt: skip
    assert float((torch.as_tensor(images).permute(0, 3, 1, 2) - expected).abs().max()) < 1e-5
    result = cli("export", run, "--format", "onnx")
    assert result.code == 2
    assert "OFT with blocks of 8" in result.err
    assert "lora-peft" in result.err


@kinds
def test_peft_computes_the_same_with_the_folder(
    kind: str, base: Pipeline, trained: dict, folders: dict, tmp_path: Path
) -> None:
    own = predicted(network(trained[kind]))
    folder, lines = folders[kind]
    assert "outputs 0" in line_with(lines, "opened by peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == TYPES[kind]
    assert config["base_model_name_or_path"] == "model"
    plain = copy.deepcopy(network_of(base))
    assert float((predicted(plain) - own).abs().max()) > 0.01
    assert torch.equal(predicted(peft.PeftModel.from_pretrained(plain, folder)), own)


def test_rounding_is_said(trained: dict, tmp_path: Path) -> None:
    lines = lora_peft(trained["oft"], tmp_path / "half", torch.bfloat16)
    stored = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    said = line_with(lines, "opened by peft").rpartition(" ")[2]
    assert 1e-5 < float(said) < 0.1
    assert "by rounding" in lines[2]


@kinds
def test_as_a_lora_99_percent_of_the_change_are_kept_by_as_few_ranks_as_can(
    kind: str, place: Path, trained: dict[str, TrainedModel], tmp_path: Path
) -> None:
    own = {name: layer.delta() for name, layer in changed_layers(network(trained[kind])).items()}
    lines = lora_diffusers(trained[kind], tmp_path / "d", F32)
    lora_kohya(trained[kind], tmp_path / "k.safetensors", F32)
    said = line_with(lines, "of the change is kept (of its energy;")
    read = []
    for name in ("d", "k.safetensors"):
        pipeline = theirs(place)
        pipeline.load_lora_weights(str(tmp_path / name))
        read.append(of_peft(pipeline.unet))
    assert all(torch.equal(change, read[1][name]) for name, change in read[0].items())
    assert read[0].keys() == own.keys()
    kept = total = 0.0
    for name, change in own.items():
        energy = float(change.double().square().sum())
        lost = float((read[0][name] - change).double().square().sum())
        assert lost < 0.01001 * energy
        values = torch.linalg.svdvals(change.flatten(1).double()).square()
        rank = int((values.cumsum(0) < 0.99 * values.sum()).sum()) + 1
        assert abs(lost - float(values[rank:].sum())) < 1e-5 * energy
        kept, total = kept + energy - lost, total + energy
    assert f"{kept / total:.2%} of the change is kept" in said


def test_a_product_of_low_rank_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 7), (7, 12), (6, 5, 3, 3)):
        outputs, inputs = shape[0], torch.Size(shape[1:]).numel()
        up, down = (torch.randn(s, generator=generator) for s in ((outputs, 2), (2, inputs)))
        change = (up @ down).view(shape)
        factors = low_rank(change, kept=1 - 1e-9)
        assert factors.rank == 2
        assert factors.fits(torch.Size(shape))
        assert torch.allclose(factors.delta(), change, atol=1e-5)
    assert low_rank(torch.zeros(3, 4)).delta().eq(0).all()


@kinds
def test_merged_weights_compute_what_was_trained(kind: str, base: Pipeline, trained: dict) -> None:
    model = trained[kind]
    merged = merge(model.run, model.pipeline.model.network, F32)
    unet = copy.deepcopy(network_of(base))
    assert merged.tensors.keys() == unet.state_dict().keys()
    unet.load_state_dict(merged.tensors)
    own = predicted(network(model))
    assert float((predicted(unet) - own).abs().max()) < 1e-5
    assert f"{len(peft_layers(network(model)))} adapted layers merged" in merged.lines[0]


@pytest.mark.slow
def test_whole_files_and_bundles_of_a_run(run: Path, tmp_path: Path) -> None:
    """Written by the command, which compares an image of each with the run."""
    for format in ("single-file", "diffusers", "bundle"):
        suffix = ".safetensors" if format == "single-file" else ""
        out = tmp_path / f"{format}{suffix}"
        result = cli("export", run, "--format", format, "--out", out)
        assert result.code == 0, result.err
        assert "reopened: one image differs from the run's by" in result.err
    own = sfumato.load(run).sample(1, seed=3, **ASKED)
    assert torch.equal(sfumato.load(tmp_path / "bundle").sample(1, seed=3, **ASKED), own)


def test_a_folder_that_peft_reads_otherwise_is_refused(
    trained: dict[str, TrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(tensors: dict, path: Path, **options: object) -> None:
        save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, path, **options)

    monkeypatch.setattr(peft_export, "save_file", faulty)
    with pytest.raises(CheckpointError, match="peft computes something else"):
        lora_peft(trained["oft"], tmp_path / "p", F32)


def test_a_value_that_float16_cannot_hold_is_refused_by_its_name(
    trained: dict[str, TrainedModel], tmp_path: Path
) -> None:
    layer = next(iter(peft_layers(network(trained["lokr"])).values()))
    weights = layer.peft.lokr_w1["default"].data
    before = weights.clone()
    weights[0, 0] = 1e6
    try:
        with pytest.raises(ConfigError, match=r"lokr_w1 has values up to 1e\+06"):
            lora_peft(trained["lokr"], tmp_path / "p", torch.float16)
    finally:
        weights.copy_(before)
    assert not (tmp_path / "p").exists()


@kinds
def test_a_folder_is_added_to_its_base_and_taken_from_the_run(
    kind: str, base: Pipeline, trained: dict, folders: dict
) -> None:
    (folder, _), own = folders[kind], trained[kind].pipeline
    with torch.no_grad():
        added = predicted(network_of(sfumato.with_lora(base, folder)))
        assert float((added - predicted(network_of(own))).abs().max()) < 1e-5
        taken = sfumato.with_lora(own, folder, -1.0)
        assert (
            float((predicted(network_of(taken)) - predicted(network_of(base))).abs().max()) < 1e-5
        )
        assert float((added - predicted(network_of(base))).abs().max()) > 0.01
    # the pipelines that were given are as they were
    assert len(peft_layers(network_of(own))) == len(changed_layers(network_of(own))) > 0
    assert not changed_layers(network_of(base))


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        ("oft", {"coft": True}, "coft = True, which is not supported"),
        ("oft", {"oft_block_size": 4}, "does not fit"),
        ("lokr", {"rank_pattern": {"to_q": 4}}, "rank_pattern = "),
        ("lokr", {"alpha": "much"}, "cannot be understood"),
        ("dora", {"use_rslora": True}, "use_rslora = True"),
        ("dora", {"r": 3}, "does not fit"),
        ("dora", {"bias": "all"}, "bias = 'all'"),
        ("oft", {"peft_type": "BOFT"}, "is of the kind BOFT"),
    ],
)
def test_folders_that_cannot_be_followed_are_refused(
    kind: str, settings: dict, sentence: str, base: Pipeline, folders: dict, tmp_path: Path
) -> None:
    shutil.copytree(folders[kind][0], tmp_path / "p")
    config = tmp_path / "p" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(CheckpointError) as error:
        sfumato.with_lora(base, tmp_path / "p")
    assert sentence in str(error.value)


def test_tensors_of_no_layer_are_named(base: Pipeline, folders: dict, tmp_path: Path) -> None:
    shutil.copytree(folders["oft"][0], tmp_path / "p")
    file = tmp_path / "p" / "adapter_model.safetensors"
    tensors = load_file(file) | {"base_model.model.nowhere.oft_R.weight": torch.ones(2, 28)}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"nowhere\.oft_R\.weight belongs to no layer"):
        sfumato.with_lora(base, tmp_path / "p")
