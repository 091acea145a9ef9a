"""Fine-tuning on one image, on near-duplicates, and beside prior images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.contexts import ContextConfig
from sfumato.data import Folder, index
from sfumato.errors import CheckpointError
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run import Run
from sfumato.runs.finetuning import choose_finetuning
from tests.helpers import cli
from tests.helpers.runs import fingerprint, images, tiny_run
from tests.training.test_resume import interrupted

QUICK = (
    "budget.steps=4",
    "validation.every_steps=4",
    "validation.samples=4",
    "validation.bins=2",
    "preview.num=1",
    "adapter.rank=2",
    "data.category=prime",
    "sampling.steps=2",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the categories even and odd."""
    folder = tmp_path_factory.mktemp("base")
    return sfumato.train(tiny_run(images(folder / "set")), run=folder / "run")


def put(folder: Path, *, num: int) -> Path:
    """The same image `num` times."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(7).integers(10, 240, (32, 32), np.uint8)
    for number in range(num):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_one_image_is_learned_and_what_cannot_be_measured_is_said(
    base: Path, tmp_path: Path
) -> None:
    photos = put(tmp_path / "photos", num=1)
    result = cli.sfumato("finetune", base, photos, *QUICK, "--run", tmp_path / "run")
    assert result.code == 0, result.err
    said = " ".join(result.err.split())
    assert (
        "nothing is held out (there is one image): neither the gain on new images nor "
        "memorization can be measured" in said
    )
    assert "each image is seen about 100 times" not in said  # the steps were set
    verdict = json.loads((tmp_path / "run" / "best" / "verdict.json").read_text())
    assert verdict["best_step"] == 4
    assert verdict["best_base"]["gain"] is None
    assert verdict["best_base"]["drift"] is not None
    assert verdict["sentence"] == (
        "nothing is held out, so that neither the error on new images nor memorization can be "
        "measured: look at the samples"
    )
    assert verdict["sentence"] in said
    report = json.loads((tmp_path / "run" / "finetuning" / "report.json").read_text())
    assert (report["nearest_held_out"], report["spread_real"]) == (None, None)
    assert report["copies"] == 0  # after four steps
    assert {level["gain"] for level in report["levels"]} == {None}
    assert report["parity"] == {
        "difference": None,
        "note": "diffusers has no class for the network unet",
    }
    assert all(level["drift"] > 0 for level in report["levels"])
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "validation/drift/mean" in metrics
    assert "validation/ema" not in metrics  # no error is given for held-out images
    sampled = sfumato.load(tmp_path / "run").sample(1, category="prime", steps=2)
    assert sampled.isfinite().all()
    card = sfumato.export(tmp_path / "run", "bundle") / "README.md"
    assert "new images (squared noise): not measured, since none were held out" in card.read_text()


def test_copies_are_named_and_trained_on(base: Path, tmp_path: Path) -> None:
    photos = put(tmp_path / "photos", num=3)
    result = cli.sfumato("finetune", base, photos, *QUICK, "--run", tmp_path / "run")
    assert result.code == 0, result.err
    said = " ".join(result.err.split())
    assert "share none of them: 0.png, 1.png, 2.png" in said
    assert "nothing is held out (all images are copies or look-alikes of one)" in said


def test_from_scratch_one_image_is_refused_unless_nothing_is_to_be_held_out(tmp_path: Path) -> None:
    run = tiny_run(put(tmp_path / "photos", num=2), conditioner=ContextConfig())
    with pytest.raises(sfumato.errors.DataError, match="1 different readable images among 2"):
        sfumato.train(run, run=tmp_path / "run")
    place = sfumato.train(run, overrides=["data.holdout=0", "budget.steps=2"], run=tmp_path / "run")
    record = json.loads((place / "data.json").read_text())
    assert (record["training"], record["holdout"]) == (2, 0)


def test_the_images_are_listed_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, listed = put(tmp_path / "photos", num=2), []
    listing = Folder.listing
    monkeypatch.setattr(Folder, "listing", lambda self: listed.append(self.path) or listing(self))
    cli.sfumato("finetune", base, photos, *QUICK, "--dry-run")
    assert listed == [str(photos)]


def prior_run(base: Path, tmp_path: Path, *overrides: str) -> Run:
    """A run that is compared with an interrupted one."""
    new = images(tmp_path / "new", count=20) / "even"
    run = choose_finetuning(base, str(new), QUICK).run
    return resolve(run, [*QUICK, "checkpoint.every_steps=2", *overrides])


def test_made_images_are_made_once_and_a_resumed_run_equals_the_whole_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prior_run(base, tmp_path, "preservation.num=5")
    whole = sfumato.train(run, run=tmp_path / "whole")
    broken = interrupted(run, tmp_path / "broken", monkeypatch, after=3)
    made = load_file(broken / "prior_images.safetensors")["images"]
    assert (made.dtype, made.shape) == (torch.uint8, (5, 1, 8, 8))
    assert torch.equal(made, load_file(whole / "prior_images.safetensors")["images"])
    # the base's own images, in its two categories by turns, from noises of their own
    own = sfumato.load(base).sample(53, category=["even", "odd"], steps=2, seed=run.seed)[48:]
    assert float((made / 255 - own).abs().max()) < 0.5 / 255 + 1e-4
    kept = (broken / "prior_images.safetensors").read_bytes()
    (broken / "prior_images.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is gone, and images made now may differ"):
        sfumato.resume(broken)
    save_file({"images": made.flip(0)}, broken / "prior_images.safetensors")
    with pytest.raises(CheckpointError, match="prior images of preservation are not those"):
        sfumato.resume(broken)
    (broken / "prior_images.safetensors").write_bytes(kept)
    with pytest.raises(CheckpointError, match=r"preservation\.num=5"):
        sfumato.resume(broken, overrides=["preservation.num=4"])
    assert fingerprint(sfumato.resume(broken)) == fingerprint(whole)


def test_given_images_are_learned_beside_the_new_ones(base: Path, tmp_path: Path) -> None:
    prior = images(tmp_path / "prior", count=6)
    run = prior_run(base, tmp_path, f"preservation.source={prior}", "budget.steps=2")
    place = sfumato.train(run, run=tmp_path / "run")
    assert not (place / "prior_images.safetensors").exists()
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert all(line["train/preservation"] > 0 for line in lines if "train/loss" in line)
    (prior / "odd" / "001.png").unlink()  # resumed with other images, it would be another run
    with pytest.raises(CheckpointError, match="prior images of preservation are not those"):
        sfumato.resume(place, overrides=["budget.steps=4"])


def test_given_images_that_the_model_cannot_read_are_refused_before_work(
    base: Path, tmp_path: Path
) -> None:
    new, prior = images(tmp_path / "new", count=20) / "even", put(tmp_path / "prior", num=2)
    command = ("finetune", base, new, *QUICK, f"preservation.source={prior}")
    result = cli.sfumato(*command, "--run", tmp_path / "run")
    assert (result.code, "2 of 2 prior images have no category" in result.err) == (2, True)
    for name in ("dogs", "even"):
        (prior / name).mkdir()
        (prior / f"{int(name == 'even')}.png").rename(prior / name / "1.png")
    result = cli.sfumato(*command, "--run", tmp_path / "run")
    assert result.code == 2
    assert "of the category dogs, which the model does not have" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "holdout"), [(20, None), (20, "0"), (60, "0.5"), (120, None)])
def test_each_image_that_is_trained_on_is_seen_a_hundred_times(
    base: Path, tmp_path: Path, count: int, holdout: str | None
) -> None:
    photos = images(tmp_path / "set", count=count)
    overrides = [] if holdout is None else [f"data.holdout={holdout}"]
    chosen = choose_finetuning(base, str(photos), overrides)
    run = chosen.resolved(overrides).run
    trained = len(index(run.data).training)
    views = run.budget.steps * run.batch_size / trained
    # which images are held out is decided one by one, so that their number is only about right
    assert views == pytest.approx(100, rel=0.15)
    (said,) = re.findall(r"each image is seen about (\d+) times", " ".join(chosen.lines))
    assert int(said) == pytest.approx(views, rel=0.15)
