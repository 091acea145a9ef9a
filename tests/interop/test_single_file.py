"""Single files of Stable Diffusion's layout: written for other programs, and read from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato import load
from sfumato.errors import CheckpointError, ConfigError, OutputError
from sfumato.interop import single_file_reader
from sfumato.interop.diffusers_export import write_diffusers
from sfumato.interop.single_file import read_facts, write_single_file
from sfumato.interop.single_file_layout import FileFacts
from sfumato.interop.single_file_reader import read_single_file
from sfumato.interop.trained_model import TrainedModel
from tests.helpers.cli import sfumato
from tests.helpers.diffusers_models import stable_diffusion, stable_diffusion_3
from tests.helpers.trained_models import (
    line_with,
    sdxl_of_two_widths,
    stable_diffusion_2,
    tuned,
)

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
MAKE = {"SD1": stable_diffusion, "SD2": stable_diffusion_2, "SDXL": sdxl_of_two_widths}
FACTS = {
    "SD1": FileFacts("stable-diffusion-v1", "epsilon", False),
    "SD2": FileFacts("stable-diffusion-v2", "v", True),
    "SDXL": FileFacts("stable-diffusion-xl-v1-base", "epsilon", False),
}
CLASSES = {"SDXL": "StableDiffusionXLPipeline"}
PROMPT = "a red cat"
ASKED = {"prompt": PROMPT, "seed": 3, "steps": 4}
NETWORK = "model.diffusion_model."


@pytest.fixture(scope="module", params=MAKE)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def place(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a run of it and a single file of the run."""
    place = tmp_path_factory.mktemp("single")
    MAKE[name](place / "base")
    return place


@pytest.fixture(scope="module")
def model(place: Path) -> TrainedModel:
    return tuned(place / "base", place / "run")


@pytest.fixture(scope="module")
def file(place: Path, model: TrainedModel) -> Path:
    lines = write_single_file(model, place / "model.safetensors", torch.float32)
    line_with(lines, "reopened: one image differs from the run's by at most")
    return place / "model.safetensors"


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return mine.keys() == others.keys() and all(
        torch.equal(tensor, others[key]) for key, tensor in mine.items()
    )


def test_diffusers_reads_the_tensors_and_makes_the_image_of_the_folder(
    name: str, place: Path, model: TrainedModel, file: Path
) -> None:
    write_diffusers(model, place / "folder", torch.float32)
    folder = diffusers.DiffusionPipeline.from_pretrained(place / "folder", local_files_only=True)
    kind = getattr(diffusers, CLASSES.get(name, "StableDiffusionPipeline"))
    options = {} if name == "SDXL" else {"safety_checker": None}
    single = kind.from_single_file(
        str(file), config=str(place / "folder"), local_files_only=True, **options
    )
    images = []
    for part in ("unet", "vae", "text_encoder", "text_encoder_2")[: 3 + (name == "SDXL")]:
        assert same(getattr(folder, part), getattr(single, part)), part
    for pipeline in (folder, single):
        pipeline.set_progress_bar_config(disable=True)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        images.append(
            pipeline(
                PROMPT,
                latents=latents,
                num_inference_steps=3,
                output_type="np",
                height=32,
                width=32,
            ).images
        )
    # one encoder of SDXL is cut out of joined tensors there, which lie otherwise in memory
    assert abs(images[0] - images[1]).max() <= (1e-6 if name == "SDXL" else 0.0)


def test_the_file_alone_says_what_it_is(name: str, file: Path) -> None:
    assert read_facts(file) == FACTS[name]
    names = set(load_file(file))
    assert ("v_pred" in names, "ztsnr" in names) == (name == "SD2", name == "SD2")
    prefixes = {key.split(".")[0] for key in names} - {"v_pred", "ztsnr"}
    text = "conditioner" if name == "SDXL" else "cond_stage_model"
    assert prefixes == {"model", "first_stage_model", text}
    assert not [
        key for key in names if ".mid.attn_1.q.weight" in key and load_file(file)[key].ndim != 4
    ]


def test_a_card_lies_beside_the_file(file: Path) -> None:
    card = file.with_suffix(".md").read_text()
    assert f"sfumato sample {file.name} --like FOLDER" in card
    assert "not measured" in card


def test_our_reader_gives_the_run_back_whatever_the_other_folder_says(
    name: str, place: Path, model: TrainedModel, file: Path
) -> None:
    """The folder beside the file has other weights, and another prediction than the file says."""
    like = shutil.copytree(place / "base", place / "like", dirs_exist_ok=True)
    settings = json.loads((like / "scheduler" / "scheduler_config.json").read_text())
    if name == "SD2":
        settings |= {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
        (like / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    own = model.pipeline.sample(1, **ASKED)
    again = load(file, like=like).sample(1, **ASKED)
    assert float((own - again).abs().max()) < 1e-5
    notes = read_single_file(file, like).notes
    assert [note for note in notes if "overrules the scheduler" in note] == (
        [
            "the file overrules the scheduler: prediction_type=v_prediction, "
            "rescale_betas_zero_snr=True, timestep_spacing=trailing"
        ]
        if name == "SD2"
        else []
    )
    marks = ("v_pred", "ztsnr")
    without = {key: value for key, value in load_file(file).items() if key not in marks}
    save_file(without, place / "without.safetensors")
    plain = load(place / "without.safetensors", like=like).sample(1, **ASKED)
    assert (float((own - plain).abs().max()) > 1e-3) == (name == "SD2")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file and the folder that it is read like."""
    place = tmp_path_factory.mktemp("sd")
    base = stable_diffusion(place / "base")
    file = place / "model.safetensors"
    write_single_file(tuned(base, place / "run"), file, torch.float32)
    return file, base


def changed(file: Path, target: Path, change) -> Path:
    save_file(change(dict(load_file(file))), target)
    return target


def test_parts_that_the_file_lacks_are_taken_from_the_folder(
    sd: tuple[Path, Path], tmp_path: Path
) -> None:
    file, base = sd
    part = changed(
        file,
        tmp_path / "network.safetensors",
        lambda tensors: {key: value for key, value in tensors.items() if key.startswith(NETWORK)},
    )
    converted = read_single_file(part, base)
    assert "unet: from the file (float32)" in converted.notes
    assert f"vae: not in the file, taken from {base.name}" in converted.notes
    assert f"text_encoder: not in the file, taken from {base.name}" in converted.notes
    whole = load(file, like=base).sample(1, **ASKED)
    assert torch.equal(load(part, like=base).sample(1, **ASKED), whole)


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_scaled_float8_is_multiplied_out(
    sd: tuple[Path, Path], tmp_path: Path, spelling: str
) -> None:
    file, base = sd
    key = f"{NETWORK}out.2.weight"

    def scaled(tensors: dict) -> dict:
        weight = tensors[key]
        scale = weight.abs().max() / 448
        tensors[key] = (weight / scale).to(torch.float8_e4m3fn)
        stem = key.removesuffix("weight")
        return tensors | {f"{stem}{spelling}": scale, "scaled_fp8": torch.zeros(0)}

    converted = read_single_file(changed(file, tmp_path / "f8.safetensors", scaled), base)
    written = load_file(converted.folder / "unet" / "diffusion_pytorch_model.safetensors")
    wanted = load_file(file)[key]
    assert float((written["conv_out.weight"] - wanted).abs().max() / wanted.abs().max()) < 0.04
    assert not [note for note in converted.notes if "not used" in note]


def test_mixed_precisions_averages_and_unknown_tensors_are_said(
    sd: tuple[Path, Path], tmp_path: Path
) -> None:
    file, base = sd

    def mixed(tensors: dict) -> dict:
        for key in list(tensors):
            if key.startswith(NETWORK) and key.endswith("bias"):
                tensors[key] = tensors[key].half()
            if key.startswith(f"{NETWORK}input"):
                tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = (
                    tensors[key] + 1
                )
        buffers = {"betas": torch.zeros(3), "model_ema.decay": torch.tensor(0.9)}
        return tensors | buffers | {"something.else.weight": torch.zeros(2)}

    path = changed(file, tmp_path / "mixed.safetensors", mixed)
    notes = read_single_file(path, base).notes
    assert "unet: from the file (float16, float32)" in notes
    line_with(notes, "averaged weights in the file (model_ema.*) are not used")
    assert "1 tensors of the file are not used: 1 of something.else.*" in notes
    whole, again = (load(one, like=base).sample(1, **ASKED) for one in (file, path))
    assert 0 < float((whole - again).abs().max()) < 1e-2


def test_a_file_that_another_process_converts_meanwhile_is_left_as_it_is(
    sd: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    file, folder = sd
    real, kept = single_file_reader.convert, []

    def slow(path: Path, like: Path, target: Path) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(single_file_reader, "convert", real)
            first = single_file_reader.read_single_file(path, like)
        kept.append((first.folder / single_file_reader.NOTES).stat().st_ino)
        return real(path, like, target)

    monkeypatch.setattr(single_file_reader, "convert", slow)
    found = single_file_reader.read_single_file(file, folder)
    assert (found.folder / single_file_reader.NOTES).stat().st_ino == kept[0]
    assert [path.name for path in found.folder.parent.iterdir()] == [found.folder.name]


def test_a_file_is_converted_once(
    sd: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, base = sd
    first = read_single_file(file, base)

    def convert(*arguments: object) -> list[str]:
        raise AssertionError("converted again")

    monkeypatch.setattr(single_file_reader, "convert", convert)
    assert read_single_file(Path(shutil.copy(file, tmp_path / "copy.safetensors")), base) == first
    other = changed(file, tmp_path / "other.safetensors", lambda t: {**t, "x": torch.zeros(1)})
    with pytest.raises(AssertionError, match="converted again"):
        read_single_file(other, base)


HEADS = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "a pointer of git-lfs",
    ),
    "page": (b"\n<!DOCTYPE html><html>", "is a web page"),
    "pickle": (b"PK\x03\x04archive/data.pkl", "is a pickle of PyTorch, which can run code"),
    "nonsense": (b"not a file of tensors at all", "is damaged or cut off"),
}


@pytest.mark.parametrize("name", HEADS)
def test_files_that_are_something_else_are_called_what_they_are(
    name: str, sd: tuple[Path, Path], tmp_path: Path
) -> None:
    content, sentence = HEADS[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        load(tmp_path / "model.safetensors", like=sd[1])


def test_files_that_do_not_fit_are_refused_by_name(sd: tuple[Path, Path], tmp_path: Path) -> None:
    file, base = sd
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    (tmp_path / "model.ckpt").write_bytes(file.read_bytes())
    cases = {
        tmp_path / "cut.safetensors": "is damaged or cut off",
        tmp_path / "model.ckpt": "is not a .safetensors file",
        tmp_path / "nowhere.safetensors": "cannot be read: No such file",
        changed(
            file,
            tmp_path / "part.safetensors",
            lambda t: {key: value for key, value in t.items() if key != f"{NETWORK}out.2.bias"},
        ): f"unet: 1 of .* tensors are missing, e.g. {NETWORK}out.2.bias",
        changed(
            file,
            tmp_path / "inpainting.safetensors",
            lambda t: {**t, f"{NETWORK}input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)},
        ): r"input_blocks.0.0.weight has shape \(16, 9, 3, 3\), and base has \(16, 4, 3, 3\)",
        changed(
            file,
            tmp_path / "lora.safetensors",
            lambda t: {f"lora_unet_{i}.lora_up.weight": torch.zeros(1) for i in range(9)},
        ): "is a LoRA, not a whole model",
        changed(
            file, tmp_path / "embedding.safetensors", lambda t: {"emb_params": torch.zeros(2, 32)}
        ): "only a few tensors, such as an embedding",
    }
    for path, sentence in cases.items():
        with pytest.raises(CheckpointError, match=sentence):
            read_single_file(path, base)
    for like, sentence in {
        tmp_path: "has no model_index.json",
        stable_diffusion_3(tmp_path / "sd3"): "this is a StableDiffusion3Pipeline",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            read_single_file(file, like)
    with pytest.raises(ConfigError, match="is a single file, which lacks its configuration"):
        load(file)
    with pytest.raises(ConfigError, match="`like` is for single files"):
        load(base, like=base)


def test_the_command_samples_a_file(
    sd: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, base = sd
    command = ("sample", file, "--like", base, "--num", 1, "--steps", 2, "--prompt", PROMPT)
    result = sfumato(*command)
    assert (result.code, result.out) == (0, "generated/model/seed-0/grid.png\n"), result.err
    assert "note: unet: from the file (float32)" in result.err
    assert sfumato("sample", file, "--num", 1).code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generated"]


def test_what_the_layout_does_not_have_is_refused(sd: tuple[Path, Path], tmp_path: Path) -> None:
    model = tuned(sd[1], tmp_path / "run")
    with pytest.raises(OutputError, match=r"is written as \.safetensors"):
        write_single_file(model, tmp_path / "model.ckpt", torch.float32)
    flow = tuned(stable_diffusion_3(tmp_path / "sd3"), tmp_path / "run3")
    with pytest.raises(ConfigError, match=r"not of StableDiffusion3Pipeline\n.*`diffusers`"):
        write_single_file(flow, tmp_path / "out.safetensors", torch.float32)
    sample = stable_diffusion(tmp_path / "sample", prediction_type="sample")
    with pytest.raises(ConfigError, match="cannot say that its network predicts 'sample'"):
        write_single_file(
            tuned(sample, tmp_path / "run4"), tmp_path / "x.safetensors", torch.float32
        )
    scaled = tuned(sd[1], tmp_path / "run5")
    object.__setattr__(scaled.run.autoencoder, "statistics", "measured")
    with pytest.raises(ConfigError, match=r"that scaling_factor is 1.0: .* 0.18215 for granted"):
        write_single_file(scaled, tmp_path / "y.safetensors", torch.float32)
    other = shutil.copytree(sd[1], tmp_path / "other")
    settings = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    settings["beta_end"] = 0.02
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"that beta_end is 0.02"):
        write_single_file(
            tuned(other, tmp_path / "run6"), tmp_path / "z.safetensors", torch.float32
        )
    assert not list(tmp_path.glob("*.safetensors"))
