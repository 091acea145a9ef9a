"""The glossary names only what exists, and its toy learns as well as a plain loop does."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.main import get_command

import sfumato.diffusion
import sfumato.recipes.autoencoder_stage
import sfumato.sampling
import sfumato.training
from sfumato.cli.main import app
from sfumato.recipes import resolve

PAGE = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text()
HOMES = (sfumato.diffusion, sfumato.sampling, sfumato.training, sfumato.recipes.autoencoder_stage)
NAMES = {name: value for home in HOMES for name, value in vars(home).items()}
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ")
]
ENTRIES = sorted(
    {entry for row in ROWS if row[0] != "elsewhere" for entry in re.findall(r"`([^`]+)`", row[-1])}
)
OPTIONS = {
    option
    for verb in get_command(app).commands.values()
    for found in verb.params
    for option in found.opts
}


def test_the_page_has_rows_to_check() -> None:
    assert {len(row) for row in ROWS} == {3}
    assert len(ENTRIES) > 50


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_the_glossary_names_exists(entry: str) -> None:
    if entry.startswith("--"):
        option, _, value = entry.partition(" ")
        assert option in OPTIONS
        assert not value or value in sfumato.sampling.SAMPLERS
    elif re.match(r"[a-z_.]+=", entry):
        resolve("ddpm", [entry])
    else:
        eval(entry, dict(NAMES))  # noqa: S307


def toy() -> Callable[..., Tensor]:
    """The page's own function."""
    block = next(
        text
        for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        if "train_and_sample" in text
    )
    scope: dict = {}
    exec(compile(block.partition("torch.manual_seed(0)")[0], "<docs>", "exec"), scope)
    return scope["train_and_sample"]


def plain_loop(points: Tensor, *, steps: int, num: int) -> Tensor:
    """The same as a blog writes it: discrete times, no library."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    layers = nn.Sequential(
        nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
    )

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return layers(torch.cat([x, t.float().reshape(-1, 1).expand(len(x), 1) / 1000], dim=1))

    optimizer = torch.optim.Adam(layers.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        x0, t = points[torch.randint(len(points), (256,))], torch.randint(0, 1000, (256,))
        alpha, sigma, eps = (
            alpha_bar[t].sqrt()[:, None],
            (1 - alpha_bar[t]).sqrt()[:, None],
            torch.randn_like(x0),
        )
        loss = (predict(alpha * x0 + sigma * eps, t) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    x, times = torch.randn(num, 2), torch.linspace(999, 0, 21).long()
    with torch.no_grad():
        for start, stop in pairwise(times):
            eps = predict(x, start)
            x0 = (x - (1 - alpha_bar[start]).sqrt() * eps) / alpha_bar[start].sqrt()
            x = alpha_bar[stop].sqrt() * x0 + (1 - alpha_bar[stop]).sqrt() * eps
    return x


def test_the_toy_comes_as_close_to_the_spiral_as_a_plain_loop() -> None:
    """Within 10 %, over two seeds; one seed varies by 2 % (standard deviation of six), and noise
    lies four times as far.
    """
    angle = torch.linspace(0, 9.4, 2000)
    spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 9
    far = {}
    with torch.random.fork_rng():
        for name, loop in {"toy": toy(), "plain": plain_loop}.items():
            total = 0.0
            for seed in (0, 1):
                torch.manual_seed(seed)
                total += (
                    torch.cdist(loop(spiral, steps=400, num=1000), spiral)
                    .min(dim=1)
                    .values.mean()
                    .item()
                    / 2
                )
            far[name] = total
    assert far["toy"] < 1.1 * far["plain"]
    assert far["plain"] < 0.25
