"""Tokens, places of photos and home folders leave in no artefact; nothing is fetched for a stranger."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sfumato.data.image_metadata import orientation_of, without_metadata
from sfumato.errors import redact_secrets
from sfumato.recipes.run_config import read_run_config, write_run_config
from sfumato.recipes.run_origin import is_made_here
from sfumato.storage.run_directory import RunDirectory
from tests.faults.conftest import Case
from tests.helpers.runs import images

TOKEN, PLACE, COMMENT = "PLANTEDTOKEN", "PLANTEDPLACE", "PLANTEDCOMMENT"


def photo(seed: int, orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = PLACE
    exif[0x8825] = {1: "N", 2: (52.0, 31.0, 12.3456), 3: "E", 4: (13.0, 24.0, 17.0)}
    return exif


def encoded(kind: str, orientation: int = 1) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    buffer = io.BytesIO()
    options = {"comment": COMMENT.encode()} if kind == "JPEG" else {}
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("Comment", COMMENT)
        info.add_itxt("Description", COMMENT)
        options = {"pnginfo": info}
    if kind == "WEBP":
        options = {"lossless": True, "xmp": COMMENT.encode()}
    Image.fromarray(pixels).save(buffer, kind, exif=photo(0, orientation), **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_are_left_out_and_pixels_and_orientation_kept(kind: str, orientation: int) -> None:
    data = encoded(kind, orientation)
    assert PLACE.encode() in data
    assert COMMENT.encode() in data
    clean = without_metadata(data)
    assert PLACE.encode() not in clean
    assert COMMENT.encode() not in clean
    assert orientation_of(clean) == orientation
    before, after = (Image.open(io.BytesIO(each)) for each in (data, clean))
    assert (np.asarray(before) == np.asarray(after)).all()
    assert not dict(after.getexif().get_ifd(0x8825))
    assert without_metadata(clean) == clean


def test_what_hides_in_unusual_places_is_left_out_too() -> None:
    """Fill bytes before a marker, comments between scans, and what follows the image: a second photo,
    a film, or a word.
    """
    data, second = encoded("JPEG"), encoded("JPEG", 6)
    filled = data[:2] + data[2:].replace(b"\xff\xe1", b"\xff\xff\xff\xe1", 1)
    progressive = io.BytesIO()
    Image.open(io.BytesIO(data)).save(progressive, "JPEG", progressive=True, quality=90)
    scans = progressive.getvalue()
    between = scans.rindex(b"\xff\xda")
    comment = b"\xff\xfe" + (2 + len(COMMENT)).to_bytes(2, "big") + COMMENT.encode()
    spoilt = scans[:between] + comment + scans[between:]
    for each in (filled, data + second, data + COMMENT.encode(), spoilt):
        clean = without_metadata(each)
        assert COMMENT.encode() not in clean
        assert PLACE.encode() not in clean
        before, after = (np.asarray(Image.open(io.BytesIO(one))) for one in (each, clean))
        assert (before == after).all()
    png = encoded("PNG")
    for each in (png + b"x", png + COMMENT.encode()):
        assert COMMENT.encode() not in without_metadata(each)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_files_are_said_to_be(kind: str) -> None:
    data = encoded(kind)
    for end in range(12, len(data) - 1, 7):
        with pytest.raises(ValueError, match="cut or damaged"):
            without_metadata(data[:end])
    assert without_metadata(b"GIF89a" + data) == b"GIF89a" + data


def test_ordinary_names_are_no_secrets() -> None:
    for text in (
        "/data/hf_datasets-images/x", "/models/hf_checkpoints/sd", "https://a.b/c?design=7&assign=1",
    ):  # fmt: skip
        assert redact_secrets(text) == text
    for text in ("hf_" + "a1B2" * 9, "https://a.b/c?sig=7", "https://a.b/c?X-Amz-Signature=7"):
        assert redact_secrets(text) != text


def planted(text: str, *places: Path) -> list[str]:
    files = [
        file for place in places for file in ([place] if place.is_file() else place.rglob("*"))
    ]
    return [str(file) for file in files if file.is_file() and text.encode() in file.read_bytes()]


def test_what_is_planted_leaves_in_no_artefact(pixel: Case, tmp_path: Path) -> None:
    folder = images(tmp_path / "home-of-somebody" / "images", size=8)
    for number in range(4):
        (folder / "even" / f"photo-{number}.jpg").write_bytes(encoded("JPEG", 6))
    secret = tmp_path / f"list?token={TOKEN}"
    secret.write_text("")
    run, out = pixel.lab.new("private"), tmp_path / "out"
    out.mkdir()
    code, said = pixel.lab.call(
        "train", pixel.recipe, "--run", run, f"data.source.path={folder}",
        f"data.exclude={secret}", "budget.steps=4",
    )  # fmt: skip
    assert code == 0, said
    for arguments in (
        ("export", run, "--format", "bundle", "--out", out / "bundle"),
        ("data", "convert", folder, out / "shards.parquet"),
        ("data", "convert", folder, out / "shards.tar"),
        ("report", run),
    ):
        code, said = pixel.lab.call(*arguments)
        assert code == 0, said
    assert planted(TOKEN, run, out) == []
    for text in (PLACE, COMMENT, str(tmp_path)):
        assert planted(text, out) == [], text
    code, said = pixel.lab.call("resume", run, "budget.steps=6")
    assert code == 2
    code, said = pixel.lab.call("data", "convert", folder, out / "kept.tar", "--keep-metadata")
    assert code == 0
    assert planted(PLACE, out) == [str(out / "kept.tar")]  # the negative control


def test_formats_whose_metadata_stay_are_counted(pixel: Case, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", size=8)
    code, said = pixel.lab.call("data", "convert", folder, tmp_path / "all.tar")
    assert (code, "neither JPEG" in said) == (0, False)
    Image.new("L", (9, 9), 7).save(folder / "even" / "scan.tif")
    Image.new("L", (9, 9), 9).save(folder / "even" / "drawing.gif")
    code, said = pixel.lab.call("data", "convert", folder, tmp_path / "more.tar")
    assert code == 0
    assert "2 files, e.g. even/drawing.gif, are neither JPEG, PNG nor WebP" in " ".join(
        said.split()
    )


def test_a_run_from_elsewhere_may_not_reach_the_network(
    pixel: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pixel.lab.new("elsewhere")
    shutil.copytree(pixel.lab.place / "alone", run)
    plain = read_run_config(run)
    assert is_made_here(run)
    plain["conditioner"]["text"] = {"kind": "pretrained", "encoder": "evil/repository"}
    write_run_config(RunDirectory(run), plain)
    assert is_made_here(run)
    (run / "local.json").write_text(json.dumps({"seal": "0" * 64}))
    assert not is_made_here(run)
    code, said = pixel.lab.call("sample", run, "--num", "1", "--out", tmp_path / "no")
    assert code == 2
    assert "would be fetched from the network, and the run was not made on this machine" in said
    assert "--allow-hub" in said
    code, said = pixel.lab.call(
        "sample", run, "--num", "1", "--out", tmp_path / "no", "--allow-hub"
    )
    assert "was not made on this machine" not in said


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (self.mark, "w"))  # type: ignore[return-value]


def test_a_pickle_is_converted_only_if_it_is_trusted(pixel: Case, tmp_path: Path) -> None:
    file, mark = tmp_path / "model.ckpt", tmp_path / "mark"
    torch.save({"state_dict": {"w": torch.arange(3.0)}, "epoch": 3, "name": "x"}, file)
    code, said = pixel.lab.call("convert-checkpoint", file)
    assert code == 2
    assert "reading it can run code" in said
    code, said = pixel.lab.call("convert-checkpoint", file, "--i-trust-this-file")
    assert code == 0, said
    assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [0, 1, 2]
    assert "left out because they are not tensors: epoch, name" in said
    code, said = pixel.lab.call("convert-checkpoint", file, "--i-trust-this-file")
    assert code == 2
    assert "exists already" in said
    for number, content in enumerate((Payload(mark), {"w": Payload(mark)}, [1, 2])):
        evil = tmp_path / f"evil-{number}.pt"
        evil.write_bytes(pickle.dumps(content))
        code, said = pixel.lab.call("convert-checkpoint", evil, "--i-trust-this-file")
        assert code == 2, said
        assert not mark.exists()
