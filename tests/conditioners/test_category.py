import torch

from sfumato.condition import NO_CONDITION
from sfumato.conditioners import CategoryConditioner, CategoryConfig, Unconditional


def test_no_category_is_the_null_vector() -> None:
    conditioner = CategoryConditioner(CategoryConfig(size=4), categories=3)
    given = conditioner({"category": torch.tensor([0, -1, 2])}).vector
    assert torch.equal(given[1:2], conditioner.null(1).vector)
    assert not torch.equal(given[0], given[2])
    assert not torch.equal(given[0], given[1])


def test_dropout_to_null_is_per_sample() -> None:
    conditioner = CategoryConditioner(CategoryConfig(size=4), categories=3)
    kept = conditioner({"category": torch.tensor([0, 1, 2])})
    mixed = kept.replaced_where(torch.tensor([False, True, False]), conditioner.null(3)).vector
    assert torch.equal(mixed[[0, 2]], kept.vector[[0, 2]])
    assert torch.equal(mixed[1], conditioner.null(1).vector[0])


def test_unconditional_fills_no_slot() -> None:
    nothing = Unconditional()
    assert nothing({}) is NO_CONDITION
    assert nothing.null(3) is NO_CONDITION
    assert NO_CONDITION.replaced_where(torch.tensor([True]), nothing.null(1)).slots() == {}
