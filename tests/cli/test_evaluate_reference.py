"""`sfumato evaluate MODEL --reference IMAGES`: a model against images that it need not know."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato.adapters import adapted_layers
from sfumato.data import DataConfig, Folder, index
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.lora_names import LayerNames
from sfumato.interop.lora_writing import write_diffusers
from sfumato.interop.single_file import file_tensors
from sfumato.networks import DiffusersConfig
from sfumato.runs import evaluate_run
from sfumato.runs.finetuning import choose_finetuning
from tests.helpers import cli, corrupt
from tests.helpers.diffusers_models import stable_diffusion, unet
from tests.helpers.lora import random_changes, theirs
from tests.helpers.runs import images as category_images
from tests.helpers.runs import tiny_run

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FEW = ("--num", 5, "--guidance", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photos(folder: Path, *, num: int = 14, captions: bool = True) -> Path:
    folder.mkdir()
    for number in range(num):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(f"a thing number {number}")
    return folder


def test_a_model_folder_is_compared_with_the_reference_and_left_as_it_was(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, before = photos(place / "photos"), corrupt.snapshot(model)
    prompts: list[list[str]] = []
    sample = Pipeline.sample_request

    def noted(self: Pipeline, request: Any, **options: Any) -> torch.Tensor:
        prompts.append(list(request.context["text"]))
        return sample(self, request, **options)

    monkeypatch.setattr(Pipeline, "sample_request", noted)
    result = cli.sfumato("evaluate", model, "--reference", reference, *FEW)
    assert result.code == 0, result.err
    assert corrupt.snapshot(model) == before
    target = place / "generated" / "base" / "evaluation" / "photos" / "evaluation.json"
    assert f"figures: {target.relative_to(place)}" in result.out
    assert "KID to reference" in result.out
    assert "are copies of reference images" in result.out
    assert "training images" not in result.out

    # the same split, read here: half is compared with, the other half gives prompts and real images
    dataset = index(DataConfig(source=Folder(str(reference)), resolution=32, holdout=0.5))
    names = [dataset.entries[i].name for i in dataset.holdout]
    captions = [f"a thing number {name.removesuffix('.png')}" for name in names]
    evenly = np.linspace(0, len(captions) - 1, min(5, len(captions))).round().astype(int)
    assert prompts[0] == ([captions[i] for i in evenly] * 5)[:5]
    assert set(map(str, prompts[1])) <= set(captions)
    assert f"compared with {len(dataset.training)} images" in result.out

    def pixels(positions: np.ndarray) -> np.ndarray:
        files = [reference / dataset.entries[i].name for i in positions]
        small = np.stack(
            [
                np.asarray(Image.open(file), float).reshape(8, 4, 8, 4, 3).mean((1, 3))
                for file in files
            ]
        )
        centred = small - small.mean((1, 2, 3), keepdims=True)
        return centred / centred.std((1, 2, 3), keepdims=True)

    known, real = pixels(dataset.training), pixels(dataset.holdout)
    distances = [
        np.linalg.norm((each[:, None] - known[None]).reshape(len(each), len(known), -1), axis=2)
        for each in (real, real[:, :, ::-1])
    ]
    nearest = np.minimum(*(each.min(1) for each in distances))
    rows = json.loads(target.read_text())["rows"]
    assert rows[0]["nearest"]["value"] == pytest.approx(nearest.mean(), rel=1e-4)
    assert [row["n"] for row in rows] == [len(real), 5, 5]


def test_a_model_folder_needs_a_reference_and_says_so(place: Path, model: Path) -> None:
    result = cli.sfumato("evaluate", model)
    assert result.code == 2
    assert "base: is a model folder of diffusers" in result.err
    assert "--reference FOLDER" in result.err
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"captions": False}, "has no captions, and the model reads text"),
        ({"num": 5}, "5 images, too few to compare with"),
    ],
)
def test_a_reference_that_does_not_do_is_refused(
    place: Path, model: Path, options: dict[str, Any], sentence: str
) -> None:
    result = cli.sfumato("evaluate", model, "--reference", photos(place / "x", **options), *FEW)
    assert result.code == 2
    assert f"x: {sentence}" in result.err
    assert "hint: " in result.err
    assert not (place / "generated").exists()


def test_one_caption_stands_for_images_that_have_none(place: Path, model: Path) -> None:
    reference = photos(place / "photos", captions=False)
    words = ("--caption", "a photo of sks dog")
    result = cli.sfumato("evaluate", model, "--reference", reference, *words, *FEW)
    assert result.code == 0, result.err
    assert "all prompts are the same" in result.out + result.err
    refused = cli.sfumato("evaluate", model, *words)
    assert refused.code == 2
    assert "--reference" in refused.err


def test_a_file_that_holds_no_statistics_is_refused_before_any_work(
    place: Path, model: Path
) -> None:
    reference, file = photos(place / "photos"), place / "other.npz"
    file.write_bytes(b"<html>")
    result = cli.sfumato("evaluate", model, "--reference", reference, "--statistics", file, *FEW)
    assert result.code == 2
    assert "other.npz: holds no reference statistics" in result.err
    assert "mu (d,) and sigma (d, d)" in result.err
    assert not (place / "generated").exists()


def test_a_run_is_compared_with_other_images_of_its_categories(place: Path) -> None:
    import sfumato
    from sfumato.training import Budget

    own = category_images(place / "own", count=24)
    run = sfumato.train(tiny_run(own, budget=Budget(steps=1)), run=place / "run")
    others = category_images(place / "others", count=30)
    result = cli.sfumato("evaluate", run, "--reference", others, *FEW)
    assert result.code == 0, result.err
    assert (run / "evaluation" / "others" / "evaluation.json").is_file()
    assert not (run / "evaluation" / "evaluation.json").exists()
    first = next(path for path in others.iterdir() if path.is_dir())
    first.rename(others / "unheard of")
    result = cli.sfumato("evaluate", run, "--reference", others, *FEW)
    assert result.code == 2
    assert "others: has category" in result.err
    assert "unheard of" in result.err


def test_loras_are_added_and_recorded_apart_from_the_model_alone(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = place / "style.safetensors"
    network = unet(32)
    changes = {"unet": random_changes(network)}
    write_diffusers(lora, changes, LayerNames(network), dtype=torch.float32, header={})
    scales: set[float] = set()
    sample = Pipeline.sample_request

    def noted(self: Pipeline, request: Any, **options: Any) -> torch.Tensor:
        scales.update(layer.scale for layer in adapted_layers(self.model).values())
        return sample(self, request, **options)

    monkeypatch.setattr(Pipeline, "sample_request", noted)
    given = ("evaluate", model, "--reference", photos(place / "photos"), *FEW)
    result = cli.sfumato(*given, "--lora", f"{lora}:0.5")
    assert result.code == 0, result.err
    assert scales == {0.5}
    target = place / "generated/base/evaluation/photos/with-style-0.5/evaluation.json"
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    said = f"with the LoRA style.safetensors (SHA-256 {digest[:12]}) at strength 0.5"
    assert said in json.loads(target.read_text())["remarks"]
    assert f"note: {said}" in result.out
    assert not (target.parents[1] / "evaluation.json").exists()
    refused = cli.sfumato(*given, "--lora", model / "unet" / "diffusion_pytorch_model.safetensors")
    assert refused.code == 2
    assert "holds no LoRA" in refused.err


def test_a_single_file_is_evaluated_and_fine_tuned_like_a_folder(place: Path, model: Path) -> None:
    file = place / "one.safetensors"
    save_file(file_tensors(model), file)
    reference = photos(place / "photos")
    for command in (
        ["evaluate", file, "--reference", reference, *FEW],
        ["finetune", file, reference],
    ):
        refused = cli.sfumato(*command)
        assert refused.code == 2
        assert "is a single file, which lacks its configuration" in refused.err
    result = cli.sfumato("evaluate", file, "--reference", reference, *FEW, "--like", model)
    assert result.code == 0, result.err
    assert (place / "generated/one/evaluation/photos/evaluation.json").is_file()
    chosen = choose_finetuning(file, str(reference), like=model)
    run, lines = chosen.run, chosen.lines
    assert run.name == "photos-one"
    assert any("one.safetensors was converted to" in line for line in lines)
    weights = "diffusion_pytorch_model.safetensors"
    own, before = (load_file(f / weights) for f in (Path(run.network.origin), model / "unet"))
    assert own.keys() == before.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in before.items())
    refused = cli.sfumato("finetune", model, reference, "--like", model)
    assert "is a folder, and `like` is for single files" in refused.err


def test_a_variant_is_evaluated_and_fine_tuned_if_it_is_named(place: Path, model: Path) -> None:
    copy = Path(shutil.copytree(model, place / "copy"))
    theirs(copy).to(torch.float16).save_pretrained(copy, variant="fp16")
    reference = photos(place / "photos")
    run = choose_finetuning(copy, str(reference), variant="fp16").run
    assert isinstance(run.network, DiffusersConfig)
    assert run.network.variant == run.conditioner.text.variant == "fp16"
    told = {"variant": "", "num": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sfumato.runs.loading.load", lambda path, **options: told.update(options) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            evaluate_run(copy, reference=str(reference), variant="fp16")
    assert told["variant"] == "fp16"
