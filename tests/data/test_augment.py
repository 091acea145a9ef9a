"""Changes to images are functions of the sample's number, do what they say to the pixel, and are
told to the network truly.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from sfumato import randomness
from sfumato.data import AugmentConfig
from sfumato.data.augment import LABELS, Augmented, augmentation_draws, non_leaking, warp
from sfumato.data.augment import augment as augment_by
from sfumato.errors import ConfigError

EVERYTHING = AugmentConfig(
    flip="both",
    rotation_degrees=30,
    crop=0.3,
    brightness=0.2,
    contrast=0.2,
    saturation=0.4,
    hue_degrees=40,
    karras=0.5,
)


def augment(
    config: AugmentConfig, images: torch.Tensor, *, seed: int, first: int, annotations=None
) -> Augmented:
    """Samples `first`, `first + 1`, ... of a seed."""
    return augment_by(
        config,
        images,
        augmentation_draws(seed, first=first, count=len(images)),
        annotations=annotations,
    )


# Where each change finds its draw; the tests below would fail if these moved.
FLIP, FLOP, QUARTER, TURN, CROP, CROP_X, CROP_Y, BRIGHT, CONTRAST, SATURATE, HUE, LEAK = range(12)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `augment` draw 0.5 everywhere, which is "nothing" for what goes either way, but for
    what is named.
    """

    def fix(**named: float) -> None:
        def uniform(
            seed: int, purpose: str, *, first: int, count: int, per_item: int = 1
        ) -> torch.Tensor:
            draws = torch.full((count, per_item), 0.5, dtype=torch.float64)
            for name, value in named.items():
                draws[:, globals()[name]] = value
            return draws

        monkeypatch.setattr(randomness, "uniform", uniform)

    return fix


def noise(count: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed)
        .uniform(-1, 1, (count, channels, height, width))
        .astype(np.float32)
    )


def grid(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of pixel centres from the middle, in pixels, (H, W)."""
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2,
        torch.arange(width) - (width - 1) / 2,
        indexing="ij",
    )
    return x, y


def blob(
    height: int, width: int, x: float = 0.0, y: float = 0.0, radius: float = 2.0
) -> torch.Tensor:
    """A soft dot at (x, y) pixels from the middle, on black, (1, 1, H, W)."""
    across, down = grid(height, width)
    return (2 * torch.exp(-((across - x) ** 2 + (down - y) ** 2) / (2 * radius**2)) - 1)[None, None]


def centre(image: torch.Tensor) -> tuple[float, float]:
    """Where a dot is, in pixels from the middle; what lies further out than the nearest rim may be
    a reflection.
    """
    weights = (image.squeeze() + 1).clamp(min=0).double()
    x, y = grid(*weights.shape)
    weights = torch.where(
        (weights > 0.02) & (torch.hypot(x, y) < min(weights.shape) / 2), weights, 0.0
    )
    return float((weights * x).sum() / weights.sum()), float((weights * y).sum() / weights.sum())


def once(
    config: AugmentConfig, images: torch.Tensor, first: int = 0, seed: int = 0
) -> torch.Tensor:
    return augment(config, images, seed=seed, first=first)[0]


# --- off, and keyed -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_off_is_the_same_images(channels: int) -> None:
    images = noise(5, channels, 6, 9)
    before = images.clone()
    changed, labels, _ = augment(AugmentConfig(), images, seed=3, first=10)
    assert torch.equal(changed, before)
    assert labels.shape == (5, 0)
    assert AugmentConfig().is_off
    assert AugmentConfig().labels == 0


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_everything_on_keeps_shape_type_range_and_the_images_given(channels: int) -> None:
    images = noise(6, channels, 12, 8)
    before = images.clone()
    changed, labels, _ = augment(EVERYTHING, images, seed=0, first=0)
    assert torch.equal(images, before)
    assert changed.shape == images.shape
    assert changed.dtype == torch.float32
    assert labels.dtype == torch.float32
    assert labels.shape == (6, LABELS)
    assert changed.abs().max() <= 1
    assert (changed != before).flatten(1).any(1).all()


@pytest.mark.parametrize(
    "config",
    [EVERYTHING, AugmentConfig(flip="both", quarter_turns="all"), AugmentConfig(karras=0.9)],
)
def test_a_sample_is_changed_alike_wherever_it_stands(config: AugmentConfig) -> None:
    images = noise(24, 3, 10, 10)
    whole, labels, _ = augment(config, images, seed=5, first=100)
    for size in (1, 5, 24):
        parts = [
            augment(config, images[at : at + size], seed=5, first=100 + at)
            for at in range(0, 24, size)
        ]
        assert torch.equal(torch.cat([part for part, *_ in parts]), whole)
        assert torch.equal(torch.cat([told for _, told, _ in parts]), labels)
    other = augment(config, images, seed=6, first=100)[0]
    later = augment(config, images, seed=5, first=101)[0]
    assert not torch.equal(other, whole)
    assert not torch.equal(later, whole)
    torch.manual_seed(0)
    assert torch.equal(augment(config, images, seed=5, first=100)[0], whole)


def test_very_late_samples_have_draws_of_their_own() -> None:
    images = noise(1, 1, 8, 8).repeat(64, 1, 1, 1)
    for first in (10**12, 2**40):
        changed = once(AugmentConfig(rotation_degrees=180), images, first=first)
        assert len({image.numpy().tobytes() for image in changed}) == 64


# --- pixels that move whole -----------------------------------------------------------------------


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "both"])
def test_flips_move_pixels_whole_and_each_half_of_the_time(flip: str) -> None:
    images = noise(1, 2, 4, 6).repeat(4000, 1, 1, 1)
    changed = once(AugmentConfig(flip=flip), images).numpy()
    original = images[0].numpy()
    ways = {
        "horizontal": [(0, 0), (1, 0)],
        "vertical": [(0, 0), (0, 1)],
        "both": [(0, 0), (1, 0), (0, 1), (1, 1)],
    }[flip]
    left = np.ones(4000, bool)
    for x, y in ways:
        expected = original[:, :: 1 - 2 * y, :: 1 - 2 * x]
        same = (changed == expected).all((1, 2, 3))
        assert abs(same.mean() - 1 / len(ways)) < 4 * (0.25 / 4000) ** 0.5
        left &= ~same
    assert not left.any()


def test_quarter_turns_are_numpys_and_each_as_likely() -> None:
    images = noise(1, 3, 5, 5).repeat(4000, 1, 1, 1)
    changed = once(AugmentConfig(quarter_turns="all"), images).numpy()
    shares = [
        (changed == np.rot90(images[0].numpy(), turn, (1, 2))).all((1, 2, 3)).mean()
        for turn in range(4)
    ]
    assert sum(shares) == pytest.approx(1)
    assert all(abs(share - 0.25) < 0.03 for share in shares)


def test_flips_and_turns_are_independent_of_one_another() -> None:
    images = noise(1, 1, 3, 3).repeat(8000, 1, 1, 1)
    changed = once(AugmentConfig(flip="both", quarter_turns="all"), images).numpy()
    kinds = {image.tobytes() for image in changed}
    counts = [sum(image.tobytes() == kind for image in changed) for kind in kinds]
    assert len(kinds) == 8  # the symmetries of the square
    assert min(counts) > 0.7 * 1000
    assert max(counts) < 1.3 * 1000


def test_quarter_turns_of_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(ConfigError, match="quarter turns"):
        once(AugmentConfig(quarter_turns="all"), noise(2, 1, 4, 6))


# --- rotation and crop ----------------------------------------------------------------------------


def waves(height: int, width: int) -> torch.Tensor:
    """A smooth image without symmetry, (1, 1, H, W)."""
    x, y = grid(height, width)
    return (0.5 * torch.sin(0.21 * x + 0.13 * y + 0.4) + 0.3 * torch.cos(0.17 * y - 0.09 * x))[
        None, None
    ]


def rotated(image: torch.Tensor, angle: float) -> np.ndarray:
    """By scipy, with cubic splines: the value at p is the image's at R p, R turning by `angle` from
    x to y.
    """
    plane = image.squeeze().double().numpy()
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos, sin], [-sin, cos]])  # of (y, x)
    middle = (np.array(plane.shape) - 1) / 2
    return ndimage.affine_transform(plane, matrix, middle - matrix @ middle, order=3, mode="mirror")


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 64), (64, 33)])
@pytest.mark.parametrize(
    ("most", "draw"), [(25, 1.0), (25, 0.0), (90, 0.75), (180, 0.6), (10, 0.9)]
)
def test_rotation_is_by_the_drawn_angle(
    drawing: Callable, height: int, width: int, most: float, draw: float
) -> None:
    image = waves(height, width)
    drawing(TURN=draw)
    found = once(AugmentConfig(rotation_degrees=most), image).squeeze().numpy()
    angle = (2 * draw - 1) * math.radians(most)
    x, y = (value.numpy() for value in grid(height, width))
    inside = np.hypot(x, y) < min(height, width) / 2 - 3
    # The bicubic kernel (a = -3/4) misplaces what lies between pixels by up to 0.05 of one.
    assert np.abs(found - rotated(image, angle))[inside].max() < 0.015
    assert np.abs(found - rotated(image, -angle))[inside].max() > 0.05
    assert np.abs(found - rotated(image, angle * 1.1))[inside].max() > 0.015


def test_without_a_turn_nothing_moves(drawing: Callable) -> None:
    drawing()
    image = noise(3, 3, 17, 9)
    for config in (AugmentConfig(rotation_degrees=90), AugmentConfig(crop=0.0, rotation_degrees=5)):
        assert (once(config, image) - image).abs().max() < 1e-4


def test_angles_cover_the_range_evenly() -> None:
    dot = blob(33, 33, x=10)
    places = [
        centre(image)
        for image in once(AugmentConfig(rotation_degrees=60), dot.repeat(1500, 1, 1, 1))
    ]
    angles = np.degrees([math.atan2(y, x) for x, y in places])
    assert np.hypot(*np.array(places).T) == pytest.approx(10, abs=0.15)
    assert abs(angles.mean()) < 3
    assert np.abs(angles).max() <= 60.5
    assert np.sort(angles) == pytest.approx(np.linspace(-60, 60, 1500), abs=6)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (48, 48)])
def test_circles_stay_circles_when_images_that_are_not_square_turn(
    drawing: Callable, height: int, width: int
) -> None:
    x, y = grid(height, width)
    for angle in (0.65, 0.8, 0.97):
        drawing(TURN=angle)
        image = once(AugmentConfig(rotation_degrees=180), blob(height, width, radius=3.5))
        weights = (image.squeeze() + 1).clamp(min=0).double() * (
            torch.hypot(x, y) < min(height, width) / 2
        )
        spread = [
            float((weights * a * b).sum() / weights.sum()) for a, b in ((x, x), (y, y), (x, y))
        ]
        assert spread[0] == pytest.approx(12.25, rel=0.05)
        assert spread[1] == pytest.approx(12.25, rel=0.05)
        assert abs(spread[2]) < 0.3
    drawing(TURN=0.75)  # a quarter of a turn, of a dot beside the middle
    x, y = centre(once(AugmentConfig(rotation_degrees=180), blob(height, width, x=7, y=3)))
    assert sorted([abs(x), abs(y)]) == pytest.approx([3, 7], abs=0.1)
    assert x * y < 0


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (80, 48)])
@pytest.mark.parametrize(("x", "y"), [(0.5, 0.5), (0.0, 0.5), (1.0, 1.0), (0.25, 0.9)])
def test_a_crop_shows_the_part_that_was_drawn(
    drawing: Callable, height: int, width: int, x: float, y: float
) -> None:
    """What is kept is enlarged to the whole; at the ends of the draw it touches the image's rim, on
    every side.
    """
    image = waves(height, width)
    drawing(CROP=0.8, CROP_X=x, CROP_Y=y)
    found = once(AugmentConfig(crop=0.5), image).squeeze().numpy()
    kept = 1 - 0.5 * 0.8
    left, top = (1 - kept) * x * width, (1 - kept) * y * height
    across = left + (np.arange(width) + 0.5) * kept - 0.5
    down = top + (np.arange(height) + 0.5) * kept - 0.5
    expected = ndimage.map_coordinates(
        image.squeeze().double().numpy(),
        np.meshgrid(down, across, indexing="ij"),
        order=3,
        mode="mirror",
    )
    assert np.abs(found - expected)[3:-3, 3:-3].max() < 0.02


def test_a_crop_keeps_what_lies_in_the_middle() -> None:
    """With at most a fifth of each side cut away the middle three fifths are always seen."""
    dots = [blob(50, 50, x=x, y=y, radius=1.5) for x, y in ((0, 0), (14, 0), (-14, 14), (0, -14))]
    for dot in dots:
        seen = once(AugmentConfig(crop=0.2), dot.repeat(200, 1, 1, 1))
        assert seen.flatten(1).max(1).values.min() > 0.6


def test_crops_spread_over_the_image() -> None:
    dot = blob(40, 40, radius=2)
    places = np.array(
        [centre(image) for image in once(AugmentConfig(crop=0.4), dot.repeat(800, 1, 1, 1))]
    )
    assert np.abs(places.mean(0)).max() < 0.5
    assert places.max() > 8
    assert places.min() < -8


# --- colours --------------------------------------------------------------------------------------

LUMA = np.array([0.2126, 0.7152, 0.0722])


def constant(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1).repeat(1, 1, 3, 5)


def shown(config: AugmentConfig, *values: float) -> np.ndarray:
    """The one colour that an image of one colour becomes."""
    found = once(config, constant(*values))[0]
    assert (found == found[:, :1, :1]).all()
    return found[:, 0, 0].double().numpy()


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_brightness_is_a_share_of_the_range(drawing: Callable, channels: int) -> None:
    for draw, change in ((1.0, 0.4), (0.0, -0.4), (0.75, 0.2)):
        drawing(BRIGHT=draw)
        found = shown(AugmentConfig(brightness=0.2), *[0.1] * channels)
        assert found == pytest.approx([0.1 + change] * channels, abs=1e-6)
    drawing(BRIGHT=1.0)
    assert shown(AugmentConfig(brightness=0.2), *[0.9] * channels) == pytest.approx(
        [1.0] * channels
    )


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_contrast_is_about_middle_gray(drawing: Callable, channels: int) -> None:
    values = np.linspace(-0.7, 0.7, channels) if channels > 1 else np.array([0.5])
    for draw, gain in ((1.0, 1.3), (0.0, 0.7), (0.75, 1.15)):
        drawing(CONTRAST=draw)
        assert shown(AugmentConfig(contrast=0.3), *values) == pytest.approx(values * gain, abs=1e-6)


def test_saturation_moves_colours_from_their_gray(drawing: Callable) -> None:
    colour = np.array([0.4, -0.3, 0.1])
    for draw, keep in ((1.0, 1.5), (0.0, 0.5), (0.9, 1.4)):
        drawing(SATURATE=draw)
        gray = LUMA @ colour
        assert shown(AugmentConfig(saturation=0.5), *colour) == pytest.approx(
            gray + keep * (colour - gray), abs=1e-5
        )


def test_hue_turns_about_the_gray_axis(drawing: Callable) -> None:
    colour = np.array([0.5, -0.4, 0.2])
    drawing(HUE=1.0)
    third = shown(AugmentConfig(hue_degrees=120), *colour)
    # red's place is green's a third of a turn on
    assert third == pytest.approx(colour[[2, 0, 1]], abs=1e-5)
    half = shown(AugmentConfig(hue_degrees=180), *colour)
    assert half == pytest.approx(2 * colour.mean() - colour, abs=1e-5)
    drawing(HUE=0.0)
    assert shown(AugmentConfig(hue_degrees=120), *colour) == pytest.approx(
        colour[[1, 2, 0]], abs=1e-5
    )
    drawing(HUE=0.8)
    turned = shown(AugmentConfig(hue_degrees=50), *colour)
    a, b = colour - colour.mean(), turned - turned.mean()
    assert turned.mean() == pytest.approx(colour.mean(), abs=1e-6)
    assert np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))) == pytest.approx(
        30, abs=0.05
    )
    assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), abs=1e-6)


@pytest.mark.parametrize("level", [-1.0, -0.3, 0.0, 0.8, 1.0])
def test_gray_stays_as_it_is_under_saturation_and_hue(level: float) -> None:
    images = torch.full((50, 3, 2, 2), level)
    changed = once(AugmentConfig(saturation=0.9, hue_degrees=180), images)
    assert (changed - images).abs().max() < 1e-5


def test_in_order_contrast_hue_saturation_brightness(drawing: Callable) -> None:
    drawing(CONTRAST=1.0, HUE=1.0, SATURATE=0.0, BRIGHT=0.75)
    colour = np.array([0.2, -0.1, 0.05])
    expected = (1.2 * colour)[[2, 0, 1]]
    gray = LUMA @ expected
    expected = gray + 0.6 * (expected - gray) + 0.1
    config = AugmentConfig(contrast=0.2, hue_degrees=120, saturation=0.4, brightness=0.1)
    assert shown(config, *colour) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_no_colour(channels: int) -> None:
    images = noise(30, channels, 5, 5)
    changed = once(
        AugmentConfig(brightness=0.5, contrast=0.5, saturation=0.5, hue_degrees=90), images
    )
    assert torch.equal(changed[:, -1], images[:, -1])
    assert (changed[:, :-1] != images[:, :-1]).flatten(1).any(1).all()
    if channels == 4:
        colours = once(
            AugmentConfig(brightness=0.5, contrast=0.5, saturation=0.5, hue_degrees=90),
            images[:, :3],
        )
        assert torch.equal(changed[:, :3], colours)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_moves_with_the_colours(channels: int) -> None:
    plane = noise(8, 1, 9, 9)
    images = plane.repeat(1, channels, 1, 1)
    changed = once(AugmentConfig(flip="both", rotation_degrees=30, crop=0.3, karras=0.5), images)
    assert (changed - changed[:, :1]).abs().max() < 1e-6


def test_drawn_changes_of_colour_spread_over_their_range() -> None:
    found = (
        once(AugmentConfig(brightness=0.25), torch.zeros(4000, 1, 1, 1)).flatten().double().numpy()
    )
    assert np.sort(found) == pytest.approx(np.linspace(-0.5, 0.5, 4000), abs=0.03)
    gains = (
        once(AugmentConfig(contrast=0.25), torch.full((4000, 1, 1, 1), 0.5))
        .flatten()
        .double()
        .numpy()
        / 0.5
    )
    assert np.sort(gains) == pytest.approx(np.linspace(0.75, 1.25, 4000), abs=0.03)


# --- the non-leaking pipeline ---------------------------------------------------------------------

MIRROR, UPSIDE, ZOOM, COS, SIN, STRETCH_X, STRETCH_Y, SHIFT_X, SHIFT_Y = range(LABELS)
# Of its 13 draws: whether (mirror, upside down, zoom, turn, stretch, shift), then how much.
HOW = {"upside": 6, "zoom": 7, "angle": 8, "axis": 9, "stretch": 10, "x": 11, "y": 12}


def drawn(*on: str, **how: float) -> torch.Tensor:
    """Draws (1, 13) that make these changes and no others; `how` in [0, 1]."""
    draws = torch.full((1, 13), 0.999999, dtype=torch.float64)
    for name in on:
        draws[0, ["mirror", "upside", "zoom", "turn", "stretch", "shift"].index(name)] = 0.0
    for name, value in how.items():
        draws[0, HOW[name]] = value
    return draws


def gaussian(value: float) -> float:
    """The uniform draw that stands for a normal value."""
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


def moved(image: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    maps, labels = non_leaking(0.12, draws)
    return warp(image, maps), labels[0].tolist()


def test_draws_of_nothing_give_no_map_and_no_labels() -> None:
    maps, labels = non_leaking(0.12, drawn())
    assert torch.equal(maps, torch.eye(3, dtype=torch.float64)[None])
    assert torch.equal(labels, torch.zeros(1, LABELS, dtype=torch.float64))
    image = noise(1, 3, 12, 8)
    assert (warp(image, maps) - image).abs().max() < 1e-4


def test_how_often_each_change_is_made() -> None:
    draws = randomness.uniform(0, "test", first=0, count=20_000, per_item=13)
    maps, labels = non_leaking(0.12, draws)
    told = labels.numpy()
    shares = {
        MIRROR: 0.5,
        UPSIDE: 0.06,
        ZOOM: 0.12,
        COS: 0.12,
        SIN: 0.12,
        STRETCH_X: 0.12,
        STRETCH_Y: 0.12,
        SHIFT_X: 0.12,
        SHIFT_Y: 0.12,
    }
    for place, share in shares.items():
        assert (
            abs((told[:, place] != 0).mean() - share) < 4 * (share * (1 - share) / 20_000) ** 0.5
        ), place
    for place in (ZOOM, SHIFT_X, SHIFT_Y):
        values = told[told[:, place] != 0, place]
        assert abs(values.mean()) < 0.1
        assert values.std() == pytest.approx(1, abs=0.06)
    angles = np.arctan2(told[:, SIN], told[:, COS] + 1)[told[:, SIN] != 0]
    assert np.sort(angles) == pytest.approx(np.linspace(-math.pi, math.pi, len(angles)), abs=0.25)
    stretch = np.hypot(told[:, STRETCH_X], told[:, STRETCH_Y])
    assert (stretch[stretch > 0] ** 2).mean() == pytest.approx(1, abs=0.12)
    still = (told == 0).all(1)
    assert abs(still.mean() - 0.5 * 0.94 * 0.88**4) < 0.015
    assert (maps[torch.from_numpy(still)] == torch.eye(3)).all()
    assert not (maps[torch.from_numpy(~still)] == torch.eye(3)).flatten(1).all(1).any()
    # No change speaks of another: they are drawn independently.
    made = np.stack(
        [told[:, place] != 0 for place in (MIRROR, UPSIDE, ZOOM, SIN, STRETCH_X, SHIFT_X)]
    ).astype(float)
    assert np.abs(np.corrcoef(made) - np.eye(6)).max() < 0.03


def test_labels_and_images_agree_in_a_batch() -> None:
    config = AugmentConfig(karras=0.12)
    images = noise(1, 1, 16, 16).repeat(600, 1, 1, 1)
    changed, labels, _ = augment(config, images, seed=0, first=0)
    assert config.labels == LABELS
    still = (labels == 0).all(1)
    assert (changed[still] - images[still]).abs().max() < 1e-4
    mirrored = (labels[:, MIRROR] == 1) & (labels[:, 1:] == 0).all(1)
    assert 100 < int(mirrored.sum()) < 250
    assert (changed[mirrored] - images[mirrored].flip(-1)).abs().max() < 1e-4
    assert set(labels[:, MIRROR].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("change", "place", "axis"), [("mirror", MIRROR, -1), ("upside", UPSIDE, -2)]
)
@pytest.mark.parametrize("shape", [(16, 16), (12, 20)])
def test_a_mirror_label_is_a_mirror_image(
    change: str, place: int, axis: int, shape: tuple[int, int]
) -> None:
    image = noise(1, 2, *shape)
    found, labels = moved(image, drawn(change, upside=0.0))
    assert labels == [float(i == place) for i in range(LABELS)]
    assert (found - image.flip(axis)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(64, 64), (48, 96)])
@pytest.mark.parametrize(("x", "y"), [(1.0, 0.0), (0.0, 1.0), (-1.2, 0.6)])
def test_a_shift_label_moves_a_dot_right_and_down(
    shape: tuple[int, int], x: float, y: float
) -> None:
    """By an eighth of the (shorter) side for each unit: `A_trans` of table 6."""
    found, labels = moved(blob(*shape), drawn("shift", x=gaussian(x), y=gaussian(y)))
    assert labels == pytest.approx([0, 0, 0, 0, 0, 0, 0, x, y], abs=1e-6)
    assert centre(found) == pytest.approx((x * min(shape) / 8, y * min(shape) / 8), abs=0.05)


@pytest.mark.parametrize("zoom", [1.0, -1.5, 0.4])
def test_a_zoom_label_enlarges(zoom: float) -> None:
    """By 2^0.2 for each unit: `A_scale` of table 6."""
    found, labels = moved(blob(64, 64, x=9, y=-5), drawn("zoom", zoom=gaussian(zoom)))
    factor = 2 ** (0.2 * zoom)
    assert labels == pytest.approx([0, 0, zoom, 0, 0, 0, 0, 0, 0], abs=1e-6)
    assert centre(found) == pytest.approx((9 * factor, -5 * factor), abs=0.1)


@pytest.mark.parametrize("draw", [0.6, 0.25, 0.93])
@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_a_turn_label_is_the_angle_of_the_turn(draw: float, shape: tuple[int, int]) -> None:
    """As in the published code: the image turns by -angle in coordinates whose y points down,
    anticlockwise to the eye.
    """
    found, labels = moved(blob(*shape, x=12), drawn("turn", angle=draw))
    angle = (2 * draw - 1) * math.pi
    assert labels == pytest.approx(
        [0, 0, 0, math.cos(angle) - 1, math.sin(angle), 0, 0, 0, 0], abs=1e-9
    )
    assert centre(found) == pytest.approx((12 * math.cos(-angle), 12 * math.sin(-angle)), abs=0.1)


@pytest.mark.parametrize(("axis", "stretch"), [(0.5, 1.5), (0.75, 1.0), (0.6, -1.2), (0.1, 2.0)])
def test_a_stretch_label_points_along_the_stretch(axis: float, stretch: float) -> None:
    direction = (2 * axis - 1) * math.pi
    maps, labels = non_leaking(0.12, drawn("stretch", axis=axis, stretch=gaussian(stretch)))
    told = labels[0]
    assert told[[STRETCH_X, STRETCH_Y]].tolist() == pytest.approx(
        [stretch * math.cos(direction), stretch * math.sin(direction)], abs=1e-6
    )
    assert torch.count_nonzero(told[:STRETCH_X]) == torch.count_nonzero(told[SHIFT_X:]) == 0
    forward = torch.linalg.inv(maps[0])[:2, :2]
    annotations = torch.tensor([math.cos(direction), math.sin(direction)], dtype=torch.float64)
    across = torch.tensor([-annotations[1], annotations[0]], dtype=torch.float64)
    assert (forward @ annotations).tolist() == pytest.approx(
        (annotations * 2 ** (0.2 * stretch)).tolist(), abs=1e-6
    )
    assert (forward @ across).tolist() == pytest.approx(
        (across * 2 ** (-0.2 * stretch)).tolist(), abs=1e-6
    )
    assert float(torch.linalg.det(forward)) == pytest.approx(1)


def test_several_changes_come_in_the_published_order() -> None:
    """Flips, zoom, turn, stretch, shift: each is one factor of the map, the shift the last to
    act.
    """
    draws = drawn(
        "mirror",
        "zoom",
        "turn",
        "stretch",
        "shift",
        zoom=0.7,
        angle=0.6,
        axis=0.5,
        stretch=0.9,
        x=0.8,
        y=0.3,
    )
    maps, labels = non_leaking(0.12, draws)
    told = labels[0].tolist()
    point = np.array([0.3, -0.2])
    point = point * (-1, 1) * 2 ** (0.2 * told[ZOOM])
    angle = -math.atan2(told[SIN], told[COS] + 1)
    point = (
        np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ point
    )
    point = point * 2 ** (0.2 * told[STRETCH_X] * np.array([1, -1]))
    point = point + 2 * np.array(told[SHIFT_X:]) / 8
    back = maps[0].numpy() @ [*point, 1]
    assert back == pytest.approx([0.3, -0.2, 1], abs=1e-9)


def test_published_draws_are_the_last_thirteen(drawing: Callable) -> None:
    """The order of changes: whole pixels, then the turn and crop, then the pipeline that the labels
    speak of.
    """
    drawing(FLIP=0.0, LEAK=0.0)  # a learned flip, and one that is told
    image = noise(1, 1, 8, 8)
    changed, labels, _ = augment(
        AugmentConfig(flip="horizontal", karras=0.12), image, seed=0, first=0
    )
    assert (changed - image).abs().max() < 1e-4
    assert labels[0].tolist() == [1.0] + [0.0] * 8


def test_a_hundredfold_probability_is_refused_and_so_are_other_impossible_settings() -> None:
    for wrong in (
        {"karras": 1.0},
        {"karras": -0.1},
        {"crop": 1.0},
        {"crop": -0.2},
        {"brightness": 1.5},
        {"contrast": -1},
        {"saturation": float("nan")},
        {"rotation_degrees": 181},
        {"rotation_degrees": -1},
        {"hue_degrees": float("inf")},
    ):
        with pytest.raises(ConfigError):
            AugmentConfig(**wrong)


def test_what_lies_outside_is_the_mirrored_inside() -> None:
    image = waves(24, 24)
    found, _ = moved(image, drawn("shift", x=gaussian(1.0), y=0.5))  # three pixels to the right
    assert (found[..., 3:] - image[..., :-3]).abs().max() < 1e-4
    assert (found[..., :3] - image[..., :3].flip(-1)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(flip="both"),
        AugmentConfig(rotation_degrees=60),
        AugmentConfig(crop=0.3),
        AugmentConfig(karras=0.6),
        AugmentConfig(flip="both", rotation_degrees=30, crop=0.2),
    ],
)
def test_what_lies_over_a_image_moves_with_it(config: AugmentConfig) -> None:
    """Points go where the spot goes that is painted at them; maps are changed as images are."""
    height, width, count = 40, 56, 60
    places = torch.rand(count, 2, generator=torch.Generator().manual_seed(0)) * 0.8 - 0.4
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height * 2 - 1,
        (torch.arange(width) + 0.5) / width * 2 - 1,
        indexing="ij",
    )
    away = ((x - places[:, 0, None, None]) * width / 2) ** 2 + (
        (y + places[:, 1, None, None]) * height / 2
    ) ** 2
    images = torch.exp(-away / 8)[:, None] * 2 - 1
    features = torch.cat([places, torch.ones(count, 1)], dim=1)[:, None]
    changed = augment(
        config, images, seed=0, first=0, annotations={"points": features, "doodle": images}
    )
    assert torch.equal(changed.annotations["doodle"], changed.images)
    weight = (changed.images[:, 0] + 1).clamp(min=0) ** 2
    centre = (
        torch.stack([(weight * x).sum((1, 2)), -(weight * y).sum((1, 2))], 1)
        / weight.sum((1, 2))[:, None]
    )
    moved = changed.annotations["points"][:, 0]
    inside = (moved[:, :2].abs() < 0.7).all(1)
    assert inside.sum() > 50
    error = ((centre - moved[:, :2]) * torch.tensor([width / 2, height / 2]))[inside].norm(dim=1)
    assert error.median() < 0.05
    assert (moved[:, 2] == 1).all()


def test_points_follow_quarter_turns_exactly() -> None:
    images = torch.zeros(40, 1, 9, 9)
    images[:, 0, 2, 3] = 1
    point = torch.tensor([[[3.5 / 9 * 2 - 1, 1 - 2.5 / 9 * 2]]]).expand(40, -1, -1)
    changed = augment(
        AugmentConfig(quarter_turns="all", flip="both"),
        images,
        seed=0,
        first=0,
        annotations={"points": point},
    )
    found = changed.images.flatten(1).argmax(1)
    expected = torch.stack([(found % 9 + 0.5) / 9 * 2 - 1, 1 - (found // 9 + 0.5) / 9 * 2], dim=1)
    torch.testing.assert_close(changed.annotations["points"][:, 0], expected)
    assert len({tuple(place) for place in expected.tolist()}) == 8
