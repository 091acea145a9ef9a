"""Conditions side by side: shapes add up, null is null in every part, and each part is dropped by
its own draw, keyed by sample.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import randomness
from sfumato.condition import NO_CONDITION, NO_CONTEXT, Condition, ContextSizes
from sfumato.conditioners import (
    AugmentationConditioner,
    CategoryConditioner,
    CategoryConfig,
    CompositeConditioner,
    DoodleConditioner,
    DoodleConfig,
    PointsConditioner,
    PointsConfig,
    SplatConfig,
)
from sfumato.errors import ShapeError


def tokens(
    length: int, *, value: float = 1.0, mask: list[bool] | None = None, batch: int = 2
) -> Condition:
    """`length` tokens of 3 channels for each image."""
    kept = None if mask is None else torch.tensor(mask).expand(batch, length)
    return Condition(tokens=torch.full((batch, length, 3), value), token_mask=kept)


def filled(
    *, vector: int = 0, length: int = 0, maps: int = 0, value: float = 1.0, batch: int = 2
) -> Condition:
    """A condition whose slots have so many channels or tokens; 0 leaves a slot empty."""
    return Condition(
        vector=torch.full((batch, vector), value) if vector else None,
        tokens=torch.full((batch, length, 3), value) if length else None,
        spatial=torch.full((batch, maps, 4, 4), value) if maps else None,
    )


def same(a: Condition, b: Condition) -> bool:
    return a.slots().keys() == b.slots().keys() and all(
        torch.equal(slot, b.slots()[name]) for name, slot in a.slots().items()
    )


# --- Condition.pixel_unshuffle --------------------------------------------------------------------


def maps(*shape: int) -> Condition:
    return Condition(
        vector=torch.ones(2, 3),
        spatial=torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)),
    )


def test_folded_maps_lose_nothing() -> None:
    condition = maps(3, 8, 12)
    folded = condition.pixel_unshuffle(4)
    assert folded.spatial.shape == (2, 48, 2, 3)
    assert (
        folded.spatial[0, 16:32, 1, 2].tolist()
        == condition.spatial[0, 1, 4:8, 8:12].flatten().tolist()
    )
    assert torch.equal(torch.nn.functional.pixel_shuffle(folded.spatial, 4), condition.spatial)
    assert torch.equal(folded.vector, condition.vector)
    assert same(condition.pixel_unshuffle(1), condition)
    assert same(filled(vector=1).pixel_unshuffle(4), filled(vector=1))


def test_maps_that_are_the_same_everywhere_fold_as_if_written_out() -> None:
    condition = maps(3, 1, 1)
    written = Condition(spatial=condition.spatial.expand(-1, -1, 4, 4)).pixel_unshuffle(4)
    assert torch.equal(condition.pixel_unshuffle(4).spatial, written.spatial)


def test_sides_that_do_not_divide_are_padded_with_their_rim() -> None:
    condition = maps(1, 5, 8)
    shown = torch.nn.functional.pixel_shuffle(condition.pixel_unshuffle(4).spatial, 4)
    assert torch.equal(shown[:, :, :5], condition.spatial)
    assert torch.equal(shown[:, :, 5:], condition.spatial[:, :, 4:].expand(-1, -1, 3, -1))


def test_a_joint_conditioner_folds_what_it_gives_and_what_it_announces() -> None:
    parts = {
        "doodle": DoodleConditioner(DoodleConfig()),
        "category": CategoryConditioner(CategoryConfig(size=4), categories=2),
    }
    joint = CompositeConditioner(parts, factor=4)
    context = {"doodle": torch.rand(2, 1, 8, 8), "category": torch.tensor([0, 1])}
    condition = joint(context, 2)
    assert ContextSizes.of(condition) == joint.sizes == ContextSizes.of(joint.null(2))
    assert condition.spatial.shape[2:] == (2, 2)
    dropped = joint(context, 2, draws=torch.zeros(2, 2))  # below any dropout: nothing is asked for
    assert torch.equal(dropped.spatial, joint.null(2).spatial.expand_as(dropped.spatial))


def test_the_places_of_a_map_do_not_depend_on_what_lies_beside_it() -> None:
    """Nor does a smaller map that is asked for alone lie elsewhere than in training, where both are
    there.
    """
    points = PointsConditioner(
        PointsConfig(size=8, heads=2, splat=SplatConfig(side=8)), dimensions=2
    )
    joint = CompositeConditioner(
        {"doodle": DoodleConditioner(DoodleConfig()), "points": points}, factor=4
    )
    cloud = torch.rand(2, 5, 2) * 2 - 1
    together = joint({"doodle": torch.rand(2, 1, 16, 16), "points": cloud}, 2).spatial
    alone = joint({"points": cloud}, 2).spatial
    assert together.shape[2:] == (4, 4)
    shown = torch.nn.functional.interpolate(alone, size=(4, 4), mode="nearest")
    assert torch.equal(shown[:, -2 * 16 :], together[:, -2 * 16 :])


def test_smaller_maps_are_repeated_up_to_the_others() -> None:
    both = maps(1, 8, 8).concat_features(maps(2, 4, 4))
    assert both.spatial.shape == (2, 3, 8, 8)
    assert torch.equal(both.spatial[:, 1:, ::2, ::2], both.spatial[:, 1:, 1::2, 1::2])


# --- Condition.concat_features --------------------------------------------------------------------


def test_vectors_and_maps_lie_side_by_side_by_channels() -> None:
    both = filled(vector=2, maps=1).concat_features(filled(vector=3, maps=2, value=5.0))
    assert both.vector.tolist() == [[1, 1, 5, 5, 5]] * 2
    assert both.spatial.shape == (2, 3, 4, 4)
    assert both.spatial[0, :, 0, 0].tolist() == [1, 5, 5]


def test_tokens_follow_one_another() -> None:
    both = tokens(2).concat_features(tokens(3, value=5.0))
    assert both.tokens[0, :, 0].tolist() == [1, 1, 5, 5, 5]
    assert both.token_mask is None


@pytest.mark.parametrize(
    ("first", "second", "mask"),
    [
        (tokens(2, mask=[True, False]), tokens(1), [True, False, True]),
        (tokens(1), tokens(2, mask=[True, False]), [True, True, False]),
        (tokens(1, mask=[False]), tokens(2, mask=[True, False]), [False, True, False]),
    ],
)
def test_where_one_part_has_a_mask_the_other_ones_tokens_all_count(
    first: Condition, second: Condition, mask: list
) -> None:
    both = first.concat_features(second)
    assert both.token_mask.tolist() == [mask] * 2
    assert both.token_mask.dtype == torch.bool


def test_a_mask_is_kept_beside_a_condition_without_tokens() -> None:
    masked = tokens(2, mask=[True, False])
    assert same(
        masked.concat_features(filled(vector=2)),
        Condition(**masked.slots(), **filled(vector=2).slots()),
    )


def test_different_slots_are_all_kept() -> None:
    both = filled(vector=2).concat_features(filled(length=4)).concat_features(filled(maps=1))
    assert {name: tuple(slot.shape) for name, slot in both.slots().items()} == {
        "vector": (2, 2), "tokens": (2, 4, 3), "spatial": (2, 1, 4, 4),
    }  # fmt: skip


def test_nothing_beside_a_condition_is_the_condition() -> None:
    some = filled(vector=2, length=1, maps=1)
    assert same(some.concat_features(NO_CONDITION), some)
    assert same(NO_CONDITION.concat_features(some), some)
    assert NO_CONDITION.concat_features(NO_CONDITION) == NO_CONDITION


def test_the_first_ones_dtype_is_taken_and_neither_is_changed() -> None:
    first, second = filled(vector=1).map(torch.Tensor.double), filled(vector=1)
    assert first.concat_features(second).vector.dtype == torch.float64
    masked, plain = tokens(1, mask=[True]), tokens(1)
    masked.concat_features(plain)
    assert plain.token_mask is None


sizes = st.fixed_dictionaries(
    {"vector": st.integers(0, 3), "length": st.integers(0, 3), "maps": st.integers(0, 2)}
)


@settings(max_examples=60, deadline=None)
@given(first=sizes, second=sizes, third=sizes)
def test_the_sizes_of_both_together_are_those_of_the_condition_together(
    first: dict, second: dict, third: dict
) -> None:
    a, b, c = (
        filled(**size, value=float(number)) for number, size in enumerate((first, second, third))
    )
    assert ContextSizes.of(a).concat_features(ContextSizes.of(b)) == ContextSizes.of(
        a.concat_features(b)
    )
    assert same(a.concat_features(b).concat_features(c), a.concat_features(b.concat_features(c)))


def test_tokens_of_two_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match="tokens of 3 and 4 channels"):
        ContextSizes(tokens=3).concat_features(ContextSizes(tokens=4))
    assert ContextSizes(tokens=3).concat_features(ContextSizes(tokens=3)).tokens == 3
    assert (
        ContextSizes(tokens=3).concat_features(NO_CONTEXT)
        == NO_CONTEXT.concat_features(ContextSizes(tokens=3))
        == ContextSizes(tokens=3)
    )


# --- CompositeConditioner -------------------------------------------------------------------------

CATEGORIES = torch.tensor([0, 1, 2, 0])
CHANGES = torch.arange(8.0).view(4, 2) + 1


def category(dropout: float = 0.1, *, size: int = 3) -> CategoryConditioner:
    return CategoryConditioner(CategoryConfig(size=size, dropout=dropout), categories=3)


def with_augmentation(dropout: float = 0.1) -> CompositeConditioner:
    return CompositeConditioner(
        {"category": category(dropout), "augmentation": AugmentationConditioner(labels=2)}
    )


def two(first: float, second: float) -> CompositeConditioner:
    """Two parts that can both be dropped: channels 0 to 2, and 3 to 7."""
    return CompositeConditioner({"kind": category(first), "style": category(second, size=5)})


def test_sizes_and_shapes_add_up() -> None:
    joint = with_augmentation()
    made = joint({"category": CATEGORIES, "augmentation": CHANGES}, 4)
    assert joint.sizes == ContextSizes(vector=5) == ContextSizes.of(made)
    assert made.vector.shape == (4, 5)
    assert torch.equal(made.vector[:, 3:], CHANGES)
    assert ContextSizes.of(joint.null(4)) == joint.sizes


def test_null_is_the_null_of_every_part_and_what_an_empty_context_gives() -> None:
    joint = with_augmentation()
    assert same(joint.null(4), joint({}, 4))
    assert torch.equal(joint.null(4).vector[:, :3], joint.parts["category"].null(4).vector)
    assert (joint.null(4).vector[:, 3:] == 0).all()


def test_one_part_may_be_known_and_another_not() -> None:
    joint = with_augmentation()
    assert torch.equal(joint({"category": CATEGORIES}, 4).vector[:, 3:], torch.zeros(4, 2))
    known = joint({"augmentation": CHANGES}, 4).vector
    assert torch.equal(known[:, :3], joint.null(4).vector[:, :3])
    assert torch.equal(known[:, 3:], CHANGES)


def test_each_part_is_dropped_by_its_own_draw() -> None:
    joint = two(0.5, 0.25)
    kept, null = joint({"category": CATEGORIES}, 4).vector, joint.null(4).vector
    draws = torch.tensor([[0.4, 0.3], [0.6, 0.2], [0.4, 0.2], [0.5, 0.25]])
    mixed = joint({"category": CATEGORIES}, 4, draws=draws).vector
    for row, (first, second) in enumerate(
        [(True, False), (False, True), (True, True), (False, False)]
    ):
        assert torch.equal(mixed[row, :3], (null if first else kept)[row, :3])
        assert torch.equal(mixed[row, 3:], (null if second else kept)[row, 3:])


def test_what_was_done_to_a_image_is_told_even_where_the_category_is_dropped() -> None:
    joint = with_augmentation(dropout=1.0)
    made = joint(
        {"category": CATEGORIES, "augmentation": CHANGES}, 4, draws=torch.zeros(4, 2)
    ).vector
    assert torch.equal(made[:, 3:], CHANGES)
    assert torch.equal(made[:, :3], joint.null(4).vector[:, :3])


def dropped(first: int, count: int, *, seed: int = 0) -> torch.Tensor:
    """Which of two parts are dropped, (count, 2), for samples from `first` on, drawn as training
    draws.
    """
    joint = two(0.3, 0.6)
    draws = randomness.uniform(seed, "condition dropout", first=first, count=count, per_item=2)
    context = {"category": torch.zeros(count, dtype=torch.int64)}
    same_as_null = joint(context, count, draws=draws).vector == joint.null(count).vector
    return torch.stack([same_as_null[:, :3].all(1), same_as_null[:, 3:].all(1)], dim=1)


def test_dropout_is_independent_for_each_part_with_its_own_share() -> None:
    count = 4000
    first, second = dropped(0, count).double().T
    spread = 0.5 / count**0.5
    assert abs(first.mean() - 0.3) < 4 * spread
    assert abs(second.mean() - 0.6) < 4 * spread
    assert abs((first * second).mean() - 0.3 * 0.6) < 4 * spread  # both by chance only


def test_dropout_belongs_to_the_sample_whatever_batch_it_is_in() -> None:
    whole = dropped(100, 60)
    assert torch.equal(
        torch.cat([dropped(100 + begin, 7) for begin in range(0, 60, 7)])[:60], whole
    )
    assert not torch.equal(dropped(101, 60), whole)
    assert not torch.equal(dropped(100, 60, seed=1), whole)


def test_gradients_reach_the_parts_that_were_not_dropped() -> None:
    joint = two(0.5, 0.5)
    joint(
        {"category": torch.tensor([1])}, 1, draws=torch.tensor([[0.1, 0.9]])
    ).vector.sum().backward()
    kind, style = (joint.parts[name].embedding.weight.grad for name in ("kind", "style"))
    assert kind.abs().sum(1).tolist() == [0, 0, 0, 3]  # the null vector learns instead
    assert style.abs().sum(1).tolist() == [0, 5, 0, 0]
