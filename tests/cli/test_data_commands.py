"""The data verbs and `train --dry-run` on tiny folders: what they say and write, that they change
nothing, and how they fail.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato import config
from sfumato.config import load_yaml
from sfumato.data import source_at
from sfumato.recipes import Run, resolve
from sfumato.training import Trainer
from tests.helpers.cli import Result, sfumato

CAPTIONS = [
    "a red fox in snow",
    "a red apple on a table",
    "an arctic fox asleep",
    "green apples in a bowl",
]
WAYS = [
    ["data", "check"],
    ["data", "coverage", "--prompt", "fox"],
    ["data", "cache"],
    ["train", "--dry-run"],
    ["train"],
]
SMALL = [
    "network.channels=32",
    "network.multipliers=[1,1]",
    "network.attention_depths=[1]",
    "network.head_channels=32",
    "network.blocks=1",
    "batch_size=4",
    "precision=float32",
    "data.workers=0",
]


def tiles(seed: int, size: int = 16) -> bytes:
    """An image with sharp edges, unlike that of any other seed."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((size, size), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def put(root: Path, name: str, data: bytes, caption: str | None = None) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve captioned images in two categories; the working directory and the cache are empty."""
    for number in range(12):
        put(
            tmp_path / "pets",
            f"{'ab'[number % 2]}/{number:02d}.png",
            tiles(number),
            CAPTIONS[number % 4],
        )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "pets"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_refused(result: Result, what: str, *, where: object = "", hint: str) -> None:
    """Exit code 2, nothing on standard output, and a message that says what, where and how to fix
    it.
    """
    assert result.code == 2
    assert result.out == ""
    assert f"error: {where}" in result.err
    assert what in result.err
    assert f"\n  hint: {hint}" in result.err
    assert "Traceback" not in result.err


# --- check ----------------------------------------------------------------------------------------


def test_check_reports_and_changes_nothing(images: Path) -> None:
    put(images, "a/broken.png", b"")
    put(images, "a/twin.png", tiles(0))
    before = contents(images)
    result = sfumato("data", "check", images)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == "26 files: 13 images used, 12 captions, 1 left out (1 empty file)"
    assert "14 images, 13 readable, 12 without copies" in lines
    assert any(line.split()[:2] == ["1", "unreadable"] for line in lines)
    assert any(line.split()[:2] == ["2", "duplicate"] for line in lines)
    assert lines[-3:] == [
        f"data-check/pets/{name}" for name in ("data_report.html", "data.json", "rejects.txt")
    ]
    assert contents(images) == before
    assert sorted(contents(Path("."))) == sorted(lines[-3:])


def test_check_writes_where_it_is_told_and_judges_by_the_resolution(
    images: Path, tmp_path: Path
) -> None:
    for resolution, found in ((16, 0), (17, 12)):
        result = sfumato(
            "data", "check", images, "--out", tmp_path / "out", "--resolution", resolution
        )
        assert result.code == 0
        data = json.loads((tmp_path / "out" / "data.json").read_text())
        assert len(data["issues"].get("upscaled", [])) == found
        assert data["resolution"] == resolution
    assert contents(Path(".")) == {}


def test_the_reject_list_goes_straight_into_training(images: Path, tmp_path: Path) -> None:
    put(images, "a/broken.png", b"")
    put(images, "a/twin.png", tiles(0), CAPTIONS[0])
    sfumato("data", "check", images, "--out", tmp_path / "out")
    result = sfumato(
        "train", images, f"data.exclude={tmp_path / 'out' / 'rejects.txt'}", *SMALL, "--dry-run"
    )
    assert result.code == 0
    assert ", 2 left out\n" in result.out


def test_check_of_images_that_cannot_be_read_lists_them(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "set", f"{number}.png", b"<html>")
    result = sfumato("data", "check", tmp_path / "set", "--out", tmp_path / "out")
    assert result.code == 0
    assert "3 images, 0 readable" in result.out
    assert "3 unreadable" in result.out
    assert "No image can be read: there is nothing to learn from." in result.out
    assert (tmp_path / "out" / "rejects.txt").read_text().count(
        "not an image in a known format"
    ) == 3


# --- coverage -------------------------------------------------------------------------------------


def test_coverage_tells_seen_never_together_and_unseen_apart(images: Path) -> None:
    result = sfumato(
        "data",
        "coverage",
        images,
        "--prompt",
        "red fox",
        "--prompt",
        "a green fox",
        "--prompt",
        "a red hedgehog",
    )
    assert result.code == 0
    assert "“red fox”: seen: 3 of 12 captions hold all of its words" in result.out
    assert "“a green fox”: every part seen, but never together" in result.out
    assert "“a red hedgehog”: unseen words" in result.out
    assert "  words: green 3, fox 6\n  together: green + fox 0\n" in result.out
    assert "a red fox in snow  (a/00.png)" in result.out
    for number, slug in enumerate(("red-fox", "a-green-fox", "a-red-hedgehog")):
        path = Path(f"data-check/pets/coverage-{number:02d}-{slug}.png")
        assert f"{path}\n" in result.out
        with Image.open(path) as sheet:
            assert sheet.width > sheet.height


@pytest.mark.parametrize(("settings", "cut"), [([], False), (["conditioner.text.length=4"], True)])
def test_check_counts_the_captions_that_the_run_would_cut(
    images: Path, tmp_path: Path, settings: list[str], cut: bool
) -> None:
    """The preset's length holds all of them; START and three words hold none."""
    result = sfumato("data", "check", images, *settings, "--out", tmp_path / "out")
    assert result.code == 0
    found = json.loads((tmp_path / "out" / "data.json").read_text())
    assert found["captions"]["tokens_read"] == (4 if settings else 16)
    assert len(found["issues"].get("caption_truncated", [])) == (12 if cut else 0)
    said = (
        "captions: 4 of 4 distinct captions are truncated, since the model reads 4 tokens"
        if cut
        else "none of 4 distinct captions is truncated"
    )
    assert said in result.out
    assert any(said in remark for remark in found["remarks"])


def test_coverage_goes_by_categories_where_there_are_no_captions(tmp_path: Path) -> None:
    for number, category in enumerate(("cat", "dog")):
        put(tmp_path / "set", f"{category}/1.png", tiles(number))
    result = sfumato(
        "data", "coverage", tmp_path / "set", "--prompt", "a dog", "--out", tmp_path / "out"
    )
    assert "seen: 1 of 2" in result.out


def test_held_out_captions_teach_nothing(tmp_path: Path) -> None:
    put(tmp_path / "set", "train/1.png", tiles(1), "a red fox")
    put(tmp_path / "set", "test/2.png", tiles(2), "a blue whale")
    result = sfumato(
        "data", "coverage", tmp_path / "set", "--prompt", "whale", "--out", tmp_path / "out"
    )
    assert "unseen words" in result.out
    assert "1.png" not in result.out


def test_coverage_without_any_words_says_what_is_missing(tmp_path: Path) -> None:
    put(tmp_path / "set", "1.png", tiles(1))
    result = sfumato("data", "coverage", tmp_path / "set", "--prompt", "fox")
    assert_refused(
        result,
        "has neither captions nor categories",
        where=tmp_path / "set",
        hint="put a .txt file beside each image",
    )


@pytest.mark.parametrize("prompt", ["", "!!!", "../../escape", "x" * 100_000, "狐", "🦊"])
def test_odd_prompts_are_answered_and_write_inside_their_folder(
    images: Path, tmp_path: Path, prompt: str
) -> None:
    result = sfumato(
        "data", "coverage", images, "--prompt", prompt, "--prompt", "fox", "--out", tmp_path / "out"
    )
    assert result.code == 0
    assert "unseen words" in result.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["coverage-01-fox.png"]


def test_coverage_asks_for_a_prompt(images: Path) -> None:
    result = sfumato("data", "coverage", images)
    assert result.code == 2
    assert "--prompt" in result.err


def test_captions_and_names_cannot_command_the_terminal(tmp_path: Path) -> None:
    put(tmp_path / "set", "fine/1.png", tiles(1), "a fox \x1b]0;owned\x07\u202egnp.exe")
    put(tmp_path / "set", "b\x1b]0;owned\x07/fox\x9b2J.png", tiles(2))
    for arguments in (
        ["coverage", tmp_path / "set", "--prompt", "fox"],
        ["check", tmp_path / "set"],
    ):
        result = sfumato("data", *arguments, "--out", tmp_path / "out")
        assert result.code == 0
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(result.out + result.err)
    again = sfumato(
        "data", "coverage", tmp_path / "set", "--prompt", "fox", "--out", tmp_path / "out"
    )
    assert "\N{REPLACEMENT CHARACTER}" in again.out


# --- convert --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pets.parquet", "pets.tar"])
def test_convert_keeps_images_captions_and_categories(
    images: Path, tmp_path: Path, name: str
) -> None:
    result = sfumato("data", "convert", images, tmp_path / name)
    assert (result.code, result.out) == (0, f"{tmp_path / name}\n")
    before, after = (
        {
            (entry.image.read(), entry.captions, entry.category)
            for entry in source_at(str(place)).listing().entries
        }
        for place in (images, tmp_path / name)
    )
    assert before == after
    assert len(after) == 12


def test_convert_writes_the_same_bytes_each_time(images: Path, tmp_path: Path) -> None:
    for kind in ("parquet", "webdataset"):
        for time in ("first", "second"):
            assert (
                sfumato("data", "convert", images, tmp_path / f"{kind}-{time}", "--to", kind).code
                == 0
            )
        assert contents(tmp_path / f"{kind}-first") == contents(tmp_path / f"{kind}-second")


def test_convert_does_not_write_over_anything(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "pets.parquet"
    target.write_text("precious")
    assert_refused(
        sfumato("data", "convert", images, target),
        "exists already",
        where=target,
        hint="name a new file",
    )
    assert target.read_text() == "precious"


def test_convert_names_the_kinds_that_it_knows(images: Path, tmp_path: Path) -> None:
    for arguments in ([tmp_path / "pets.rar"], [tmp_path / "out", "--to", "rar"]):
        assert_refused(
            sfumato("data", "convert", images, *arguments),
            "is not a supported container",
            hint="use --to parquet or",
        )
    assert not list(tmp_path.glob("pets.rar"))


# --- cache ----------------------------------------------------------------------------------------


def test_cache_decodes_parts_for_several_machines(images: Path, tmp_path: Path) -> None:
    put(images, "a/broken.png", b"")
    said = [sfumato("data", "cache", images, "--part", f"{part}/2") for part in (2, 1)]
    assert [result.code for result in said] == [0, 0]
    assert said[1].out.startswith("part 1/2: 6 images, 0 left out")
    assert said[0].out.startswith("part 2/2: 7 images, 1 left out")
    kept = {name for name in contents(tmp_path / "cache") if "pixels" in name}
    assert sfumato("data", "cache", images).out.startswith("12 images, 1 left out")
    assert {name for name in contents(tmp_path / "cache") if "pixels" in name} == kept
    for part in ("0/2", "3/2", "a/b", "2"):
        result = sfumato("data", "cache", images, "--part", part)
        assert result.code == 2
        assert "such as 3/64" in result.err


def test_cache_decodes_ahead_of_training(images: Path, tmp_path: Path) -> None:
    put(images, "a/broken.png", b"")
    result = sfumato("data", "cache", images)
    assert result.code == 0
    assert result.out == f"12 images, 1 left out; cache: {tmp_path / 'cache'}\n"
    kept = contents(tmp_path / "cache")
    assert kept
    assert sfumato("data", "cache", images).out == result.out
    assert contents(tmp_path / "cache") == kept
    assert sfumato("data", "cache", images, "data.resolution=8").code == 0
    assert contents(tmp_path / "cache").keys() > kept.keys()


def test_cache_takes_recipes_and_refuses_keys_that_are_none(images: Path) -> None:
    assert sfumato("data", "cache", "digits").out.startswith("1797 images, 0 left out")
    assert_refused(
        sfumato("data", "cache", images, "data.resolutoin=8"),
        "unknown key `data.resolutoin`",
        where=images,
        hint="",
    )


# --- wrong sources --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_a_path_that_is_not_there(tmp_path: Path, way: list[str]) -> None:
    result = sfumato(
        *way[:2] if way[0] == "data" else way[:1],
        tmp_path / "nowhere",
        *way[2 if way[0] == "data" else 1 :],
    )
    assert result.code == 2
    assert str(tmp_path / "nowhere") in result.err
    assert "no such" in result.err or "is not a recipe" in result.err
    assert "\n  hint: " in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("empty", "holds no images"),
        ("note.txt", "is not a file type that holds images"),
        ("fake.zip", ""),
        ("fake.npz", ""),
        ("fake.tar", ""),
        ("fake.parquet", ""),
    ],
)
def test_a_path_that_holds_no_images(tmp_path: Path, way: list[str], name: str, what: str) -> None:
    (tmp_path / "empty").mkdir()
    if name != "empty":
        (tmp_path / name).write_text("hello")
    verb, options = (way[:2], way[2:]) if way[0] == "data" else (way[:1], way[1:])
    assert_refused(sfumato(*verb, tmp_path / name, *options), what, where=tmp_path / name, hint="")


def test_converting_from_nowhere_writes_nothing(tmp_path: Path) -> None:
    assert_refused(
        sfumato("data", "convert", tmp_path / "nowhere", tmp_path / "out.tar"),
        "no such file",
        where=tmp_path / "nowhere",
        hint="check the path",
    )
    assert list(tmp_path.iterdir()) == []


def test_data_verbs_have_their_figures_for_a_program(images: Path) -> None:
    checked = json.loads(sfumato("data", "check", images, "--json").out)
    assert (checked["images"], checked["readable"]) == (12, 12)
    data = next(path for path in checked["files"] if path.endswith("data.json"))
    written = json.loads(Path(data).read_text())
    assert {key: checked[key] for key in written} == written
    (covered,) = json.loads(
        sfumato("data", "coverage", images, "--prompt", "a red fox", "--json").out
    )
    assert (covered["verdict"], covered["captions"], covered["counts"]["fox"]) == ("seen", 12, 6)
    assert covered["nearest"][0]["captions"] == ["a red fox in snow"]


# --- train --dry-run ------------------------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Trainer) -> None:
        raise AssertionError("a dry run trains nothing")

    monkeypatch.setattr(Trainer, "run", fail)


def test_a_dry_run_of_a_folder_gives_reasons_facts_predictions_and_the_configuration(
    images: Path, no_training: None
) -> None:
    before = contents(images)
    result = sfumato("train", images, *SMALL, "budget.steps=8", "--dry-run", "--config")
    assert result.code == 0, result.err
    notes = [line for line in result.out.splitlines() if line.startswith("# ")]
    assert notes[0].startswith("# chosen: 12 images on ")
    assert any(line.startswith("# chosen: steered by 2 categories") for line in notes)
    assert any("training images, " in line and line.endswith(", 0 left out") for line in notes)
    assert any(line.startswith("# 2 categories; ") for line in notes)
    assert any(line.startswith("# predicted: diffusion model, 8 steps of ") for line in notes)
    assert any(line.startswith("# predicted: ") and line.endswith(" GiB of disk") for line in notes)
    assert config.parse(Run, load_yaml(result.out, where="printed")) == resolve(
        images, [*SMALL, "budget.steps=8"]
    )
    assert contents(images) == before
    assert contents(Path(".")) == {}


def test_what_a_dry_run_prints_is_a_recipe(images: Path, tmp_path: Path, no_training: None) -> None:
    printed = sfumato("train", images, *SMALL, "--dry-run", "--config").out
    (tmp_path / "mine.yaml").write_text(printed)
    again = sfumato("train", tmp_path / "mine.yaml", "--dry-run", "--config")
    assert again.code == 0
    assert "# chosen" not in again.out  # the file is the choice
    assert load_yaml(again.out, where="again") == load_yaml(printed, where="printed")


def test_a_dry_run_for_a_program_holds_what_it_says_and_the_configuration(
    images: Path, no_training: None
) -> None:
    found = json.loads(
        sfumato("train", images, *SMALL, "budget.steps=8", "--dry-run", "--json").out
    )
    assert found["stages"][-1]["steps"] == 8
    assert found["long_enough"] is False
    assert found["findings"]
    assert config.parse(Run, found["config"]) == resolve(images, [*SMALL, "budget.steps=8"])
    assert found["total_s"] >= sum(stage["seconds"] for stage in found["stages"])
    assert sfumato("train", images, "--json").code == sfumato("train", images, "--config").code == 2


def test_a_dry_run_finds_what_training_would_fail_on(
    images: Path, tmp_path: Path, no_training: None
) -> None:
    put(tmp_path / "one", "1.png", tiles(1))
    result = sfumato("train", tmp_path / "one", *SMALL, "--dry-run")
    assert_refused(
        result,
        "1 different readable images",
        where=tmp_path / "one",
        hint="at least two are needed",
    )
    result = sfumato("train", images, "network.channels=33", "--dry-run")
    assert result.code == 2
    assert "channels" in result.err
    result = sfumato("train", images, "data.exclude=nowhere.txt", "--dry-run")
    assert_refused(result, "cannot be read", where="nowhere.txt", hint="name a text file")


def test_data_check_takes_settings_and_says_what_black_and_white_are(tmp_path: Path) -> None:
    (tmp_path / "dim").mkdir()
    for seed in range(6):
        np.save(
            tmp_path / "dim" / f"{seed}.npy",
            np.random.default_rng(seed).integers(0, 900, (24, 24)).astype(np.int32),
        )
    said = sfumato(
        "data", "check", tmp_path / "dim", "data.range=[0,900]", "--out", tmp_path / "report"
    )
    assert said.code == 0
    assert "6 images, 6 readable" in said.out
    assert "values: 0 is black and 900 white, as set by data.range" in said.out
    refused = sfumato(
        "data", "check", tmp_path / "dim", "data.rnage=[0,900]", "--out", tmp_path / "other"
    )
    assert refused.code == 2
    assert "did you mean" in refused.err
