import pytest
import torch

from sfumato.condition import NO_CONDITION, NO_CONTEXT
from sfumato.conditioners import (
    CategoryConditioner,
    CategoryConfig,
    ClassLabelsConfig,
    CompositeConditioner,
)
from sfumato.errors import ConfigError


def made(*, dropout: float = 0.1) -> CategoryConditioner:
    return CategoryConditioner(CategoryConfig(size=4, dropout=dropout), categories=3)


def test_no_category_is_the_null_vector() -> None:
    conditioner = made()
    given = conditioner({"category": torch.tensor([0, -1, 2])}, 3).vector
    assert torch.equal(given[1:2], conditioner.null(1).vector)
    assert not torch.equal(given[0], given[2])
    assert not torch.equal(given[0], given[1])
    assert torch.equal(conditioner({}, 3).vector, conditioner.null(3).vector)


def test_dropout_to_null_is_per_sample() -> None:
    conditioner = made()
    kept = conditioner({"category": torch.tensor([0, 1, 2])}, 3)
    mixed = kept.replace_where(torch.tensor([False, True, False]), conditioner.null(3)).vector
    assert torch.equal(mixed[[0, 2]], kept.vector[[0, 2]])
    assert torch.equal(mixed[1], conditioner.null(1).vector[0])


def test_each_draw_below_the_dropout_sends_its_own_sample_to_null() -> None:
    part = made(dropout=0.25)
    joint, context = (
        CompositeConditioner({"category": part}),
        {"category": torch.tensor([0, 1, 2, 0])},
    )
    kept = joint(context, 4).vector
    mixed = joint(context, 4, draws=torch.tensor([[0.25], [0.2499], [0.9], [0.0]])).vector
    assert torch.equal(kept, part(context, 4).vector)
    assert torch.equal(mixed[[0, 2]], kept[[0, 2]])
    assert torch.equal(mixed[[1, 3]], part.null(2).vector)
    assert torch.equal(joint.null(4).vector, part.null(4).vector)


def test_the_learned_vectors_are_found_by_the_name_of_the_part() -> None:
    assert list(CompositeConditioner({"category": made()}).state_dict()) == [
        "parts.category.embedding.weight"
    ]


def test_without_parts_no_slot_is_filled() -> None:
    nothing = CompositeConditioner({})
    assert nothing.sizes == NO_CONTEXT
    assert nothing({}, 3) is NO_CONDITION
    assert (
        nothing({"category": torch.tensor([0, 1, 2])}, 3, draws=torch.zeros(3, 1)) is NO_CONDITION
    )
    assert nothing.null(3) is NO_CONDITION
    assert NO_CONDITION.replace_where(torch.tensor([True]), nothing.null(1)).slots() == {}


def test_class_labels_are_the_numbers_of_the_network() -> None:
    """Categories of a training set have other numbers; -1 and nothing at all mean "none"."""
    config = ClassLabelsConfig(names=("tench", "goldfish", "shark"))
    conditioner = config.build(["shark", "tench"])
    condition = conditioner({"category": torch.tensor([0, 1, -1])}, 3)
    assert condition.vector is not None
    assert condition.vector.tolist() == [[2.0], [0.0], [3.0]]
    assert conditioner({}, 2).vector.tolist() == conditioner.null(2).vector.tolist() == [[3.0]] * 2
    assert not list(conditioner.parameters())
    assert not conditioner.state_dict()


def test_a_category_that_is_no_class_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no class 'sharks'\n.*did you mean 'shark'"):
        ClassLabelsConfig(names=("tench", "shark")).build(["sharks"])
