"""Two processes end where one does: weights, averages, moments, losses, validations and pictures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sfumato.distributed import current
from tests.distributed.conftest import Runs, difference, largest_gap, shown
from tests.faults.conftest import own_cache as own_cache
from tests.faults.injector import leftovers, newest

TWO = ("--procs", "2")


@pytest.mark.parametrize(
    ("name", "engine", "most"),
    [
        ("pixel", "replicate", 0.0),
        pytest.param("muon", "replicate", 0.0, marks=pytest.mark.slow),
        ("latent", "replicate", 0.0),
        ("shapes", "replicate", 1e-6),  # groups of shapes are cut elsewhere
        ("pixel", "shard", 2e-6),
        pytest.param("dit", "shard", 1e-6, marks=pytest.mark.slow),
        pytest.param("muon", "shard", 1e-5, marks=pytest.mark.slow),
        pytest.param("latent", "shard", 2e-6, marks=pytest.mark.slow),
        ("shapes", "shard", 1e-6),
    ],
)
def test_two_processes_end_where_one_does(runs: Runs, name: str, engine: str, most: float) -> None:
    alone = runs.alone(name)
    run = runs.train(name, *TWO, f"distributed={engine}")
    assert difference(run, alone) <= most
    assert largest_gap(run, alone) < 1e-5
    assert shown(run).keys() == shown(alone).keys()
    assert not leftovers(run)
    if engine == "replicate" and most == 0:
        assert shown(run) == shown(alone)


def test_processes_that_see_other_images_would_be_noticed(runs: Runs) -> None:
    def patch() -> None:
        from sfumato.data import loader

        real = loader.BatchPlan.batch
        loader.BatchPlan.batch = lambda plan, step, **of: real(
            plan, step, rank=0, ranks=of.get("ranks", 1)
        )

    run = runs.train("pixel", *TWO, patch=patch)
    assert difference(run, runs.alone("pixel")) > 1e-4


def test_gradients_are_reduced_once_in_a_step(runs: Runs, tmp_path: Path) -> None:
    def patch() -> None:
        import torch.distributed as dist

        real, count = dist.all_reduce, [0]

        def counted(tensor, *args, **options):  # type: ignore[no-untyped-def]
            count[0] += tensor.numel() > 1  # others only wait
            (tmp_path / f"{current().rank}.json").write_text(json.dumps(count[0]))
            return real(tensor, *args, **options)

        dist.all_reduce = counted

    runs.train("pixel", *TWO, "micro_batch=1", patch=patch)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [20, 20]


@pytest.mark.parametrize(
    "engines",
    [
        ("shard", "replicate"),
        pytest.param(("replicate", "shard"), marks=pytest.mark.slow),
    ],
)
def test_other_numbers_of_processes_go_on_with_a_run(
    runs: Runs, engines: tuple[str, str], tmp_path: Path
) -> None:
    constant = ("optimizer.schedule=constant", "optimizer.warmup_steps=0")
    alone = runs.train("dit", *constant)
    run = runs.train("dit", *constant, "budget.steps=5")
    for steps, engine in zip((10, 15), engines, strict=True):
        before = tmp_path / str(steps)
        shutil.copytree(newest(run), before)
        runs.resume(run, f"budget.steps={steps}", f"distributed={engine}", *TWO)
    runs.resume(run, "budget.steps=20")
    assert difference(run, alone) < 1e-5
    assert largest_gap(run, alone) < 1e-5


@pytest.mark.parametrize("engine", ["replicate", "shard"])
def test_what_is_loaded_is_what_was_saved_bit_for_bit(
    runs: Runs, engine: str, tmp_path: Path
) -> None:
    run = runs.train("dit", "budget.steps=4")
    before = {path.name: path.read_bytes() for path in newest(run).glob("*.safetensors")}

    def patch() -> None:
        from sfumato.training.trainer import Trainer

        def stop(trainer: Trainer, session: object) -> None:
            trainer.state.counters.step = 5  # a checkpoint of what was loaded, nothing else
            trainer.saver.save_now()

        Trainer._loop = stop

    code, said = runs.lab.call(
        "resume", run, "budget.steps=9", *TWO, f"distributed={engine}", patch=patch
    )
    assert code == 0, said
    assert newest(run).name == "step-000000005"
    assert {p.name: p.read_bytes() for p in newest(run).glob("*.safetensors")} == before


def test_a_batch_that_cannot_be_shared_is_refused_before_work_begins(runs: Runs) -> None:
    run = runs.lab.new("uneven")
    code, said = runs.lab.call("train", runs.recipe("pixel"), "--run", run, "--procs", "3")
    assert code == 2
    assert "cannot be shared evenly by 3 processes" in said
    assert "[1, 2, 4, 8]" in said
    assert not run.exists()


def on_machines_of(processes: int) -> Callable[[], None]:
    """Return a patch by which so many processes are on one machine."""

    def patch() -> None:
        from sfumato.distributed import launch

        become = launch._become

        def become_and_say(rank: int, count: int, folder: Path) -> None:
            become(rank, count, folder)
            os.environ |= {
                "LOCAL_RANK": str(rank % processes),
                "LOCAL_WORLD_SIZE": str(processes),
            }

        launch._become = become_and_say

    return patch


def test_two_machines_decode_and_encode_half_of_the_images_each(
    runs: Runs, own_cache: Callable[[], Path], tmp_path: Path
) -> None:
    two_machines = on_machines_of(1)

    def patch() -> None:
        two_machines()
        from sfumato.data import pixel_store

        decode = pixel_store.decode

        def noted(*arguments: Any, **options: Any) -> Any:
            with (tmp_path / os.environ["RANK"]).open("a") as file:
                file.write("x")
            return decode(*arguments, **options)

        pixel_store.decode = noted

        from sfumato.training import latent_cache

        moments = latent_cache._moments

        def counted(dataset: Any, autoencoder: Any, chunk: Any) -> Any:
            with (tmp_path / f"latents {os.environ['RANK']}").open("a") as file:
                file.write("x" * len(chunk))
            return moments(dataset, autoencoder, chunk)

        latent_cache._moments = counted
        latent_cache.CHUNK = 10

    run = runs.train("latent", *TWO, patch=patch)
    assert [(tmp_path / rank).stat().st_size for rank in "01"] == [20, 20]
    assert [(tmp_path / f"latents {rank}").stat().st_size for rank in "01"] == [30, 30]
    assert difference(run, runs.alone("latent")) < 1e-6


def test_copies_on_two_machines_of_two_processes_end_alike(runs: Runs) -> None:
    run = runs.train("dit", "--procs", "4", "distributed=hybrid", patch=on_machines_of(2))
    assert difference(run, runs.alone("dit")) < 1e-6


def test_two_processes_evaluate_as_one_does(runs: Runs, tmp_path: Path) -> None:
    found = []
    for procs in ((), TWO):
        out = tmp_path / f"{len(procs)}" / "figures.json"
        told = ("--num", "8", "--features", "random", "--out", out)
        code, said = runs.lab.call("evaluate", runs.alone("pixel"), *told, *procs)
        assert code == 0, said
        found.append(dict(numbers(json.loads(out.read_text()))))
    alone, two = found
    assert alone.keys() == two.keys()
    assert len(alone) > 20
    assert two == pytest.approx(alone, rel=1e-4, abs=1e-6, nan_ok=True)


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Yield all numbers of plain data with their places."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            yield from numbers(part, f"{place}/{name}")
    elif isinstance(value, int | float):
        yield place, float(value)


def looks(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "looks.jsonl").read_text().splitlines()]


def test_looks_and_searched_copies_are_those_of_one_process(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.training.looks.FREE_S", 1e9)
    alone = runs.alone("validated")
    run = runs.train("validated", *TWO)

    for ours, theirs in zip(looks(run), looks(alone), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["copies"] == theirs["copies"]
        for name in ("held_out", "seen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert sorted(path.name for path in (run / "best").iterdir()) == sorted(
        path.name for path in (alone / "best").iterdir()
    )


def test_samples_of_two_processes_are_those_of_one(runs: Runs, tmp_path: Path) -> None:
    run, command = runs.alone("pixel"), ("--num", "7", "--steps", "3", "--trajectory")
    for folder, more in (("one", ()), ("two", TWO)):
        code, said = runs.lab.call("sample", run, *command, "--out", tmp_path / folder, *more)
        assert code == 0, said
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 9  # the grid and the trajectory
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for lost in ("00001.png", "00005.png", "00006.png"):
        (tmp_path / "two" / lost).unlink()
    code, said = runs.lab.call("sample", run, *command, "--out", tmp_path / "two", *TWO, "--json")
    assert code == 0, said
    assert '"made": 6' in said  # and the first four, for the trajectory
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    code, said = runs.lab.call("sample", run, "--num", "3", "--seed", "4", *TWO)
    assert code == 0, said
    assert len(list((run / "generated" / "seed-4").glob("0*.png"))) == 3


def test_a_lora_on_a_frozen_base_ends_as_in_one_process(runs: Runs) -> None:
    base, images = runs.alone("pixel"), runs.lab.place / "images"
    command = (
        "finetune", base, images, "adapter=lora", "budget.steps=6", "batch_size=8", "micro_batch=4",
        "precision=float32", "compile=off", "sweep.minutes=0", "preservation.num=4",
        "validation.copy_samples=0", "validation.samples=10", "log.every_steps=1",
    )  # fmt: skip
    one, two = runs.lab.new("lora"), runs.lab.new("lora")
    for run, more in ((one, ()), (two, TWO)):
        code, said = runs.lab.call(*command, "--run", run, *more)
        assert code == 0, said
    assert difference(one, two) == 0
    assert largest_gap(one, two) < 1e-5
    code, said = runs.lab.call(*command, "--run", runs.lab.new("x"), *TWO, "distributed=shard")
    assert (code, "frozen parameters are not shared in parts" in said) == (2, True), said
