"""Every planted defect is found and nothing else is; the report changes nothing, says the same
twice, and is safe to open.
"""

import base64
import hashlib
import json
import re
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from sfumato.data import DataConfig, Folder, index
from sfumato.data.check import KINDS, Inspection, IntendedModel, inspect_data, write
from sfumato.data.check.inspect import vendi
from sfumato.data.decoding import PixelFormat
from sfumato.errors import DataError
from tests.helpers.image_bytes import encode, noise

CLEAN = 40
RESOLUTION = 32


def tiles(
    seed: int, *, width: int = 64, height: int = 64, low: int = 0, high: int = 256
) -> Image.Image:
    """An image with sharp edges and colours, unlike that of any other seed."""
    values = np.random.default_rng(seed).integers(low, high, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return encode(image, "JPEG", quality=95, exif=exif)


def clear(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), (20, 20, 40, 40))
    return image


def put(root: Path, name: str, data: bytes | Image.Image, caption: str | None = None) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else encode(data))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def clean(root: Path, *, captions: bool = True, count: int = CLEAN) -> Path:
    """Images in which nothing is to be found."""
    for number in range(count):
        put(
            root,
            f"clean-{number:03d}.png",
            tiles(number),
            f"a pattern of number {number} in bright tiles" if captions else None,
        )
    return root


def inspected(root: Path, **plan) -> Inspection:
    return inspect_data(
        Folder(str(root)).listing(),
        source=str(root),
        plan=IntendedModel(**{"resolution": RESOLUTION, **plan}),
    )


def report(root: Path, out: Path) -> dict:
    """data.json as a program reads it."""
    write(inspected(root), out)
    return json.loads((out / "data.json").read_text(encoding="utf-8"))


# Name: (image, the kinds that it is to be found as). A caption of its own goes with each.
IMAGES: dict[str, tuple[bytes | Image.Image, set[str]]] = {
    "empty.png": (b"", {"unreadable"}),
    "page.png": (b"<html>404 not found</html>", {"unreadable"}),
    "cut.jpg": (encode(tiles(200), "JPEG")[:300], {"unreadable"}),
    "night.png": (tiles(201, high=80), {"dark"}),
    "glare.png": (tiles(202, low=225), {"bright"}),
    "soft.png": (tiles(203).resize((4, 4)).resize((64, 64), Image.Resampling.BICUBIC), {"blurry"}),
    "flat.png": (Image.new("RGB", (64, 64), (120, 90, 60)), {"low_information"}),
    "strip.png": (tiles(204, width=128, height=32), {"odd_aspect"}),
    "poster.png": (tiles(205, width=512, height=512), {"odd_size"}),
    "stamp.png": (tiles(206, width=24, height=24), {"upscaled", "odd_size"}),
    "gray.png": (tiles(207).convert("L"), {"grayscale"}),
    "clear.png": (clear(tiles(208)), {"transparent"}),
    "palette.png": (tiles(209).convert("P"), {"converted"}),
    "turned.jpg": (turned(tiles(210)), {"converted"}),
    "twin-1.png": (tiles(211), {"duplicate"}),
    "twin-2.png": (tiles(211), {"duplicate"}),
    "twin-3.bmp": (encode(tiles(211), "BMP"), {"duplicate"}),
    "near-1.png": (tiles(212), {"near_duplicate"}),
    "near-2.jpg": (encode(tiles(212), "JPEG", quality=85), {"near_duplicate"}),
    "alike-1.png": (tiles(213), {"look_alike"}),
    "alike-2.jpg": (encode(tiles(213), "JPEG", quality=85), {"look_alike"}),
}
COPIES_OF_ONE_NAME = ("twin", "near")
ELSEWHERE = {"outlier", "unnamed"}  # tested by themselves
CAPTIONS: dict[str, tuple[str | None, set[str]]] = {
    "silent.png": (None, {"caption_missing"}),
    "shared-1.png": ("the very same words", {"caption_duplicate"}),
    "shared-2.png": ("the very same words", {"caption_duplicate"}),
    "long.png": (" ".join(f"word{n}" for n in range(100)), {"caption_truncated"}),
    "broken.png": ("a cafÃ© at night", {"caption_damaged"}),
    "number.png": ("IMG_1234", {"caption_placeholder"}),
}


def planted(root: Path) -> Path:
    clean(root)
    for name, (data, _) in IMAGES.items():
        stem = name.partition("-")[0]
        caption = (
            f"copies called {stem} alike"
            if stem in COPIES_OF_ONE_NAME
            else f"defect of its own {name}"
        )
        put(root, name, data, caption)
    for number, (name, (caption, _)) in enumerate(CAPTIONS.items()):
        put(root, name, tiles(300 + number), caption)
    (root / "notes.docx").write_bytes(b"not of the set")
    return root


def expected() -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, (_, found) in {**IMAGES, **CAPTIONS}.items():
        for kind in found:
            kinds[kind].append(name)
    kinds["caption_duplicate"] += [
        name for name in IMAGES if name.partition("-")[0] in COPIES_OF_ONE_NAME
    ]
    kinds["left_out"] = ["notes.docx"]
    return {kind: sorted(names) for kind, names in kinds.items()}


@pytest.fixture(scope="module")
def defects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted(tmp_path_factory.mktemp("defects"))


@pytest.fixture(scope="module")
def written(defects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write(inspected(defects), out)
    return out


def data_of(folder: Path) -> dict:
    return json.loads((folder / "data.json").read_text(encoding="utf-8"))


# --- what is found --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ELSEWHERE])
def test_a_planted_defect_is_found_and_nothing_else_is(written: Path, kind: str) -> None:
    assert sorted(data_of(written)["issues"].get(kind, [])) == expected()[kind]


def test_every_kind_is_planted_somewhere() -> None:
    assert set(expected()) == set(KINDS) - ELSEWHERE


def test_the_counts_and_reasons_go_with_the_lists(written: Path) -> None:
    data = data_of(written)
    assert data["counts"] == {kind: len(names) for kind, names in data["issues"].items()}
    assert data["images"] == CLEAN + len(IMAGES) + len(CAPTIONS)
    assert data["unreadable"] == len(data["reasons"]) - 1 == 3
    assert data["readable"] == data["images"] - 3
    assert data["copies"] == 3  # two more twins and one more near-duplicate
    assert data["reasons"]["empty.png"] == "empty file"
    assert data["reasons"]["page.png"].startswith("not an image in a known format")
    assert data["groups"]["duplicate"] == [["twin-1.png", "twin-2.png", "twin-3.bmp"]]


def test_images_that_metadata_do_not_name_are_a_kind_of_their_own(tmp_path: Path) -> None:
    root = clean(tmp_path / "set", captions=False)
    first, *others = sorted(path.name for path in root.iterdir())
    (root / "metadata.csv").write_text(
        "file_name,caption\n" + "".join(f"{name},a caption of {name}\n" for name in others)
    )
    data = report(root, tmp_path / "out")
    assert data["issues"]["unnamed"] == [first]
    assert data["reasons"] == {first: "not named in the metadata"}
    assert data["ledger"]["found"] == len(others) + 2
    assert "unreadable" not in data["issues"]


def test_clean_data_have_no_findings(tmp_path: Path) -> None:
    assert report(clean(tmp_path / "set"), tmp_path / "out")["issues"] == {}


def test_without_any_caption_none_is_missing(tmp_path: Path) -> None:
    data = report(clean(tmp_path / "set", captions=False), tmp_path / "out")
    assert data["issues"] == {}
    assert "captions" not in data


def test_a_image_unlike_all_others_is_an_outlier(tmp_path: Path) -> None:
    base = np.asarray(tiles(0).resize((8, 8), Image.Resampling.NEAREST))
    for number in range(80):
        generator = np.random.default_rng(number)
        changed = np.where(
            generator.random((8, 8, 1)) < 0.2, generator.integers(0, 256, (8, 8, 3)), base
        ).astype(np.uint8)
        put(
            tmp_path / "set",
            f"{number:02d}.png",
            Image.fromarray(changed).resize((64, 64), Image.Resampling.NEAREST),
        )
    assert "outlier" not in inspected(tmp_path / "set").issues
    put(
        tmp_path / "set",
        "stranger.png",
        Image.fromarray(255 - base).resize((64, 64), Image.Resampling.NEAREST),
    )
    assert inspected(tmp_path / "set").files()["outlier"] == ["stranger.png"]


def test_gray_images_are_odd_only_among_coloured_ones(tmp_path: Path) -> None:
    for number in range(30):
        put(tmp_path / "set", f"{number}.png", tiles(number).convert("L"))
    assert "grayscale" not in inspected(tmp_path / "set").issues


def test_images_are_small_for_one_resolution_and_large_enough_for_another(tmp_path: Path) -> None:
    root = clean(tmp_path / "set", count=5)
    assert "upscaled" not in inspected(root, resolution=64).issues
    assert len(inspected(root, resolution=65).issues["upscaled"]) == 5


def test_a_model_that_could_store_the_set_is_remarked_on(tmp_path: Path) -> None:
    root = clean(tmp_path / "set", count=5)
    values = 5 * RESOLUTION**2 * 3
    assert inspected(root, parameters=values).figures["model"]["values_in_images"] == values
    assert not any(
        "could memorize" in remark for remark in inspected(root, parameters=values).remarks
    )
    assert any(
        "could memorize" in remark for remark in inspected(root, parameters=values + 1).remarks
    )


def test_a_gray_image_has_one_value_per_pixel(tmp_path: Path) -> None:
    form = PixelFormat(shapes=((RESOLUTION, RESOLUTION),), channels=1)
    found = inspected(clean(tmp_path / "set", count=5), form=form)
    assert found.figures["model"]["values_in_images"] == 5 * RESOLUTION**2


# --- what is written ------------------------------------------------------------------------------


def test_the_same_data_give_the_same_bytes(defects: Path, written: Path, tmp_path: Path) -> None:
    write(inspected(defects), tmp_path / "again")
    assert {path.name for path in written.iterdir()} == {
        "data.json",
        "data_report.html",
        "rejects.txt",
    }
    for path in written.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_nothing_is_changed_or_deleted(defects: Path, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[bytes, int]]:
        return {
            str(path): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in defects.rglob("*")
            if path.is_file()
        }

    before = state()
    write(inspected(defects), tmp_path / "out")
    assert state() == before


def test_the_reject_list_keeps_one_of_each_copy_and_whatever_is_called_differently(
    written: Path,
) -> None:
    lines = (written / "rejects.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#")
    names = {line.partition("\t")[0]: line.partition("\t")[2] for line in lines[1:]}
    assert names.keys() == {
        "empty.png",
        "page.png",
        "cut.jpg",
        "flat.png",
        "twin-2.png",
        "twin-3.bmp",
        "near-2.jpg",
    }
    assert names["twin-2.png"] == "duplicate of twin-1.png"
    assert all(names.values())


def test_training_leaves_out_what_the_reject_list_names(defects: Path, written: Path) -> None:
    config = {"source": Folder(str(defects)), "resolution": RESOLUTION}
    rejects = written / "rejects.txt"
    dataset = index(DataConfig(**config, exclude=str(rejects)))
    left = {entry.name for entry in dataset.entries}
    assert not left & {line.partition("\t")[0] for line in rejects.read_text().splitlines()}
    assert {"twin-1.png", "near-1.png", "alike-1.png", "alike-2.jpg"} <= left
    assert len(set(dataset.ids)) == len(left)
    assert len(index(DataConfig(**config)).entries) == len(left) + 4


@pytest.mark.parametrize(
    "name",
    [
        "#1.png",
        "# 1.png",
        "#.png",
        " spaced .png",
        "ünï–çødé.png",
        "a,b;c.png",
        "line\u2028break.png",
    ],
)
def test_odd_names_in_the_reject_list_are_left_out_too(tmp_path: Path, name: str) -> None:
    root = clean(tmp_path / "set", captions=False, count=5)
    put(root, name, Image.new("RGB", (64, 64), (9, 99, 9)))
    write(inspected(root), tmp_path / "out")
    dataset = index(
        DataConfig(
            source=Folder(str(root)),
            resolution=RESOLUTION,
            exclude=str(tmp_path / "out" / "rejects.txt"),
        )
    )
    assert len(dataset.entries) == 5
    assert name in {reject.name for reject in dataset.rejects}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_list_written_by_hand_may_have_comments_empty_lines_and_windows_line_ends(
    tmp_path: Path, end: str
) -> None:
    root = clean(tmp_path / "set", captions=False, count=6)
    lines = [
        "\ufeff# mine",
        "clean-001.png",
        "",
        "# clean-002.png",
        "clean-003.png\tblurred",
        "no-such.png",
    ]
    (tmp_path / "mine.txt").write_bytes(end.join(lines).encode())
    dataset = index(
        DataConfig(
            source=Folder(str(root)), resolution=RESOLUTION, exclude=str(tmp_path / "mine.txt")
        )
    )
    assert [entry.name for entry in dataset.entries] == [
        f"clean-{number:03d}.png" for number in (0, 2, 4, 5)
    ]


def test_a_reject_list_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nowhere\.txt: cannot be read: .*\n  hint: name a text file"
    ):
        index(
            DataConfig(
                source=Folder(str(clean(tmp_path / "set", count=3))),
                exclude=str(tmp_path / "nowhere.txt"),
            )
        )


# --- the page -------------------------------------------------------------------------------------

VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """What a browser sees: elements, their attributes, the text outside scripts; `broken` where an
    element is not closed.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.broken = "", False
        self.feed(html)
        self.close()
        self.broken |= bool(self.open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] == "li" != tag:
            self.open.pop()
        self.broken |= not self.open or self.open.pop() != tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] not in ("script", "style") else ""


def page_of(folder: Path) -> str:
    return (folder / "data_report.html").read_text(encoding="utf-8")


def hostile(root: Path) -> Path:
    attacks = [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "' onmouseover='alert(1)",
        "{{ 7 * 7 }} {% raw %}",
        "</pre></html>",
    ]
    for number, attack in enumerate(attacks):
        folder = f"{number}" + attack.replace("/", "\N{FRACTION SLASH}")
        for copy in range(2):
            put(root, f"{folder}/{copy}{attack.replace('/', '')}.png", tiles(number), attack)
    put(root, "0<b>/<i>.png", b"<script>alert(2)</script>")
    return root


def test_the_page_is_well_formed_and_shows_every_kind(written: Path) -> None:
    page = Page(page_of(written))
    assert not page.broken
    assert all(KINDS[kind].title in page.text for kind in data_of(written)["issues"])
    assert all(name in page.text for name in IMAGES)


@pytest.mark.parametrize("make", [planted, hostile, clean])
def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path, make) -> None:
    write(inspected(make(tmp_path / "set")), tmp_path / "out")
    html = page_of(tmp_path / "out")
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert not {"href", "action", "srcset", "data", "poster", "background"} & attributes.keys()
        if "src" in attributes:
            assert tag == "img"
            assert attributes["src"].startswith("data:image/webp;base64,")
    without_images = re.sub(r"data:image/webp;base64,[\w+/=]+", "", html)
    assert not re.search(r"//\w|@import|url\(", without_images)
    policy = next(
        attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv")
    )
    assert "default-src 'none'" in policy


def test_names_captions_and_categories_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    write(inspected(hostile(tmp_path / "set")), tmp_path / "out")
    html = page_of(tmp_path / "out")
    page = Page(html)
    assert not page.broken
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not {
        name for _, attributes in page.elements for name in attributes if name.startswith("on")
    }
    assert "i" not in {tag for tag, _ in page.elements}
    assert "0<b>/<i>.png" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "alert(1)" not in re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]


def test_json_keeps_hostile_captions_as_they_are(tmp_path: Path) -> None:
    data = report(hostile(tmp_path / "set"), tmp_path / "out")
    assert any("<script>" in name for name in data["issues"]["duplicate"])
    assert data["reasons"].keys() == {"0<b>/<i>.png"}


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"cannot be written: .*\n  hint: name another folder with --out"
    ):
        write(inspected(clean(tmp_path / "set", count=2)), tmp_path / "file" / "out")


# --- the scores -----------------------------------------------------------------------------------


def by_definition(features: np.ndarray) -> float:
    """Friedman & Dieng 2023: exp of the entropy of the eigenvalues of K/n, K the cosine
    similarities, n x n.
    """
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    kernel = np.array([[float(a @ b) for b in rows] for a in rows])
    values = np.linalg.eigvals(kernel / len(rows)).real
    return float(np.exp(sum(-value * np.log(value) for value in values if value > 1e-12)))


@pytest.mark.parametrize(("count", "size"), [(5, 20), (20, 5), (12, 12), (1, 3), (2, 1)])
def test_the_vendi_score_is_that_of_its_definition(count: int, size: int) -> None:
    features = np.random.default_rng(count).normal(size=(count, size))
    assert vendi(features) == pytest.approx(by_definition(features), rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_equal_images_count_as_one_and_unrelated_ones_as_many(count: int) -> None:
    assert vendi(np.ones((count, 9))) == pytest.approx(1)
    assert vendi(np.eye(30)[:count]) == pytest.approx(count)
    assert vendi(np.repeat(np.eye(30)[:count], 3, axis=0)) == pytest.approx(count)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 12),
    size=st.integers(1, 12),
    scale=st.floats(1e-3, 1e3),
)
def test_the_vendi_score_lies_between_one_and_the_number_whatever_the_order_and_length(
    seed: int, count: int, size: int, scale: float
) -> None:
    features = np.random.default_rng(seed).normal(size=(count, size))
    score = vendi(features)
    assert 1 - 1e-9 <= score <= min(count, size) + 1e-9
    assert vendi(scale * features[::-1]) == pytest.approx(score)


def test_the_report_scores_the_whole_and_each_category(tmp_path: Path) -> None:
    for number in range(12):
        put(tmp_path / "set", f"varied/{number}.png", tiles(number))
        put(tmp_path / "set", f"same/{number}.png", tiles(99))
    figures = inspected(tmp_path / "set").figures["vendi"]
    assert figures["n"] == 24
    assert figures["extractor"]
    assert figures["by_category"]["same"] == pytest.approx(1, abs=0.01)
    assert figures["by_category"]["varied"] > 3
    assert figures["overall"] < figures["by_category"]["varied"]


@pytest.mark.parametrize("counts", [{"a": 5, "b": 1}, {"a": 4, "b": 4}, {"a": 9, "b": 2, "c": 1}])
def test_the_effective_number_of_categories_is_exp_of_the_entropy(
    tmp_path: Path, counts: dict[str, int]
) -> None:
    for category, count in counts.items():
        for number in range(count):
            put(tmp_path / "set", f"{category}/{number}.png", tiles(1000 * ord(category) + number))
    put(tmp_path / "set", "a/unreadable.png", b"")
    found = inspected(tmp_path / "set").figures["categories"]
    assert found["counts"] == counts
    assert found["effective_number"] == pytest.approx(
        np.exp(stats.entropy(list(counts.values()))), abs=0.005
    )


# --- next to nothing ------------------------------------------------------------------------------


def test_one_image_is_reported_on(tmp_path: Path) -> None:
    data = report(clean(tmp_path / "set", count=1), tmp_path / "out")
    assert (data["images"], data["readable"], data["distinct"], data["issues"]) == (1, 1, 1, {})
    assert data["vendi"]["overall"] == 1
    assert not Page(page_of(tmp_path / "out")).broken


def test_two_equal_images_are_one(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / "set", name, tiles(0))
    data = report(tmp_path / "set", tmp_path / "out")
    assert (data["distinct"], data["copies"], data["issues"]) == (
        1,
        1,
        {"duplicate": ["a.png", "b.png"]},
    )


def test_where_nothing_can_be_read_it_says_so_and_why(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "set", f"{number}.png", b"")
    data = report(tmp_path / "set", tmp_path / "out")
    assert data["issues"] == {"unreadable": ["0.png", "1.png", "2.png"]}
    assert data["remarks"] == ["No image can be read: there is nothing to learn from."]
    page = Page(page_of(tmp_path / "out"))
    assert not page.broken
    assert "empty file" in page.text
    with pytest.raises(
        DataError, match=r"0 different readable images among 3 files, .* \(0\.png: empty file"
    ):
        index(DataConfig(source=Folder(str(tmp_path / "set"))))


def test_a_folder_without_images_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images") as caught:
        inspected(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_dim_set_is_measured_as_training_sees_it(tmp_path: Path) -> None:
    """12 bits of a camera that fill a sixteenth of 16: not black, not empty, not all the same."""
    from sfumato.data.frames import expand_frames
    from sfumato.data.value_range import choose_scale

    (tmp_path / "set").mkdir()
    y, x = np.mgrid[:64, :64]
    for number in range(30):
        r = np.random.default_rng(number)
        spots = sum(
            np.exp(-((y - r.uniform(0, 64)) ** 2 + (x - r.uniform(0, 64)) ** 2) / r.uniform(20, 80))
            for _ in range(5)
        )
        np.save(
            tmp_path / "set" / f"{number}.npy",
            (100 + 700 * spots + r.normal(0, 3, (64, 64))).astype(np.uint16),
        )
    listing = expand_frames(Folder(str(tmp_path / "set")).listing(), "first")
    chosen = choose_scale("auto", listing.entries)
    form = PixelFormat(shapes=((32, 32),), channels=1, bits=16, scale=chosen.scale)
    found = inspect_data(
        listing, source="set", plan=IntendedModel(resolution=32, form=form, remarks=chosen.lines)
    )
    assert found.figures["distinct"] == 30
    assert "low_information" not in found.issues
    assert found.rejects() == {}
    assert found.remarks[0].startswith("12-bit values: 0 is black and 4,095 white")


def test_the_page_allows_its_own_script_by_its_hash_and_no_other(written: Path) -> None:
    page = (written / "data_report.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == page.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert not re.search(r"\son\w+=", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))


def test_of_a_large_set_a_sample_of_each_category_is_measured_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "set"
    for category, numbers in (("a", range(60)), ("b", range(100, 120))):
        for number in numbers:
            place = root / category / f"{number:03}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(encode(noise(20, 20, seed=number)))
    whole = inspected(root)
    assert whole.figures["measured"] == whole.figures["images"] == 80
    assert not any("were measured" in remark for remark in whole.remarks)
    monkeypatch.setattr("sfumato.data.check.inspect.MEASURED", 40)
    found = inspected(root)
    assert Counter(entry.category for entry in found.entries) == {"a": 30, "b": 10}
    assert found.figures["images"] == 80
    assert found.figures["measured"] == found.figures["readable"] == 40
    assert found.learned == whole.learned == 80
    (remark,) = [remark for remark in found.remarks if "were measured" in remark]
    # 1.96 sqrt(0.25 / 40 (1 - 1/2))
    assert remark.startswith("40 of 80 images were measured")
    assert "at most 11.0%" in remark
    assert found.ledger is not None
    assert found.ledger.balanced
    assert "80 images used (40 of them were not opened)" in found.ledger.line()
    assert found.figures["categories"]["counts"] == {"a": 60, "b": 20}
    written = write(found, tmp_path / "report")
    assert "of the 40 images that were measured, of 80" in written[2].read_text()
    assert "were measured" not in write(whole, tmp_path / "whole")[2].read_text()
