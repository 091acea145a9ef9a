"""What every conditioner promises, whatever it reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.condition import Condition, ContextSizes, reorder, select_rows
from sfumato.conditioners import (
    AttributesConditioner,
    AttributesConfig,
    CategoryConditioner,
    CategoryConfig,
    DoodleConditioner,
    DoodleConfig,
    Downsample,
    Grayscale,
    Holes,
    ImageConditioner,
    ImageConfig,
    LearnedTextConditioner,
    LearnedTextConfig,
    PointsConditioner,
    PointsConfig,
    ReferenceConditioner,
    ReferenceConfig,
    ResizingConditioner,
    SplatConfig,
    WordTokenizer,
)

B, SIDE = 5, 16
TEXTS = ["a red heart", "two cats", "", "heart, red", "Ein rotes Herz \u2764 \u5fc3"]


def points(dimensions: int) -> Tensor:
    cloud = torch.rand(B, 30, dimensions) * 2 - 1
    cloud[1, 20:] = math.nan
    cloud[2] = math.nan
    return cloud


def with_missing(values: Tensor) -> Tensor:
    values[2] = math.nan
    return values


MAKERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "category": lambda: (
        CategoryConditioner(CategoryConfig(size=8), categories=3),
        {"category": torch.tensor([0, 1, -1, 2, 0])},
    ),
    "attributes": lambda: (
        AttributesConditioner(
            AttributesConfig(size=8), names=["age", "asleep"], mean=[3.0, 0.5], deviation=[2.0, 0.5]
        ),
        {"attributes": with_missing(torch.rand(B, 2))},
    ),
    "text": lambda: (
        LearnedTextConditioner(
            LearnedTextConfig(size=8, heads=2, length=9), words=WordTokenizer.fit(TEXTS, most=3)
        ),
        {"text": TEXTS},
    ),
    "doodle": lambda: (
        DoodleConditioner(DoodleConfig()),
        {"doodle": with_missing(torch.rand(B, 1, SIDE, SIDE) * 2 - 1)},
    ),
    "resizing": lambda: (
        ResizingConditioner(),
        {
            "resizing": torch.tensor(
                [[16.0, 32, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0], [-4, -4, 0, 0], [0, 9, 0, 4]]
            )
        },
    ),
    "image": lambda: (
        ImageConditioner(ImageConfig(), channels=3),
        {"image": with_missing(torch.rand(B, 3, SIDE, SIDE) * 2 - 1)},
    ),
    "reference": lambda: (
        ReferenceConditioner(ReferenceConfig(size=8, side=2), channels=3),
        {"reference": with_missing(torch.rand(B, 3, SIDE, SIDE) * 2 - 1)},
    ),
    "points": lambda: (
        PointsConditioner(PointsConfig(size=8, heads=2, tokens=4), dimensions=2),
        {"points": points(2)},
    ),
    "points of 3-D with features, splatted": lambda: (
        PointsConditioner(
            PointsConfig(
                size=8, heads=2, tokens=4, frame="normalized", splat=SplatConfig(side=SIDE)
            ),
            dimensions=5,
        ),
        {"points": points(5)},
    ),
}
MISSING = 2  # in every context above


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(MAKERS))
def made(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    return MAKERS[request.param]()


def whole(condition: Condition, like: Condition) -> Condition:
    """Maps that are the same everywhere, at the other's height and width."""
    if condition.spatial is None or like.spatial is None:
        return condition
    return Condition(
        **{
            **condition.slots(),
            "spatial": condition.spatial.expand(-1, -1, *like.spatial.shape[2:]),
        }
    )


def assert_close(a: Condition, b: Condition) -> None:
    assert a.slots().keys() == b.slots().keys()
    for name, slot in a.slots().items():
        torch.testing.assert_close(slot, b.slots()[name], atol=1e-5, rtol=1e-5)


def test_fills_the_slots_that_it_names_with_finite_numbers(
    made: tuple[Any, dict[str, Any]],
) -> None:
    conditioner, context = made
    for condition in (conditioner(context, B), conditioner.null(B), conditioner({}, B)):
        assert ContextSizes.of(condition) == conditioner.sizes
        assert all(len(slot) == B and slot.isfinite().all() for slot in condition.slots().values())


def test_what_is_missing_asks_for_nothing(made: tuple[Any, dict[str, Any]]) -> None:
    conditioner, context = made
    given, null = conditioner(context, B), conditioner.null(1)
    assert_close(given.map(lambda slot: slot[MISSING : MISSING + 1]), whole(null, given))
    assert_close(conditioner({}, 1), null)
    others = given.map(lambda slot: slot[:1])
    assert any(
        not torch.allclose(a, b)
        for a, b in zip(others.slots().values(), whole(null, others).slots().values(), strict=True)
    )


def test_images_of_a_batch_do_not_see_one_another(made: tuple[Any, dict[str, Any]]) -> None:
    conditioner, context = made
    together = conditioner(context, B)
    for i in range(B):
        assert_close(
            conditioner(select_rows(context, slice(i, i + 1)), 1),
            together.map(lambda slot, i=i: slot[i : i + 1]),
        )
    order = [3, 1, 4, 0, 2]
    assert_close(conditioner(reorder(context, order), B), together.map(lambda slot: slot[order]))


def test_gradient_reaches_every_parameter(made: tuple[Any, dict[str, Any]]) -> None:
    conditioner, context = made
    condition = conditioner(context, B)
    total = sum(slot.float().square().sum() for slot in condition.slots().values())
    if total.requires_grad:
        total.backward()
    still = [name for name, parameter in conditioner.named_parameters() if parameter.grad is None]
    assert still == []


def test_training_contexts_depend_on_the_samples_numbers_only(
    made: tuple[Any, dict[str, Any]],
) -> None:
    conditioner, context = made
    images = torch.rand(B, 3, SIDE, SIDE) * 2 - 1
    together = conditioner.training_context(images, context, seed=4, first=100)
    for i in range(B):
        alone = conditioner.training_context(
            images[i : i + 1], select_rows(context, slice(i, i + 1)), seed=4, first=100 + i
        )
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            torch.testing.assert_close(
                value, together[name][i : i + 1], equal_nan=True, atol=1e-5, rtol=1e-5
            )


def test_points_in_another_order_and_rows_of_nothing_change_nothing() -> None:
    for name in ("points", "points of 3-D with features, splatted"):
        conditioner, context = MAKERS[name]()
        cloud = context["points"]
        shuffled = cloud[:, torch.randperm(cloud.shape[1])]
        longer = torch.cat([cloud, torch.full((B, 7, cloud.shape[2]), math.nan)], dim=1)
        for other in (shuffled, longer):
            assert_close(conditioner({"points": other}, B), conditioner(context, B))


def test_points_are_splatted_where_they_lie() -> None:
    conditioner = PointsConditioner(
        PointsConfig(size=8, heads=2, splat=SplatConfig(side=8, width=0.5)), dimensions=2
    )
    # centres of the pixels at the top right, and at the left
    corner = torch.tensor([[[7 / 8, 7 / 8], [-7 / 8, 1 / 8]]])
    spots = conditioner({"points": corner}, 1).spatial[0, 0]
    assert spots[0, 7] == pytest.approx(1, abs=1e-5)
    assert spots[3, 0] == pytest.approx(1, abs=1e-5)
    assert spots.sum() < 4.5


def test_a_cloud_in_its_own_frame_may_lie_anywhere() -> None:
    conditioner = PointsConditioner(PointsConfig(size=8, heads=2, frame="normalized"), dimensions=3)
    cloud = torch.rand(1, 40, 3)
    assert_close(conditioner({"points": cloud}, 1), conditioner({"points": 100 * cloud - 7}, 1))


def test_training_clouds_are_thinned_and_never_emptied() -> None:
    conditioner = PointsConditioner(PointsConfig(size=8, heads=2, min_points=3), dimensions=2)
    cloud = torch.rand(200, 50, 2)
    thin = conditioner.training_context(
        torch.zeros(200, 1, 8, 8), {"points": cloud}, seed=0, first=0
    )["points"]
    counts = (~thin.isnan().any(2)).sum(1)
    assert counts.min() >= 1
    assert counts.min() < 10 < 40 < counts.max()
    kept = ~thin.isnan()
    assert torch.equal(thin[kept], cloud[kept])


def test_small_clouds_beside_large_ones_keep_as_many_points_as_others_do() -> None:
    conditioner = PointsConditioner(PointsConfig(size=8, heads=2, min_points=10), dimensions=2)
    cloud = torch.rand(300, 200, 2)
    cloud[::3, 20:] = math.nan  # 20 points, and 6 in the next: all of them
    cloud[1::3, 6:] = math.nan
    thin = conditioner.training_context(
        torch.zeros(300, 1, 8, 8), {"points": cloud}, seed=0, first=0
    )["points"]
    counts = (~thin.isnan().any(2)).sum(1)
    for offset, (least, most) in enumerate([(10, 20), (6, 6), (10, 200)]):
        assert counts[offset::3].min() >= least
        assert counts[offset::3].max() <= most
    assert counts[::3].min() < 12 < 18 < counts[::3].max()
    assert torch.equal(thin[~thin.isnan()], cloud[~thin.isnan()])


@pytest.mark.parametrize("lost", [Downsample(factor=4), Grayscale()])
def test_what_is_lost_once_is_not_lost_twice(lost: Any) -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    once = lost.degrade_input(images)
    assert not torch.allclose(once, images)
    torch.testing.assert_close(
        lost.degrade_input(once), once, atol=0.35 if isinstance(lost, Downsample) else 1e-6, rtol=0
    )


def test_shrinking_keeps_means_of_blocks() -> None:
    images = torch.rand(2, 3, 16, 24)
    small = torch.nn.functional.avg_pool2d(images, 8)
    assert torch.allclose(
        Downsample(factor=8).degrade_input(images).mean((2, 3)), small.mean((2, 3)), atol=0.1
    )


def test_holes_are_rectangles_of_the_sizes_asked_for() -> None:
    images = torch.rand(400, 1, 20, 20)
    cut = Holes(smallest=0.25, largest=0.5, outside=0.0).degrade(images, torch.rand(400, 8))
    hole = cut[:, 0].isnan()
    tall, wide = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), tall * wide)
    assert 4 <= int(tall.min()) <= 6
    assert 9 <= int(wide.max()) <= 11
    assert torch.equal(cut[~cut.isnan()], images[~cut.isnan()])
    inverse = Holes(outside=1.0).degrade(images, torch.rand(400, 8))
    assert inverse[:, 0].isnan()[:, 0, 0].float().mean() > 0.5


def test_a_hole_is_told_from_black_and_white() -> None:
    conditioner = ImageConditioner(ImageConfig(degradation=Holes()), channels=1)
    image = torch.tensor([[[[1.0, -1.0], [0.0, math.nan]]]])
    assert conditioner({"image": image}, 1).spatial.tolist() == [
        [[[1, -1], [0, 0]], [[1, 1], [1, 0]]]
    ]


def test_lines_are_drawn_where_the_image_changes_and_nowhere_else() -> None:
    image = torch.ones(1, 3, 32, 32)
    image[..., 8:24, 8:24] = torch.tensor([-1.0, 0.5, 0.0]).view(3, 1, 1)
    drawn = DoodleConditioner(DoodleConfig(wobble=0, missing_lines=0)).training_context(
        image, {}, seed=0, first=0
    )["doodle"]
    ink = (1 - drawn[0, 0]) / 2
    rim = torch.zeros(32, 32, dtype=torch.bool)
    rim[6:26, 6:26] = True
    rim[10:22, 10:22] = False
    assert ink[~rim].max() < 0.3
    assert ink[8, 10:22].min() > 0.5
    assert ink[10:22, 8].min() > 0.5


def test_wobble_and_dropped_strokes_change_lines_a_little() -> None:
    image = torch.ones(1, 1, 32, 32).repeat(40, 1, 1, 1)
    image[..., 8:24, 8:24] = -1
    straight, bent = (
        DoodleConditioner(DoodleConfig(wobble=wobble, missing_lines=dropped)).training_context(
            image, {}, seed=0, first=0
        )["doodle"]
        for wobble, dropped in ((0, 0), (0.05, 0.5))
    )
    ink, other = (1 - straight) / 2, (1 - bent) / 2
    assert other.mean() < 0.95 * ink.mean()
    assert other.mean() > 0.4 * ink.mean()
    assert len({photo.numpy().tobytes() for photo in bent}) == 40


def test_lines_lie_on_dark_strokes_and_on_the_dark_side_of_edges_alone() -> None:
    image = torch.ones(2, 1, 32, 32)
    image[0, :, :, 15:17] = -1  # a stroke two pixels wide
    image[1, :, :, 16:] = -1  # a dark half
    drawn = DoodleConditioner(DoodleConfig(wobble=0, missing_lines=0)).training_context(
        image, {}, seed=0, first=0
    )["doodle"]
    inked = [torch.nonzero(row < 0).flatten().tolist() for row in drawn[:, 0, 16]]
    assert inked[0] == [15, 16]
    assert inked[1] in ([16], [16, 17])


def test_a_share_of_doodles_is_made() -> None:
    own = torch.ones(2000, 1, 4, 4)
    made = DoodleConditioner(DoodleConfig(synthetic=0.3)).training_context(
        torch.rand(2000, 1, 4, 4), {"doodle": own}, seed=0, first=0
    )["doodle"]
    assert 0.25 < (made != 1).flatten(1).any(1).float().mean() < 0.35


def test_single_attributes_are_hidden_besides() -> None:
    conditioner = AttributesConditioner(
        AttributesConfig(hidden=0.2), names=["a", "b"], mean=[0, 0], deviation=[1, 1]
    )
    hidden = conditioner.training_context(
        torch.zeros(3000, 1, 2, 2), {"attributes": torch.ones(3000, 2)}, seed=0, first=0
    )["attributes"].isnan()
    assert hidden.float().mean(0).tolist() == pytest.approx([0.2, 0.2], abs=0.03)
    assert abs(float((hidden[:, 0] & hidden[:, 1]).float().mean()) - 0.04) < 0.015


def test_an_attribute_that_never_varied_may_be_asked_to() -> None:
    conditioner = AttributesConditioner(
        AttributesConfig(size=4), names=["age"], mean=[3.0], deviation=[0.0]
    )
    assert conditioner({"attributes": torch.tensor([[4.0]])}, 1).vector.abs().max() < 10
