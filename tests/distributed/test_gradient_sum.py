"""Gradients are summed over processes while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sfumato.distributed import gradient_sum
from sfumato.distributed.gradient_sum import GradientSum
from sfumato.distributed.world import World
from tests.distributed.conftest import Runs, difference

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Twin(World):
    """A process beside another one that has the same gradients; it notes each sum that begins."""

    size = 2

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        tensor.mul_(2)
        self.events.append("sum")
        return lambda: self.events.append("wait")


class Ahead(Twin):
    """A process beside one that also has gradients of 1 where this one has none."""

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        tensor.add_(1)
        return lambda: None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_sum, "BUCKET_BYTES", 1)  # one for each parameter


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def expected(factor: float = 2.0) -> list[Tensor]:
    model = network()
    model(INPUTS).sum().backward()
    return [factor * gradient for gradient in gradients(model)]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_sums_begin_in_the_last_backward_pass_before_it_ends() -> None:
    model, world = network(), Twin()
    summed = GradientSum(world, list(model.parameters()))
    next(model.parameters()).register_hook(lambda gradient: world.events.append("first layer"))
    summed.begin()
    for number, part in enumerate(INPUTS.split(2)):
        summed.expect(last=number == 2)
        model(part).sum().backward()
    assert world.events[:3] == ["first layer", "first layer", "sum"]
    assert world.events.index("first layer", 2) >= 6  # four sums before it
    summed.finish()
    assert world.events.count("sum") == 6
    assert world.events[-6:] == ["wait"] * 6
    assert_equal(gradients(model), expected())


def test_a_sum_that_has_begun_stands_when_the_pass_is_repeated() -> None:
    model, world = network(), Twin()
    summed = GradientSum(world, list(model.parameters()))
    summed.begin()
    summed.expect(last=True)

    def fail(gradient: Tensor) -> None:
        raise MemoryError

    handle = next(model.parameters()).register_hook(fail)
    with pytest.raises(MemoryError):
        model(INPUTS).sum().backward()
    handle.remove()
    begun = len(world.events)
    assert 0 < begun < 6
    model.zero_grad()
    for number, part in enumerate(INPUTS.split(3)):
        summed.expect(last=number == 1)
        model(part).sum().backward()
    summed.finish()
    assert world.events.count("sum") == 6
    assert_equal(gradients(model), expected())


def test_a_gradient_that_only_another_process_has_is_taken_and_one_of_nobody_stays_absent() -> None:
    for world, given in ((Ahead(), True), (Twin(), False)):
        model = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
        summed = GradientSum(world, list(model.parameters()))
        summed.begin()
        summed.expect(last=True)
        model[0](INPUTS).sum().backward()
        summed.finish()
        assert model[0].weight.grad is not None
        assert (model[1].weight.grad is not None) == given
        if given:
            assert torch.equal(model[1].weight.grad, torch.ones(1, 4))


def test_backward_passes_outside_of_steps_sum_nothing() -> None:
    model, world = network(), Twin()
    summed = GradientSum(world, list(model.parameters()))
    summed.expect(last=True)
    model(INPUTS).sum().backward()
    assert world.events == []
    assert_equal(gradients(model), expected(1.0))


def test_buckets_hold_gradients_of_one_kind_up_to_their_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradient_sum, "BUCKET_BYTES", 100)
    parameters = [nn.Parameter(torch.zeros(10, dtype=kind)) for kind in
                  [torch.bfloat16, *[torch.float32] * 4]]  # fmt: skip
    buckets = gradient_sum._buckets(parameters)
    assert [len(bucket) for bucket in buckets] == [3, 1, 1]
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in reversed(parameters)]


def test_one_of_two_processes_repeats_a_pass_for_want_of_memory(runs: Runs) -> None:
    def patch() -> None:
        from sfumato.distributed import current
        from sfumato.training.trainer import Trainer

        gradient_sum.BUCKET_BYTES = 20_000
        real = Trainer._backward

        def short(trainer: Trainer, *arguments: object) -> object:
            first = next(iter(trainer.state.optimized_parts[0].parameters))

            def fail(gradient: Tensor) -> None:
                raise MemoryError

            step = trainer.state.counters.step
            if current().rank == 1 and step == 3 and not trainer.state.counters.micro_batch:
                handle = first.register_hook(fail)
                try:
                    return real(trainer, *arguments)
                finally:
                    handle.remove()
            return real(trainer, *arguments)

        Trainer._backward = short

    run = runs.train("dit", "--procs", "2", patch=patch)
    assert 0 < difference(run, runs.alone("dit")) < 1e-6
