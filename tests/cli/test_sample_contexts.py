"""`sfumato sample` with everything that a model can be asked for, on one tiny run; and what it says
of files that are wrong.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.conditioners import (
    AttributesConfig,
    CategoryConfig,
    DoodleConfig,
    LearnedTextConfig,
    PointsConfig,
    ReferenceConfig,
)
from sfumato.contexts import ContextConfig
from sfumato.data import DataConfig, Folder
from sfumato.generation.diffusion_model import SamplingConfig
from sfumato.networks import UNetConfig
from sfumato.recipes import Run
from sfumato.runs import train
from sfumato.training import (
    Budget,
    FixedEMA,
    OptimizerConfig,
    PreviewConfig,
    ValidationConfig,
    hooks,
)
from tests.helpers.cli import Result, sfumato

SIDE = 8
WORDS = ["a dark square", "a bright square", "noise", "two squares"]


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def random_pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (SIDE, SIDE))


def npy(seed: int, dimensions: int = 2, count: int = 10) -> bytes:
    buffer = io.BytesIO()
    np.save(
        buffer, np.random.default_rng(seed).uniform(-1, 1, (count, dimensions)).astype(np.float32)
    )
    return buffer.getvalue()


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def drawn(root: Path, count: int = 16) -> Path:
    """Images with a category, a caption, a doodle, a cloud and attributes each."""
    files: dict[str, bytes] = {}
    for i in range(count):
        stem = f"{'ab'[i % 2]}/{i:02d}"
        files |= {
            f"{stem}.png": encoded(random_pixels(i, SIDE, SIDE, 3)),
            f"{stem}.txt": WORDS[i % 4].encode(),
        }
        files |= {
            f"{stem}.doodle.png": encoded(random_pixels(100 + i)),
            f"{stem}.points.npy": npy(i),
        }
        files[f"{stem}.json"] = json.dumps({"attributes": {"age": i}}).encode()
    return put(root, files)


def settings(root: Path) -> Run:
    contexts = ContextConfig(
        category=CategoryConfig(size=8),
        attributes=AttributesConfig(size=8),
        text=LearnedTextConfig(size=16, layers=1, heads=2, length=9),
        reference=ReferenceConfig(size=16, side=2),
        doodle=DoodleConfig(),
        points=PointsConfig(size=16, heads=2, tokens=3, layers=1),
    )
    return Run(
        name="drawn",
        data=DataConfig(source=Folder(str(root)), resolution=SIDE, holdout=0.2),
        network=UNetConfig(
            channels=32, multipliers=(1, 1), blocks=1, attention_depths=(1,), head_channels=32
        ),
        conditioner=contexts,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        ema=FixedEMA(0.5),
        batch_size=8,
        precision="float32",
        budget=Budget(steps=9),
        validation=ValidationConfig(samples=4, copy_samples=0),
        preview=PreviewConfig(num=2),
        sampling=SamplingConfig(steps=3),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for nine steps, with snapshots at 2 and 4."""
    root = tmp_path_factory.mktemp("drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "SNAPSHOTS", frozenset({2, 4}))
        return train(settings(drawn(root / "images")), run=root / "run")


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files to ask with, in the working directory."""
    mask = np.zeros((SIDE, SIDE))
    mask[:, :4] = 255
    files = {
        "doodle.png": encoded(random_pixels(200)),
        "other.png": encoded(random_pixels(201, 30, 20, 3)),
        "mask.png": encoded(mask),
        "points.npy": npy(200),
        "points.csv": b"x,y\n0,0\n0.5,-0.5\n",
        "solid.npy": npy(201, dimensions=3),
        "cut.npy": npy(202)[:-5],
        "cut.png": encoded(random_pixels(202))[:50],
        "page.png": b"<html>",
        "empty.png": b"",
        "empty.npy": b"",
        "words.csv": b"hello\n",
        "nan.csv": b"0,nan\n",
    }
    monkeypatch.chdir(put(tmp_path / "here", files))
    return tmp_path / "here"


def sampled(run: Path, *options: object, out: str = "out", num: int = 2) -> Result:
    return sfumato("sample", run, "--num", num, "--out", out, *options)


def images(folder: str = "out") -> np.ndarray:
    """All images in a folder in gray, (n, H, W)."""
    return np.stack(
        [
            np.asarray(Image.open(path).convert("L")).astype(int)
            for path in sorted(Path(folder).glob("0*.png"))
        ]
    )


def noted(folder: str = "out") -> dict:
    with Image.open(f"{folder}/grid.png") as image:
        return json.loads(image.text["sfumato"])


def made(run: Path, *options: object, out: str = "out", num: int = 2) -> np.ndarray:
    shutil.rmtree(out, ignore_errors=True)
    result = sampled(run, *options, out=out, num=num)
    assert result.code == 0, result.err
    assert result.out == f"{out}/grid.png\n"
    return images(out)


def assert_refused(result: Result, what: str, *, where: str = "", hint: str = "") -> None:
    """Exit code 2 and a message that says what, where and how to fix it."""
    assert result.code == 2
    assert result.out == ""
    said = [line for line in result.err.splitlines() if not line.startswith("note: ")]
    assert said[0].startswith(f"error: {where}")
    assert what in result.err
    assert f"\n  hint: {hint}" in result.err
    assert "Traceback" not in result.err


# --- what may be asked ----------------------------------------------------------------------------

OPTIONS = {
    "prompt": ["--prompt", "a dark square"],
    "category": ["--category", "b"],
    "attribute": ["--attribute", "age=-40"],
    "doodle": ["--doodle", "doodle.png"],
    "points": ["--points", "points.npy"],
    "reference": ["--reference", "other.png"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_images_and_is_noted_in_them(run: Path, given: Path, name: str) -> None:
    nothing, asked = made(run), made(run, *OPTIONS[name])
    assert (asked != nothing).any()
    value = OPTIONS[name][1]
    assert noted()[name] == ([value] if name in ("prompt", "category", "attribute") else value)
    assert (made(run, *OPTIONS[name]) == asked).all()


def test_everything_together(run: Path, given: Path) -> None:
    options = [option for pair in OPTIONS.values() for option in pair]
    guided = [
        "--negative",
        "noise",
        "--guidance",
        "text=3",
        "--guidance",
        "doodle=2",
        "--guidance",
        "points=0.5",
    ]
    image = ["--image", "other.png", "--strength", "0.7", "--mask", "mask.png"]
    whole = made(
        run,
        *options,
        *guided,
        *image,
        "--autoguidance",
        4,
        "--autoguidance-scale",
        2,
        "--guidance-interval",
        -20,
        20,
    )
    assert noted()["guidance"] == {"text": 3.0, "doodle": 2.0, "points": 0.5}
    assert (noted()["strength"], noted()["image"], noted()["mask"], noted()["autoguidance"]) == (
        0.7,
        "other.png",
        "mask.png",
        4,
    )
    assert noted()["negative"] == "noise"
    assert (made(run, *options, *image) != whole).any()


def test_several_prompts_are_taken_in_turn(run: Path, given: Path) -> None:
    both = made(run, "--prompt", "a dark square", "--prompt", "noise", num=4)
    assert (both[::2] == made(run, "--prompt", "a dark square", num=4)[::2]).all()
    assert (both[1::2] == made(run, "--prompt", "noise", num=4)[1::2]).all()


def test_points_may_be_text(run: Path, given: Path) -> None:
    assert (made(run, "--points", "points.csv") != made(run, "--points", "points.npy")).any()


def test_guidance_is_one_number_or_one_for_each_context(run: Path, given: Path) -> None:
    asked = [*OPTIONS["prompt"], *OPTIONS["doodle"]]
    one = made(run, *asked, "--guidance", 3)
    assert (made(run, *asked, "--guidance", "text=3", "--guidance", "doodle=3") == one).all()
    assert (made(run, *asked, "--guidance", "text=3", "--guidance", "doodle=1") != one).any()
    assert (
        made(run, *asked, "--guidance", 3, "--guidance-interval", 60, 61) == made(run, *asked)
    ).all()


def test_a_negative_prompt_leads_away(run: Path, given: Path) -> None:
    asked = [*OPTIONS["prompt"], "--guidance", 4]
    assert (made(run, *asked, "--negative", "noise") != made(run, *asked)).any()


def test_a_image_is_returned_changed_or_forgotten(run: Path, given: Path) -> None:
    same, near, new = (
        made(run, "--image", "doodle.png", "--strength", strength) for strength in (0, 0.02, 1)
    )
    original = np.asarray(Image.open("doodle.png")).astype(int)
    assert (same == original).all()
    assert 0 < np.abs(near - original).mean() < np.abs(new - original).mean()
    assert (new == made(run)).all()


def test_only_the_white_part_of_a_mask_is_made_anew(run: Path, given: Path) -> None:
    changed = made(run, "--image", "doodle.png", "--mask", "mask.png")
    original = np.asarray(Image.open("doodle.png")).astype(int)
    assert np.abs(changed[:, :, 4:] - original[:, 4:]).max() <= 1
    assert np.abs(changed[:, :, :4] - original[:, :4]).mean() > 5


def test_the_way_to_another_prompt_or_seed(run: Path, given: Path) -> None:
    way = made(
        run,
        "--prompt",
        "noise",
        "--to-prompt",
        "a dark square",
        "--seed",
        3,
        "--to-seed",
        4,
        "--guidance",
        2,
        num=5,
    )
    assert len(way) == 5
    assert (noted()["to_prompt"], noted()["to_seed"]) == ("a dark square", 4)
    first = made(run, "--prompt", "noise", "--seed", 3, "--guidance", 2, num=1)
    last = made(run, "--prompt", "a dark square", "--seed", 4, "--guidance", 2, num=1)
    assert np.abs(way[0] - first[0]).max() <= 1
    assert np.abs(way[-1] - last[0]).max() <= 1
    unguided = made(
        run, "--to-prompt", "noise", "--guidance", 5, "--guidance-interval", 60, 61, num=3
    )
    assert (unguided == made(run, "--to-prompt", "noise", num=3)).all()
    assert (made(run, "--to-seed", 0, num=3)[0] == made(run, num=1)[0]).all()


def test_images_are_led_away_from_a_snapshot(run: Path, given: Path) -> None:
    plain = made(run, *OPTIONS["prompt"])
    assert (
        np.abs(
            made(run, *OPTIONS["prompt"], "--autoguidance", 2, "--autoguidance-scale", 1) - plain
        ).max()
        <= 1
    )
    assert (
        made(run, *OPTIONS["prompt"], "--autoguidance", 2, "--autoguidance-scale", 3) != plain
    ).any()
    assert (
        made(run, *OPTIONS["prompt"], "--autoguidance", 3)
        == made(run, *OPTIONS["prompt"], "--autoguidance", 2)
    ).all()


def test_a_prompt_that_is_cut_is_said_to_be(run: Path, given: Path) -> None:
    result = sampled(run, "--prompt", "a dark square " * 100)
    assert result.code == 0
    assert result.err.startswith(
        "note: a prompt has 1400 characters, of which the model reads the first "
    )
    assert sampled(run, "--prompt", "noise", out="another").err == ""


@pytest.mark.parametrize(
    "prompt", ["", "猫 🐈", "$(touch owned); ../x", "\x1b]0;owned\x07\n<b>", "\udcff"]
)
def test_prompts_are_text_and_nothing_else(run: Path, given: Path, prompt: str) -> None:
    made(run, "--prompt", prompt, "--guidance", 2)
    assert noted()["prompt"] == [prompt]
    assert "owned" not in os.listdir()


# --- which run ------------------------------------------------------------------------------------


def test_without_a_run_the_newest_is_taken(run: Path, given: Path) -> None:
    for number, name in enumerate(("old", "newer", "newest", "oldest")):
        shutil.copytree(run, f"runs/{name}")
        for path in [*Path(f"runs/{name}").rglob("*"), Path(f"runs/{name}")]:
            os.utime(path, (1e9 + number, 1e9 + number))
    for path in Path("runs/oldest").iterdir():
        os.utime(path, (9e8, 9e8))
    put(Path("runs/no run"), {"notes.txt": b"later than all"})
    assert (
        sfumato("sample", "--num", 1, "--seed", 5).out == "runs/newest/generated/seed-5/grid.png\n"
    )


def test_without_any_run_it_says_how_to_make_one(given: Path) -> None:
    assert_refused(
        sfumato("sample"),
        "no run to sample from",
        where="runs",
        hint="name a run directory, or train one: sfumato train",
    )
    assert_refused(
        sfumato("sample", "nowhere"), "is not a run", where="nowhere", hint="name a folder"
    )


# --- what is wrong --------------------------------------------------------------------------------

IMAGES = "give a PNG, JPEG, WebP, BMP, GIF or TIFF"
CLOUDS = "give a .npy, .ply, .xyz or .csv of numbers"


@pytest.mark.parametrize(
    ("option", "file"),
    [
        *(
            ("--doodle", file)
            for file in ("nowhere.png", "cut.png", "page.png", "empty.png", ".", "points.npy")
        ),
        *((option, "cut.png") for option in ("--reference", "--image", "--mask")),
    ],
)
def test_files_that_are_no_images_are_named(run: Path, given: Path, option: str, file: str) -> None:
    assert_refused(
        sampled(run, option, file), "cannot be used as an image: ", where=file, hint=IMAGES
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "file", ["nowhere.npy", "cut.npy", "empty.npy", "words.csv", "nan.csv", ".", "doodle.png"]
)
def test_files_that_are_no_clouds_are_named(run: Path, given: Path, file: str) -> None:
    assert_refused(
        sampled(run, "--points", file), "cannot be used as a point cloud: ", where=file, hint=CLOUDS
    )


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (["--points", "solid.npy"], "a point cloud of shape (10, 3)", "give N x 2"),
        (["--strength", "0.5"], "without an image", "give `image` too"),
        (["--mask", "mask.png"], "without an image", "give `image` too"),
        (
            ["--image", "doodle.png"],
            "an image was given without strength or mask",
            "give a strength",
        ),
        (
            ["--image", "doodle.png", "--strength", "1.5"],
            "strength 1.5",
            "use 0 (keep the image) to 1",
        ),
        (["--image", "doodle.png", "--strength", "nan"], "strength nan", "use 0"),
        (["--category", "c"], "no category 'c'", "the model knows a, b"),
        (["--attribute", "agee=1"], "no attribute 'agee'", "did you mean 'age'?"),
        (["--attribute", "age=inf"], "attribute age = inf", "use a finite number"),
        (
            ["--prompt", "x", "--negative", "y"],
            "a negative prompt has no effect at guidance 1",
            "give a guidance above 1",
        ),
        (
            ["--guidance", "txt=2"],
            "guidance txt = 2.0",
            "finite numbers for category, attributes, text",
        ),
        (["--guidance", "nan"], "= nan", "finite numbers for"),
        (
            ["--to-seed", "2", "--image", "doodle.png", "--strength", "0.5"],
            "in an interpolation",
            "leave them out",
        ),
        (
            ["--to-prompt", "x", "--to-seed", "1", "--negative", "y"],
            "a negative prompt has no effect at guidance 1",
            "give a guidance",
        ),
    ],
)
def test_what_does_not_fit_is_said(
    run: Path, given: Path, options: list[str], what: str, hint: str
) -> None:
    assert_refused(sampled(run, *options), what, where="sample", hint=hint)
    assert not Path("out").exists()


def test_a_step_before_the_first_snapshot_names_those_that_there_are(
    run: Path, given: Path
) -> None:
    assert_refused(
        sampled(run, "--autoguidance", 1),
        "no snapshot at or before step 1",
        where=f"{run}/snapshots",
        hint="there are 2, 4",
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--guidance", "text=much"],
        ["--guidance", "two"],
        ["--attribute", "age"],
        ["--strength", "x"],
    ],
)
def test_what_is_no_number_is_said(run: Path, given: Path, options: list[str]) -> None:
    result = sampled(run, *options)
    assert result.code == 2
    assert options[0] in result.err
    assert "Traceback" not in result.err


def test_names_of_files_reach_no_terminal_as_they_are(run: Path, given: Path) -> None:
    result = sampled(run, "--doodle", "\x1b]0;owned\x07.png")
    assert result.code == 2
    assert "\x1b" not in result.err
