"""Bad models and bad images: `finetune` and `sample` refuse them before work begins, name the file or
key and the remedy, and write nothing; what can be mended or only warned of is said.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import cli, corrupt
from tests.helpers.diffusers_models import stable_diffusion

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHORT = (
    "budget.steps=1",
    "validation.samples=4",
    "validation.bins=2",
    "preview.num=1",
    "precision=float32",
    "sampling.steps=2",
)
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n"
EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photos(folder: Path, *, num: int = 8, mode: str = "RGB", caption: str = "a thing") -> Path:
    folder.mkdir()
    for number in range(num):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{number}.png")
        if caption:
            (folder / f"{number}.txt").write_text(f"{caption} {number}")
    return folder


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, torch.nan)


def with_code(model: Path, **parts: object) -> None:
    """A model that refers to code of its own, which would leave a file behind."""
    for folder in (model, model / "unet", model / "text_encoder"):
        (folder / "mine.py").write_text(EVIL)
    corrupt.edit_json(model, "model_index.json", **parts)


FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "network as .bin": (
        lambda m: corrupt.rename(m, UNET, ".bin"),
        ("model/unet: has no", "there are diffusion_pytorch_model.bin", "only .safetensors"),
    ),
    "encoder as .bin": (
        lambda m: corrupt.rename(m, TEXT, ".bin"),
        ("model/text_encoder: has no .safetensors", "model.bin", "only .safetensors"),
    ),
    "autoencoder as .bin": (
        lambda m: corrupt.rename(m, VAE, ".bin"),
        ("model/vae: has no diffusion_pytorch_model.safetensors", "only .safetensors"),
    ),
    "network of its own code": (
        lambda m: with_code(m, unet=["mine", "MyUNet"]),
        ("model_index.json: unet", "code of the model's own, which is never run"),
    ),
    "encoder of its own code": (
        lambda m: with_code(m, text_encoder=["mine", "MyEncoder"]),
        ("model_index.json: text_encoder", "which is never run"),
    ),
    "pipeline of its own code": (
        lambda m: with_code(m, _class_name=["mine", "MyPipeline"]),
        ("model_index.json: _class_name", "which is never run"),
    ),
    "module of the system": (
        lambda m: with_code(m, tokenizer=["os", "system"]),
        ('tokenizer = ["os", "system"]', "which is never run"),
    ),
    "unknown pipeline": (
        lambda m: corrupt.edit_json(m, "model_index.json", _class_name="MyPipeline"),
        ("model_index.json: MyPipeline", "supported are StableDiffusionPipeline"),
    ),
    "unknown network": (
        lambda m: corrupt.edit_json(m, "model_index.json", unet=["diffusers", "UNet3DModel"]),
        ("unsupported network class 'UNet3DModel'", "supported are UNet2DModel"),
    ),
    "unknown encoder": (
        lambda m: corrupt.edit_json(
            m, "model_index.json", text_encoder=["transformers", "CLIPTextModels"]
        ),
        ("text_encoder is of the unsupported class", "did you mean 'CLIPTextModel'?"),
    ),
    "unknown autoencoder": (
        lambda m: corrupt.edit_json(m, "vae/config.json", _class_name="VQModel"),
        ("model/vae: unsupported autoencoder class VQModel", "supported are AutoencoderKL"),
    ),
    "no network": (
        lambda m: corrupt.edit_json(m, "model_index.json", unet=[None, None]),
        ("model_index.json: names neither unet nor transformer",),
    ),
    "no tokenizer": (
        lambda m: shutil.rmtree(m / "tokenizer"),
        ("has no folder tokenizer", "download the whole pipeline"),
    ),
    "no scheduler": (
        lambda m: shutil.rmtree(m / "scheduler"),
        (SCHEDULER, "No such file", "download the whole folder"),
    ),
    "index cut": (
        lambda m: corrupt.replace_bytes(m, "model_index.json", lambda data: data[:40]),
        ("model_index.json: is not valid JSON",),
    ),
    "shard missing": (
        lambda m: (m / UNET).rename((m / UNET).with_name(
            "diffusion_pytorch_model-00001-of-00002.safetensors"
        )),
        ("1 of 2 shards are there", "download the missing ones"),
    ),
    **{
        f"{name} cut": (
            lambda m, file=file: corrupt.replace_bytes(m, file, lambda data: data[:-100]),
            (file, "cannot be read: it is cut or damaged", "download it again"),
        )
        for name, file in (("network", UNET), ("encoder", TEXT), ("autoencoder", VAE))
    },
    **{
        f"{name} a pointer of git-LFS": (
            lambda m, file=file: corrupt.replace_bytes(m, file, lambda data: POINTER),
            (file, "is a git-LFS pointer", "git lfs pull"),
        )
        for name, file in (("network", UNET), ("encoder", TEXT), ("autoencoder", VAE))
    },
    "a web page": (
        lambda m: corrupt.replace_bytes(m, UNET, lambda data: b"<!DOCTYPE html><html>Sign in"),
        (UNET, "is a web page", "logged in"),
    ),
    "a pickle under another name": (
        lambda m: torch.save({"x": torch.zeros(1)}, m / UNET),
        (UNET, "is a pickle of PyTorch under another name"),
    ),
    "an empty file": (
        lambda m: corrupt.replace_bytes(m, TEXT, lambda data: b""),
        (TEXT, "is empty"),
    ),
    "network not finite": (
        lambda m: corrupt.edit_tensor(m, UNET, "conv_in.weight", nan),
        ("model/unet: conv_in.weight has values that are not finite",),
    ),
    "encoder not finite": (
        lambda m: corrupt.edit_tensor(m, TEXT, "final_layer_norm.weight", nan),
        ("model/text_encoder: final_layer_norm.weight has values that are not finite",),
    ),
    "autoencoder not finite": (
        lambda m: corrupt.edit_tensor(m, VAE, "decoder.conv_in.bias", nan),
        (VAE, "decoder.conv_in.bias has values that are not finite"),
    ),
    "network of another shape": (
        lambda m: corrupt.edit_tensor(m, UNET, "conv_in.weight", lambda t: t[:1]),
        ("model/unet: conv_in.weight has shape (1, 4, 3, 3)", "(16, 4, 3, 3)"),
    ),
    "encoder of another shape": (
        lambda m: corrupt.edit_tensor(m, TEXT, "final_layer_norm.weight", lambda t: t[:1]),
        ("model/text_encoder: final_layer_norm.weight has another shape",),
    ),
    "autoencoder of another shape": (
        lambda m: corrupt.edit_tensor(m, VAE, "decoder.conv_in.bias", lambda t: t[:1]),
        ("model/vae: does not fit an AutoencoderKL", "decoder.conv_in.bias"),
    ),
    "network without a tensor": (
        lambda m: corrupt.edit_tensor(m, UNET, "conv_in.weight", lambda t: None),
        ("model/unet: 1 tensors are missing", "conv_in.weight"),
    ),
    "encoder without a tensor": (
        lambda m: corrupt.edit_tensor(m, TEXT, "final_layer_norm.weight", lambda t: None),
        ("model/text_encoder: final_layer_norm.weight is missing in the weights",),
    ),
    "scheduler key": (
        lambda m: corrupt.edit_json(m, SCHEDULER, thresholding=True),
        (SCHEDULER, "thresholding = True is not supported"),
    ),
    "unknown scheduler": (
        lambda m: corrupt.edit_json(m, SCHEDULER, _class_name="TCDScheduler"),
        (SCHEDULER, "unsupported scheduler class 'TCDScheduler'", "supported are DDPMScheduler"),
    ),
}  # fmt: skip


def assert_refused(result: cli.Result, *sentences: str) -> None:
    """Exit code 2, no traceback, what is wrong and a hint."""
    assert (result.code, result.out) == (2, ""), result.err
    assert "Traceback" not in result.err
    assert "report it" not in result.err
    assert "hint: " in result.err
    for sentence in sentences:
        assert sentence in result.err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_model_is_refused_and_nothing_is_written(
    place: Path, base: Path, fault: str
) -> None:
    model, images = shutil.copytree(base, place / "model"), photos(place / "photos")
    change, sentences = FAULTS[fault]
    change(model)
    before = corrupt.snapshot(place)
    assert_refused(cli.sfumato("finetune", model, images, *SHORT), *sentences)
    assert_refused(cli.sfumato("sample", model, "--num", 1, "--prompt", "a thing"), *sentences)
    assert corrupt.snapshot(place) == before


@pytest.mark.parametrize("ending", ["ckpt", "pt", "bin"])
def test_a_pickle_is_refused_before_it_is_opened(place: Path, ending: str) -> None:
    model, images = place / f"model.{ending}", photos(place / "photos")
    torch.save({"state_dict": {}}, model)
    before = corrupt.snapshot(place)
    for command in (("finetune", model, images), ("sample", model)):
        assert_refused(cli.sfumato(*command), f"model.{ending}: is a .{ending} file: a pickle")
    assert corrupt.snapshot(place) == before


SETTINGS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], tuple[str, ...]]] = {
    "no captions": (
        lambda p: photos(p, caption=""),
        (),
        ("none of 8 images has a caption", 'data.caption="a photo of NAME"'),
    ),
    "a blank caption": (
        lambda p: photos(p, caption=""),
        ("data.caption=' '",),
        ("none of 8 images has a caption",),
    ),
    "a key that is nearly right": (
        photos,
        ("data.captoin=a dog",),
        ("unknown key `captoin`", "did you mean `caption`?"),
    ),
    "a group that is nearly right": (
        photos,
        ("adaptor.rank=4",),
        ("unknown key `adaptor`", "did you mean `adapter`?"),
    ),
    "an odd size": (
        photos,
        ("data.resolution=33",),
        ("data.resolution: images of 33 pixels", "multiples of 2", "use 32 or 34"),
    ),
    "an odd side": (photos, ("data.size=[32, 17]",), ("images of 17 pixels", "use 16 or 18")),
    "too small a size": (photos, ("data.resolution=1",), ("images of 1 pixels", "use 2")),
    "no images": (lambda p: photos(p, num=0), (), ("holds no images",)),
    "no folder": (lambda p: p, (), ("no such file, folder",)),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_images_that_cannot_be_learned_from_are_refused_and_nothing_is_written(
    place: Path, base: Path, case: str
) -> None:
    make, settings, sentences = SETTINGS[case]
    images = make(place / "photos")
    before, model = corrupt.snapshot(place), corrupt.snapshot(base)
    assert_refused(cli.sfumato("finetune", base, images, *SHORT, *settings), *sentences)
    assert corrupt.snapshot(place) == before
    assert corrupt.snapshot(base) == model


def test_numbered_folders_are_named_where_captions_are_missing(place: Path, base: Path) -> None:
    (place / "photos").mkdir()
    for name in ("1_dog", "2_cat"):
        photos(place / "photos" / name, num=4, caption="")
    result = cli.sfumato("finetune", base, place / "photos", *SHORT)
    assert_refused(result, "none of 8 images has a caption", "data.source.folders=kohya")


def test_a_taken_run_directory_is_refused_and_left_alone(place: Path, base: Path) -> None:
    images = photos(place / "photos")
    (place / "run").mkdir()
    (place / "run" / "config.yaml").write_text("name: mine\n")
    before = corrupt.snapshot(place)
    result = cli.sfumato("finetune", base, images, *SHORT, "--run", "run")
    assert_refused(result, "run: there is already a run here")
    assert corrupt.snapshot(place) == before


def finetuned(base: Path, images: Path, *settings: str) -> cli.Result:
    result = cli.sfumato("finetune", base, images, *SHORT, *settings, "--run", "run")
    assert result.code == 0, result.err
    return result


def test_one_caption_for_all_a_read_only_model_and_odd_images_are_said(
    place: Path, base: Path
) -> None:
    """One run for all that is not refused: it takes a second."""
    images = photos(place / "photos", mode="L", caption="")
    shutil.copy(images / "0.png", images / "twin.png")
    model = shutil.copytree(base, place / "model")
    (model / "pipeline.py").write_text(EVIL)
    paths = [*model.rglob("*"), model]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = corrupt.snapshot(model)
    said = finetuned(model, images, "data.caption=a photo of zwxqyvbkj").err
    assert corrupt.snapshot(model) == before
    for path in paths:
        path.chmod(0o755)
    assert "9 images, 9 with a caption" in said
    assert "9 of 9 images have no caption of their own and get 'a photo of zwxqyvbkj'" in said
    assert "all sampled images are gray: they are converted to RGB" in said
    assert "2 images have duplicates or near-duplicates" in said
    assert "0.png, twin.png" in said
    assert "code in the folder is not run: pipeline.py" in said
    assert (
        "warning: the word 'zwxqyvbkj' of the captions is 9 pieces to the tokenizer: "
        "z w x q y v b k j;" in said
    )
    assert "'of'" not in said
    sampled = cli.sfumato("sample", "run", "--num", 1, "--steps", 1, "--prompt", "x" * 200)
    assert sampled.code == 0, sampled.err
    assert "a prompt has 200 characters, of which the model reads the first 75" in sampled.err


@pytest.mark.slow
def test_captions_that_the_encoder_cuts_are_counted(place: Path, base: Path) -> None:
    said = finetuned(base, photos(place / "photos", caption="y" * 90)).err
    assert "distinct captions are truncated, since the model reads 77 tokens" in said
    assert "captions are equal after truncation" in said


def test_a_folder_of_kohya_is_trained_with_its_words(place: Path, base: Path) -> None:
    (place / "set").mkdir()
    photos(place / "set" / "10_sks dog", caption="")
    said = finetuned(base, place / "set").err
    assert "8 images, 8 with a caption" in said
    assert "kohya folder: 10_sks dog/ gives 8 images the caption 'sks dog'; repeats 10" in said
    assert os.listdir(place / "run" / "checkpoints")
