import pytest
import torch

from sfumato.condition import NO_CONDITION, NO_CONTEXT, Condition, ContextSizes
from sfumato.errors import ShapeError


def full(value: float, batch: int = 3) -> Condition:
    return Condition(
        vector=torch.full((batch, 2), value),
        tokens=torch.full((batch, 4, 5), value),
        token_mask=torch.ones(batch, 4, dtype=torch.bool),
        spatial=torch.full((batch, 1, 2, 2), value),
    )


def test_replacing_is_per_sample_in_every_slot() -> None:
    mixed = full(1.0).replace_where(torch.tensor([False, True, False]), full(-1.0))
    for name in ("vector", "tokens", "spatial"):
        assert getattr(mixed, name).flatten(1)[:, 0].tolist() == [1.0, -1.0, 1.0]


def test_concatenating_and_expanding() -> None:
    both = full(1.0).concat_batch(full(2.0, batch=1).expand(3))
    assert both.vector[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert both.token_mask.shape == (6, 4)
    assert NO_CONDITION.concat_batch(NO_CONDITION) == NO_CONDITION


def test_different_slots_cannot_be_combined() -> None:
    with pytest.raises(ShapeError, match="different slots"):
        full(1.0).concat_batch(NO_CONDITION)


def test_sizes_are_read_off_a_condition() -> None:
    assert ContextSizes.of(full(0.0)) == ContextSizes(vector=2, tokens=5, spatial=1)
    assert ContextSizes.of(NO_CONDITION) == NO_CONTEXT


def test_the_other_condition_takes_the_dtype_of_this_one() -> None:
    wide = full(2.0).map(lambda slot: slot.double() if slot.is_floating_point() else slot)
    replaced = full(1.0).replace_where(torch.tensor([True, False, True]), wide)
    for made in (full(1.0).concat_batch(wide), replaced):
        assert {name: slot.dtype for name, slot in made.slots().items()} == {
            n: s.dtype for n, s in full(1.0).slots().items()
        }


def test_map_reaches_filled_slots_only() -> None:
    doubled = Condition(tokens=torch.ones(2, 3, 4)).map(lambda slot: 2 * slot)
    assert doubled.slots().keys() == {"tokens"}
    assert (doubled.tokens == 2).all()


def test_expanding_a_full_batch_changes_nothing_and_a_wrong_one_is_refused() -> None:
    assert torch.equal(full(1.0).expand(3).vector, full(1.0).vector)
    with pytest.raises(RuntimeError):
        full(1.0).expand(4)


def test_on_the_way_everything_is_mixed_and_tokens_count_where_an_end_with_a_share_has_them() -> (
    None
):
    first = Condition(
        **{**full(0.0).slots(), "token_mask": torch.tensor([[True, True, False, False]] * 3)}
    )
    last = Condition(
        **{**full(4.0).slots(), "token_mask": torch.tensor([[True, False, True, False]] * 3)}
    )
    mixed = first.lerp(last, torch.tensor([0.0, 0.25, 1.0]))
    for name in ("vector", "tokens", "spatial"):
        assert getattr(mixed, name).flatten(1)[:, 0].tolist() == [0.0, 1.0, 4.0]
    assert mixed.token_mask.tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [True, False, True, False],
    ]
