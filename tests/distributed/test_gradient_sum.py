"""Gradients are summed over processes while the backward pass goes on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sfumato.distributed import gradient_sum
from sfumato.distributed.gradient_sum import GradientSum
from sfumato.distributed.sharding import Engine
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


def stepped(model: nn.Module, world: World) -> GradientSum:
    """A sum that has seen a step, from which it knows the order."""
    summed = GradientSum(world, list(model.parameters()))
    take_step(summed, model)
    if isinstance(world, Twin):
        world.events.clear()
    return summed


def take_step(summed: GradientSum, model: nn.Module, parts: int = 1) -> None:
    model.zero_grad()
    summed.begin()
    for number, part in enumerate(INPUTS.split(len(INPUTS) // parts)):
        summed.expect(last=number == parts - 1)
        model(part).sum().backward()
    summed.finish()


@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_are_sums_of_all_processes_in_every_step(parts: int) -> None:
    model = network()
    summed = GradientSum(Twin(), list(model.parameters()))
    for _ in range(3):
        take_step(summed, model, parts)
        assert_equal(gradients(model), expected())


def test_sums_begin_in_the_last_backward_pass_before_it_ends() -> None:
    model, world = network(), Twin()
    summed = stepped(model, world)
    model[0].weight.register_hook(lambda gradient: world.events.append("first layer"))
    take_step(summed, model, 3)
    assert world.events[:3] == ["first layer", "first layer", "sum"]
    assert world.events.index("first layer", 2) >= 6  # four sums before it
    assert world.events[-6:] == ["wait"] * 6
    assert_equal(gradients(model), expected())


class Conditioned(nn.Module):
    """A network whose condition is registered after it, and whose layers are in no order."""

    def __init__(self, *, uses_last: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.late, self.early = nn.Linear(4, 1), nn.Linear(4, 4)
        self.conditioner = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.uses_last = uses_last

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.late(torch.tanh(self.early(x) + self.conditioner(x)))
        return result + self.unused(x).sum() if self.uses_last else result


def test_sums_begin_in_the_order_of_the_backward_pass_not_of_registration() -> None:
    model, world = Conditioned(uses_last=False), Twin()
    summed = stepped(model, world)
    model.conditioner.weight.register_hook(lambda gradient: world.events.append("condition"))
    take_step(summed, model)
    assert world.events.index("condition") >= 2  # the output's sums, though two have no gradient
    assert model.unused.weight.grad is None


def test_parameters_that_are_used_no_more_or_again_hold_nothing_up() -> None:
    model, world = Conditioned(), Twin()
    summed = stepped(model, world)
    for uses in (False, False, True, True):
        model.uses_last = uses
        world.events.clear()
        take_step(summed, model)
        assert world.events.count("sum") == 8
        assert (model.unused.weight.grad is not None) == uses
        if uses:
            gradient = 2 * len(INPUTS) * INPUTS.sum(0).expand(4, 4)
            torch.testing.assert_close(model.unused.weight.grad, gradient)


def test_a_sum_that_has_begun_stands_when_the_pass_is_repeated() -> None:
    model, world = network(), Twin()
    summed = stepped(model, world)
    model.zero_grad()
    summed.begin()
    summed.expect(last=True)

    def fail(gradient: Tensor) -> None:
        raise MemoryError

    handle = model[0].weight.register_hook(fail)
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


def test_a_gradient_that_only_another_process_has_is_taken_in_the_parameters_layout() -> None:
    model = nn.ModuleList(
        [nn.Linear(4, 1), nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)]
    )
    summed = GradientSum(Ahead(), list(model.parameters()))
    summed.begin()
    summed.expect(last=True)
    model[0](INPUTS).sum().backward()
    summed.finish()
    assert torch.equal(model[1].weight.grad, torch.ones(8, 4, 3, 3))
    assert model[1].weight.grad.stride() == model[1].weight.stride()


def test_backward_passes_outside_of_steps_sum_nothing() -> None:
    model, world = network(), Twin()
    summed = stepped(model, world)
    model.zero_grad()
    summed.expect(last=True)
    model(INPUTS).sum().backward()
    assert world.events == []
    assert_equal(gradients(model), expected(1.0))


def test_a_step_that_fails_is_over() -> None:
    model, world = network(), Twin()
    engine = Engine(world)
    for _ in range(2):
        with pytest.raises(KeyError), engine.summed(list(model.parameters())):
            raise KeyError
    engine.expect(model, last=True)
    model(INPUTS).sum().backward()
    assert world.events == []


def test_parameters_are_freed_with_their_sum() -> None:
    model = network()
    summed = GradientSum(Twin(), list(model.parameters()))
    alive = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, summed
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_buckets_hold_gradients_of_one_kind_up_to_their_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradient_sum, "BUCKET_BYTES", 100)
    parameters = [nn.Parameter(torch.zeros(10, dtype=kind)) for kind in
                  [torch.bfloat16, *[torch.float32] * 4]]  # fmt: skip
    assert gradient_sum._buckets(parameters, [4, 3, 2, 1, 0]) == [[4, 3, 2], [1], [0]]


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
