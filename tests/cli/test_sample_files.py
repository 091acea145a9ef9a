"""What `sfumato sample` writes and where: never over another request's images, each whole,
completed by the same command.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import runs
from sfumato.autoencoders import Pixels
from sfumato.cli import sample_output, sample_writer
from sfumato.cli.sample_output import Generated
from sfumato.conditioners import CategoryConfig, ConditioningInfo, LearnedTextConfig
from sfumato.contexts import ContextConfig
from sfumato.data import DataConfig, Digits
from sfumato.generation.diffusion_model import SamplingConfig
from sfumato.generation.pipeline import Pipeline
from sfumato.networks import UNetConfig
from sfumato.observability.image_formats import settings_of
from sfumato.recipes import Run
from sfumato.runs.preparation import build_model
from tests.helpers.cli import Result, sfumato

SIDE = 8
Made = Callable[..., Pipeline]


def pipeline(channels: int = 1, *, steered: bool = True, **info: Any) -> Pipeline:
    """A tiny model with random weights; any info of its training set."""
    contexts = ContextConfig(
        category=CategoryConfig(size=8),
        text=LearnedTextConfig(size=16, layers=1, heads=2, length=9),
    )
    run = Run(
        name="tiny",
        network=UNetConfig(
            channels=32, multipliers=(1,), blocks=1, attention_depths=(), head_channels=32
        ),
        conditioner=contexts if steered else ContextConfig(),
        sampling=SamplingConfig(steps=2),
        data=DataConfig(source=Digits(), resolution=SIDE, channels=channels),
    )
    known = ConditioningInfo(
        channels=channels, categories=("cat", "dog", "solo"), words=("a", "red", "heart"), **info
    )
    model = build_model(run, known).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    shape = (channels, SIDE, SIDE)
    return Pipeline(
        model=model,
        autoencoder=Pixels(channels),
        sampling=run.sampling,
        info=known,
        image_shape=shape,
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory whose model is `pipeline()`; the working directory is its parent."""
    monkeypatch.chdir(tmp_path)
    trained(monkeypatch, pipeline())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    return Path("run")


def trained(monkeypatch: pytest.MonkeyPatch, model: Pipeline) -> None:
    monkeypatch.setattr(runs, "load", lambda *_, **__: model)


def sampled(run: Path, *options: object) -> Result:
    return sfumato("sample", run, *options)


def names(folder: str | Path) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def pixels(folder: str | Path) -> np.ndarray:
    return np.stack(
        [np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("0*.png"))]
    )


# --- never over another's files -------------------------------------------------------------------


def test_another_request_gets_a_folder_of_its_own_and_the_same_one_is_completed(run: Path) -> None:
    assert sampled(run, "--num", 2, "--prompt", "a heart").out == "run/generated/seed-0/grid.png\n"
    first = (run / "generated/seed-0/00000.png").stat()
    assert sampled(run, "--num", 2, "--prompt", "red").out == "run/generated/seed-0-2/grid.png\n"
    assert (
        sampled(run, "--num", 2, "--prompt", "a red heart").out
        == "run/generated/seed-0-3/grid.png\n"
    )
    result = sampled(run, "--num", 4, "--prompt", "a heart")
    assert result.out == "run/generated/seed-0/grid.png\n"
    assert "note: 2 of 4 images are in run/generated/seed-0 already" in result.err
    again = (run / "generated/seed-0/00000.png").stat()
    assert (again.st_mtime_ns, again.st_ino) == (first.st_mtime_ns, first.st_ino)
    assert names(run / "generated/seed-0") == {"grid.png", *(f"0000{i}.png" for i in range(4))}
    sampled(run, "--num", 4, "--prompt", "a heart", "--out", "fresh")
    assert np.abs(pixels(run / "generated/seed-0") - pixels("fresh")).max() <= 1
    assert (
        np.asarray(Image.open(run / "generated/seed-0/grid.png"))
        == np.asarray(Image.open("fresh/grid.png"))
    ).all()


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", 3],
        ["--sampler", "ddim"],
        ["--category", "cat"],
        ["--guidance", 1.5, "--prompt", "red"],
        ["--clip"],
        ["--precision", "bfloat16"],
        ["--format", "tiff"],
        ["--to-seed", 4],
    ],
)
def test_whatever_decides_an_image_makes_another_request(run: Path, options: list[object]) -> None:
    sampled(run, "--num", 1)
    assert sampled(run, "--num", 1, *options).out == "run/generated/seed-0-2/grid.png\n"
    assert sampled(run, "--num", 1).out == "run/generated/seed-0/grid.png\n"


def test_other_weights_or_another_file_of_the_same_name_make_another_request(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ["--num", 1, "--image", "start.png", "--strength", 0.5]
    Image.new("L", (SIDE, SIDE), 10).save("start.png")
    assert sampled(run, *start).out == "run/generated/seed-0/grid.png\n"
    Image.new("L", (SIDE, SIDE), 200).save("start.png")
    assert sampled(run, *start).out == "run/generated/seed-0-2/grid.png\n"
    other = pipeline()
    next(other.model.parameters()).mul_(1.5)
    trained(monkeypatch, other)
    assert sampled(run, *start).out == "run/generated/seed-0-3/grid.png\n"


@pytest.mark.parametrize("name", ["00000.png", "00001.png", "grid.png"])
def test_a_file_of_ones_own_is_not_replaced(run: Path, name: str) -> None:
    Path("mine").mkdir()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(f"mine/{name}")
    before = Path("mine", name).read_bytes()
    result = sampled(run, "--num", 2, "--out", "mine")
    assert result.code == 2
    assert result.err.startswith(
        "error: mine: holds 1 file(s) that would be replaced and were not made by this request"
    )
    assert "--out" in result.err
    assert (names("mine"), Path("mine", name).read_bytes()) == ({name}, before)


def test_what_else_a_folder_holds_stays_and_is_said(run: Path) -> None:
    sampled(run, "--num", 3, "--out", "mine")
    Image.new("L", (2, 2)).save("mine/00009.png")
    Path("mine/notes.txt").write_text("kept")
    result = sampled(run, "--num", 2, "--out", "mine")
    assert result.code == 0
    assert (
        "note: mine also holds 1 more image(s) of the same request, made with a larger --num"
        in result.err
    )
    assert "note: mine also holds 1 numbered image(s) that this request did not make" in result.err
    assert names("mine") == {
        "00000.png",
        "00001.png",
        "00002.png",
        "00009.png",
        "grid.png",
        "notes.txt",
    }


def test_images_without_settings_by_an_older_version_are_left_alone(run: Path) -> None:
    (run / "generated/seed-0").mkdir(parents=True)
    Image.new("L", (2, 2)).save(run / "generated/seed-0/00000.png")
    assert sampled(run, "--num", 1).out == "run/generated/seed-0-2/grid.png\n"
    assert names(run / "generated/seed-0") == {"00000.png"}


def test_two_jobs_at_a_time_never_share_a_folder(run: Path) -> None:
    # of a job that has not written its first image yet
    (run / "generated/seed-0").mkdir(parents=True)
    assert sampled(run, "--num", 1).out == "run/generated/seed-0-2/grid.png\n"


# --- stops and full disks -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_keeps_what_is_finished_and_goes_on(
    run: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Generated.write
    with monkeypatch.context() as patch:
        patch.setattr(
            Generated,
            "write",
            lambda self, i, image: (
                write(self, i, image),
                i == 63 and os.kill(os.getpid(), number),
            )[0],
        )
        result = sampled(run, "--num", 67, "--out", "made")
    assert result.code == 128 + number
    assert "interrupted: 64 of 67 images are in made; the same command goes on" in result.err
    assert names("made") == {f"{i:05d}.png" for i in range(64)}
    result = sampled(run, "--num", 67, "--out", "made")
    assert result.code == 0
    assert len(pixels("made")) == 67
    sampled(run, "--num", 67, "--out", "fresh")
    assert np.abs(pixels("made") - pixels("fresh")).max() <= 1


def test_a_disk_that_fills_up_keeps_what_is_finished(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Generated.write

    def full(self: Generated, number: int, image: torch.Tensor) -> Path:
        if number == 2:
            raise OSError(28, "No space left on device")
        return write(self, number, image)

    monkeypatch.setattr(Generated, "write", full)
    result = sampled(run, "--num", 4, "--out", "made")
    assert result.code == 2
    assert (
        "made: cannot be written to: No space left on device (2 of 4 images are there)"
        in result.err
    )
    assert "--out" in result.err
    assert names("made") == {"00000.png", "00001.png"}


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> Pipeline:
        raise AssertionError("loaded")

    monkeypatch.setattr(runs, "load", load)
    Path("file").write_text("")
    for options in (["--out", "file/inside"], ["--out", "file"]):
        result = sampled(run, *options)
        assert result.code == 2
        assert "cannot be written to" in result.err
        assert "name another folder with --out" in result.err
    monkeypatch.setattr(
        sample_output.tempfile,
        "NamedTemporaryFile",
        lambda **_: (_ for _ in ()).throw(OSError(28, "full")),
    )
    assert "run/generated: cannot be written to: full" in sampled(run).err
    assert names(run) == {"config.yaml"}


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "info", "mode", "ending"),
    [
        (2, {}, "LA", "png"),
        (4, {}, "RGBA", "png"),
        (4, {"alpha": "premultiplied"}, "RGBA", "png"),
        (1, {"bits": 16}, "I;16", "png"),
        (3, {"bits": 16}, "RGB", "png"),
        (4, {"alpha": "none"}, None, "tiff"),
        (5, {}, None, "tiff"),
    ],
)
def test_what_the_model_has_is_what_is_written(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    channels: int,
    info: dict,
    mode: str | None,
    ending: str,
) -> None:
    trained(monkeypatch, pipeline(channels, steered=False, **info))
    result = sampled(run, "--num", 2, "--out", "made")
    assert result.code == 0
    assert names("made") == {"grid.png", f"00000.{ending}", f"00001.{ending}"}
    assert ("PNG cannot hold" in result.err) == (ending == "tiff")
    assert settings_of(Path(f"made/00001.{ending}"))["index"] == 1
    if mode:
        with Image.open("made/00000.png") as image:
            assert image.mode == mode
    before = np.asarray(Image.open("made/grid.png")).astype(int)
    # the grid of images that are read back
    assert sampled(run, "--num", 2, "--out", "made").code == 0
    assert np.abs(np.asarray(Image.open("made/grid.png")).astype(int) - before).max() <= 2


@pytest.mark.parametrize(
    ("info", "kind", "said"),
    [
        ({}, "jpg", "cannot hold alpha"),
        ({"bits": 16}, "webp", "holds 8 bits a value"),
        ({"alpha": "none"}, "png", "4 colour channels"),
    ],
)
def test_a_format_that_cannot_hold_the_images_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, info: dict, kind: str, said: str
) -> None:
    trained(monkeypatch, pipeline(4, steered=False, **info))
    result = sampled(run, "--num", 1, "--format", kind, "--out", "made")
    assert result.code == 2
    assert said in result.err
    assert not Path("made").exists()


@pytest.mark.parametrize("kind", ["png", "tiff", "npy", "webp", "jpg"])
def test_each_format_is_completed_by_the_same_command(run: Path, kind: str) -> None:
    sampled(run, "--num", 1, "--format", kind, "--out", "made")
    result = sampled(run, "--num", 2, "--format", kind, "--out", "made")
    assert result.code == 0
    assert "note: 1 of 2 images are in made already" in result.err
    assert names("made") == {"grid.png", f"00000.{kind}", f"00001.{kind}"} | (
        {"settings.json"} if kind == "npy" else set()
    )


def test_values_of_the_source_are_said_in_the_settings(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(monkeypatch, pipeline(steered=False, value_range=(-1.0, 3.0)))
    for kind, held in (("png", False), ("npy", True)):
        sampled(run, "--num", 1, "--format", kind, "--out", kind)
        said = settings_of(Path(f"{kind}/00000.{kind}"))
        assert (said["value_range"], said["in_values_of_the_source"]) == ([-1.0, 3.0], held)


def test_json_names_every_file(run: Path) -> None:
    said = json.loads(sampled(run, "--num", 2, "--seed", 5, "--trajectory", "--json").out)
    assert said["files"] == [f"run/generated/seed-5/0000{i}.png" for i in range(2)]
    assert all(Path(name).is_file() for name in (*said["files"], said["grid"], said["trajectory"]))
    assert (said["folder"], said["seed"], said["made"]) == ("run/generated/seed-5", 5, 2)
    assert said["settings"]["num"] == 2
    assert said["seconds"] > 0
    assert json.loads(sampled(run, "--num", 2, "--seed", 5, "--json").out)["made"] == 0


def test_there_are_as_many_images_as_prompts_unless_fewer_are_wanted(run: Path) -> None:
    prompts = [option for i in range(20) for option in ("--prompt", f"red {i}")]
    result = sampled(run, *prompts, "--out", "all")
    assert len(pixels("all")) == 20
    assert all(
        line.startswith("note: the training captions never contained")
        for line in result.err.splitlines()
    )
    assert sampled(run, "--out", "sixteen", "--prompt", "red").code == 0
    assert len(pixels("sixteen")) == 16
    result = sampled(run, *prompts, "--num", 18, "--out", "some")
    assert "note: --num 18 leaves out 2 of 20 --prompt: 'red 18', 'red 19'" in result.err
    several = sampled(run, "--prompt", "a", "--prompt", "red", "--to-prompt", "heart")
    assert several.code == 2
    assert "several are given" in several.err


def test_inputs_lie_above_the_images(run: Path) -> None:
    Image.new("L", (SIDE, SIDE), 90).save("start.png")
    Image.fromarray(np.eye(SIDE, dtype=np.uint8) * 255).save("hole.png")
    sampled(run, "--num", 4, "--image", "start.png", "--mask", "hole.png", "--out", "made")
    sampled(run, "--num", 4, "--out", "plain")
    made, plain = (np.asarray(Image.open(f"{folder}/grid.png")) for folder in ("made", "plain"))
    assert made.shape[0] > plain.shape[0] + 50
    assert (made[:80] == 90).mean() > 0.1
    assert (made[:80] == 255).mean() > 0.01
    assert settings_of(Path("made/00000.png"))["sampler"] == "churn"


def test_a_large_grid_shows_the_first_images_and_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(sample_writer, "GRID_MOST", 16)
    result = sampled(run, "--num", 17, "--out", "made")
    assert "note: grid.png shows the first 16 of 17 images" in result.err


def test_the_network_is_compiled_only_where_that_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Pipeline] = []
    monkeypatch.setattr(Pipeline, "compile", lambda model: compiled.append(model))
    assert sampled(run, "--num", 1).code == 0
    assert compiled == []
    assert sampled(run, "--num", 1, "--compile").out == "run/generated/seed-0/grid.png\n"
    assert len(compiled) == 1


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--guidance", 3], "guidance 3 has no effect: no context is given"),
        (
            ["--guidance", "text=3", "--category", "cat"],
            "guidance 3 has no effect: no text is given",
        ),
        (["--resample", 4], "nothing is kept of the images here"),
        (
            ["--category", "solo"],
            "category 'solo' has no training images: all of its images are held out",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(
    run: Path, options: list[object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(monkeypatch, pipeline(untrained=("solo",)))
    result = sampled(run, "--num", 1, *options)
    assert result.code == 2
    assert said in result.err
    assert names(run) == {"config.yaml"}


def test_guidance_of_a_model_that_nothing_steers_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(monkeypatch, pipeline(steered=False))
    assert (
        "guidance 3 has no effect: the model is unconditional" in sampled(run, "--guidance", 3).err
    )
    assert sampled(run, "--guidance", 1, "--num", 1).code == 0


def test_images_that_are_not_finite_are_an_error_and_not_black(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = pipeline()
    next(broken.model.network.parameters()).fill_(float("nan"))
    trained(monkeypatch, broken)
    (run / "checkpoints" / "step-000000016").mkdir(parents=True)
    result = sampled(run, "--num", 1)
    assert result.code == 3
    assert "run: the model's output is not finite (1 of 1 images" in result.err
    assert "try --weights raw" in result.err
    assert "step-000000016" in result.err
    assert not (run / "generated").exists()


def test_clipping_changes_images_and_has_no_meaning_in_latents(run: Path) -> None:
    model = pipeline()
    assert (
        float((model.sample(2, steps=4, clip=True) - model.sample(2, steps=4)).abs().max()) > 1e-3
    )
    configured = replace(model, sampling=replace(model.sampling, clip=True))
    assert torch.equal(configured.sample(2, steps=4), model.sample(2, steps=4, clip=True))
