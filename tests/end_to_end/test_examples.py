"""Every file in examples/ runs as it is, offline and within seconds, and does what it says."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from sfumato import config as configuration

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES, COLUMNS, AT_ONCE, LIMIT_S = 80, 100, 2, 300


def numbers(pattern: str, printed: str) -> list[float]:
    """The numbers in the groups of the one line that fits a pattern."""
    (found,) = re.findall(pattern, printed)
    return [float(number) for number in ([found] if isinstance(found, str) else found)]


def row(printed: str, figure: str) -> list[str]:
    """The cells of a table's row: context, figure, number of images, samples, shuffled conditions,
    real images, whether they follow.
    """
    (line,) = [line for line in printed.splitlines() if re.search(rf"  {figure} ", line)]
    return re.split(r"\s{2,}", line.strip())


def resumed(run: Path, first: int, last: int) -> dict:
    """The configuration of a finished run that was resumed once at step `first`, and has seen every
    step up to `last` once.
    """
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", last)
    assert (run / "checkpoints" / f"step-{last:09d}").is_dir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, *range(10, last + 1, 10)]
    assert [line["step"] for line in lines if "validation/ema/eps_mse" in line] == [first, last]
    return configuration.load_yaml_file(run / "config.yaml")


def minimal_training(printed: str, folder: Path) -> None:
    first, last = (numbers(rf"step {step}: loss (.*)", printed)[0] for step in (20, 100))
    assert last < 0.75 * first
    with Image.open(folder / "minimal_training.png") as image:
        assert image.size == (256, 256)
        assert len(image.getcolors()) > 50  # 16 digits that have not collapsed to black


def own_network(printed: str, folder: Path) -> None:
    settings = resumed(folder / "runs/own-network", 40, 120)
    assert settings["network"] == {"kind": "tiny-res-net", "width": 32, "depth": 4}
    assert "samples of WrappedResNet: (10, 1, 8, 8)" in printed
    assert row(printed, "category accuracy")[-1] == "yes"


def own_data(printed: str, folder: Path) -> None:
    settings = resumed(folder / "runs/own-data", 30, 90)
    assert settings["data"]["source"] == {"kind": "discs", "num": 200}
    small, large = numbers(r"brightness: (.*) with radius 1.2, (.*) with radius 2.8", printed)
    assert large > 1.5 * small > 0
    real, made = (
        numbers(rf"{name}.*: distance .* (.*)", printed)[0]
        for name in ("held-out real images", "samples")
    )
    assert 0 < real < made < 10


def own_weighting_and_schedule(printed: str, folder: Path) -> None:
    settings = resumed(folder / "runs/own-schedule", 30, 60)
    assert settings["objective"]["weighting"] == {"kind": "middle", "width": 5.0}
    assert settings["objective"]["schedule"] == {"kind": "power", "power": 1.5}
    # t^2 at 1, 0.8, ... 0.2
    assert "10 samples; sigma at each step: 1.00, 0.64, 0.36, 0.16, 0.04" in printed
    assert "changed: Middle(width=3.0), Power(power=1.0)" in printed


def own_context(printed: str, folder: Path) -> None:
    dark, bright = numbers(r"samples: (.*) where 0.2 is requested, (.*) where it is 0.8", printed)
    assert bright > dark + 0.3
    assert row(printed, "error")[-1] == "yes"
    said = json.loads(
        (folder / "runs/own-context/samples/step-000000100/samples.json").read_text()
    )["brightness"]
    assert len(set(said)) > 5
    assert all(0 <= float(value) <= 1 for value in said)


def autoguidance(printed: str, folder: Path) -> None:
    assert (folder / "runs/autoguidance/snapshots/step-000000256.safetensors").is_file()
    assert "scale 1 is no guidance: True" in printed
    assert numbers(r"scale 2 moves samples by (.*) on average", printed)[0] > 0.002
    assert (folder / "runs/autoguidance/autoguidance.png").is_file()


def inpainting(printed: str, folder: Path) -> None:
    kept, made = numbers(r"the kept half differs by (.*), the new half by (.*)", printed)
    assert kept < 1e-4
    assert made > 0.05
    strengths = [
        numbers(rf"strength {strength}: differs by (.*)", printed)[0]
        for strength in (0.2, 0.5, 0.8)
    ]
    assert 0 < strengths[0] < strengths[1] < strengths[2]
    assert "another size: (2, 1, 8, 21)" in printed
    files = sorted((folder / "runs/inpainting/generated").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    (settings,) = re.findall(r"00002.png was made with (.*)", printed)
    expected = {"num": 3, "seed": 7, "steps": 10, "sampler": "dpm-solver++2m", "index": 2}
    assert expected.items() <= ast.literal_eval(settings).items()


def latent_training(printed: str, folder: Path) -> None:
    settings = resumed(folder / "runs/latents", 30, 60)
    assert settings["autoencoder"]["kind"] == "trained"
    stage = json.loads((folder / "runs/latents/autoencoder/status.json").read_text())
    assert (stage["state"], stage["step"]) == ("finished", 40)
    assert "images (3, 16, 16), latents (4, 4, 4)" in printed
    error, variance = numbers(r"error of reconstructions: (.*); variance of images: (.*)", printed)
    assert 0 < error < 0.6 * variance


CHECKS: dict[str, Callable[[str, Path], None]] = {
    check.__name__: check
    for check in (
        minimal_training,
        own_network,
        own_data,
        own_weighting_and_schedule,
        own_context,
        autoguidance,
        inpainting,
        latent_training,
    )
}
QUICK = ("minimal_training", "own_context")
Outcomes = dict[str, tuple[Path, "Future[subprocess.CompletedProcess[str]]"]]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcomes]:
    """The chosen examples, a few at once, since most of their time goes into starting Python and
    torch.
    """
    chosen = [
        name
        for name in CHECKS
        if any(item.name == f"test_example[{name}]" for item in request.session.items)
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        folders = {name: tmp_path_factory.mktemp(name) for name in chosen}
        yield {
            name: (folder, pool.submit(started, name, folder)) for name, folder in folders.items()
        }
        pool.shutdown(cancel_futures=True)


def started(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name)
        for name in CHECKS
    ],
)
def test_example(name: str, outcomes: Outcomes) -> None:
    folder, future = outcomes[name]
    outcome = future.result()
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    CHECKS[name](outcome.stdout, folder)


def test_every_example_is_run() -> None:
    assert sorted(path.stem for path in EXAMPLES.rglob("*.py")) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_examples_are_short_and_say_what_they_show(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    lines = text.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert f"python examples/{name}.py" in (ast.get_docstring(ast.parse(text)) or "")
    assert text.startswith('"""')
