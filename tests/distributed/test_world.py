"""What falls to each process, and how what they found is put together."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from sfumato.distributed import engines
from sfumato.distributed.world import World, alone, current
from sfumato.errors import ConfigError

SOURCE = Path(__file__).parents[2] / "src" / "sfumato"


class Told(World):
    """A process of several, which is told what the others have."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank)
        self.size = size
        self.parts: list[torch.Tensor] = []

    def gather_equal(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.parts


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 31])
def test_spans_are_equally_long_and_together_everything_once(count: int, size: int) -> None:
    rows = torch.arange(count)
    worlds = [Told(rank, size) for rank in range(size)]
    parts = [rows[world.span(count)] for world in worlds]
    assert len({len(part) for part in parts}) == 1
    for world, part in zip(worlds, parts, strict=True):
        world.parts = parts
        assert torch.equal(world.join_spans(part, count), rows)
    shares = [number for world in worlds for number in world.share(range(count))]
    assert sorted(shares) == list(range(count))


def test_a_process_that_works_alone_asks_nobody_and_keeps_its_number() -> None:
    with alone(3):
        world = current()
        assert (world.rank, world.size, world.is_first) == (3, 1, False)
        assert world.gather({"a": 1}) == [{"a": 1}]
        assert list(world.share([1, 2])) == [1, 2]
    assert current().is_first


GIB = engines.GIB // 4  # parameters of a GiB
LARGE = engines.Footprint(parameters=10 * GIB, trained=10 * GIB, averages=1, largest_unit=GIB // 4)


@pytest.mark.parametrize(
    ("memory_gib", "size", "per_machine", "expected"),
    [(101, 8, 8, "replicate"), (99, 8, 8, "shard"), (20, 64, 8, "hybrid"), (10, 64, 8, "shard")],
)
def test_the_engine_is_the_one_with_the_least_communication_that_fits(
    memory_gib: float, size: int, per_machine: int, expected: str
) -> None:
    assert (
        engines.choose_name(
            "auto", LARGE, memory_gib=memory_gib, size=size, per_machine=per_machine
        )
        == expected
    )


def test_what_each_process_holds() -> None:
    assert LARGE.gib() == 50  # weights, gradient, two moments and an average
    assert LARGE.gib(10) == 5 + 0.5  # and a unit with its gradient
    frozen = engines.Footprint(parameters=10 * GIB, trained=GIB, averages=1, largest_unit=0)
    assert frozen.gib() == 14
    assert engines.copies_of("hybrid", size=64, per_machine=8) == 8
    with pytest.raises(ConfigError, match="not a multiple"):
        engines.copies_of("hybrid", size=9, per_machine=8)


def test_only_one_package_knows_torch_distributed() -> None:
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any(name.startswith("torch.distributed") for name in names):
                found.append(path.relative_to(SOURCE).parts[0])
    assert set(found) == {"distributed"}
