"""Whatever lies in a source is an image, says something about one, or is left out with a reason:
nothing is passed over in silence.
"""

import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato
from sfumato.data import DataConfig, Folder, Listing, index, source_at
from sfumato.data.ledger import NOTES, Ledger, describe_note
from sfumato.data.sources.folder_layout import FolderLayout
from sfumato.data.split_names import HELD_OUT, TRAIN, held_out_files, split_of
from sfumato.data.text_encoding import Texts
from tests.helpers.image_bytes import encode, noise

Files = dict[str, bytes]


def image(seed: int = 0, form: str = "PNG") -> bytes:
    return encode(noise(8, 8, seed=seed), form)


def as_folder(root: Path, files: Files) -> Path:
    for name, data in files.items():
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "set" / name).write_bytes(data)
    return root / "set"


def as_zip(root: Path, files: Files) -> Path:
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return root / "set.zip"


def as_windows_zip(root: Path, files: Files) -> Path:
    return as_zip(root, {name.replace("/", "\\"): data for name, data in files.items()})


def as_tar(root: Path, files: Files) -> Path:
    with tarfile.open(root / "set.tar", "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return root / "set.tar"


def wrapped(pack: Callable[[Path, Files], Path]) -> Callable[[Path, Files], Path]:
    return lambda root, files: pack(root, {f"my set/{name}": data for name, data in files.items()})


def apart(root: Path, files: Files) -> Path:
    """A tar in which texts do not stand beside their images."""
    return as_tar(
        root, dict(sorted(files.items(), key=lambda item: (item[0].rpartition(".")[2], item[0])))
    )


PACKED = {
    "folder": as_folder,
    "zip": as_zip,
    "zip of Windows": as_windows_zip,
    "tar": as_tar,
    "tar, apart": apart,
    "wrapped folder": wrapped(as_folder),
    "wrapped zip": wrapped(as_zip),
    "wrapped tar": wrapped(as_tar),
}


def listing(place: Path) -> Listing:
    found = source_at(str(place)).listing()
    ledger = Ledger.of(found)
    assert ledger.balanced, ledger
    return found


def told(found: Listing) -> list[tuple[str, str | None, str | None, tuple[str, ...]]]:
    """Name below the wrapper, category, hold-out and captions of each image."""
    return sorted(
        (e.name.removeprefix("my set/"), e.category, e.holdout, e.captions) for e in found.entries
    )


def reasons(found: Listing) -> dict[str, str]:
    return {reject.name.removeprefix("my set/"): reject.reason for reject in found.rejects}


SET = {
    "Train/cats/0.png": image(0),
    "Train/cats/0.txt": b"a cat",
    "Train/cats/1.jpg": image(1, "JPEG"),
    "Train/cats/1.jpg.txt": b"another cat",
    "Train/dogs/2.png": image(2),
    "Train/dogs/2.TXT": b"a dog",
    "test_set/dogs/3.png": image(3),
    "test_set/cats/lr_0.04.png": image(4),
    "overview.png": image(5),
    "README.md": b"hello",
    "Train/cats/Thumbs.db": b"x",
    "Train/cats/alone.txt": b"no image",
    "model.pt": b"x",
    "Train/cats/photo.heic": b"\0\0\0\x18ftypheic",
    "Train/cats/2.jfif": image(6, "JPEG"),
    "Train/dogs/5": image(7, "JPEG"),
    "Train/dogs/5.mask.png": image(8),
    "Train/dogs/unknown.001": image(9),
    "Train/dogs/broken.bin": b"x" * 99,
}


@pytest.mark.parametrize("kind", PACKED)
def test_the_same_tree_gives_the_same_listing_in_every_container_bare_and_wrapped(
    kind: str, tmp_path: Path
) -> None:
    found = listing(PACKED[kind](tmp_path, SET))
    assert told(found) == [
        ("Train/cats/0.png", "cats", None, ("a cat",)),
        ("Train/cats/1.jpg", "cats", None, ("another cat",)),
        ("Train/cats/2.jfif", "cats", None, ()),
        ("Train/dogs/2.png", "dogs", None, ("a dog",)),
        ("Train/dogs/5", "dogs", None, ()),
        ("Train/dogs/unknown.001", "dogs", None, ()),
        ("test_set/cats/lr_0.04.png", "cats", "test_set", ()),
        ("test_set/dogs/3.png", "dogs", "test_set", ()),
    ]
    why = reasons(found)
    assert why.keys() == {
        "overview.png",
        "README.md",
        "model.pt",
        "Train/cats/alone.txt",
        "Train/cats/photo.heic",
        "Train/dogs/broken.bin",
    }
    assert (
        "outside the split folders" in why["overview.png"]
        or "outside the one top folder" in why["overview.png"]
    )
    assert "HEIC is not supported: convert it" in why["Train/cats/photo.heic"]
    assert found.sidecars == {"captions": 3, "files of the system": 1, "masks": 1}
    assert found.total == len(SET)
    (layout,) = [remark for remark in found.remarks if "to train on" in remark]
    assert layout == "Train/ and test_set/: 6 to train on, 2 held out by name, 2 categories"


NAMES = st.lists(
    st.builds(
        lambda folder, stem, ending: f"{folder}{stem}{ending}",
        st.sampled_from(["", "a/", "b/", "a/b/", "train/", "test/", "Train/x/", "00000/"]),
        st.sampled_from(
            [
                "0",
                "1",
                "metadata",
                "dataset",
                "captions",
                "0.mask",
                "1.points",
                "x.y",
                "labels",
                "README",
                "thumbs",
            ]
        ),
        st.sampled_from(
            [
                ".png",
                ".JPG",
                ".txt",
                ".json",
                ".csv",
                ".jsonl",
                ".npy",
                ".heic",
                ".cls",
                ".tar",
                ".db",
                "",
                ".caption",
                ".weird",
            ]
        ),
    ),
    min_size=1,
    max_size=14,
    unique=True,
)
CONTENTS = st.sampled_from(
    [image(), b"", b"a cat", b"file_name,caption\n0.png,a cat\n", b"{}", b'{"caption": "x"}', b"7"]
)


def metadata_refuse(names: list[str]) -> bool:
    """Whether metadata may name nothing that is there, or contradict one another."""
    return any(name.rpartition("/")[2].startswith(("metadata.", "dataset.")) for name in names)


@pytest.mark.parametrize("pack", [as_folder, as_zip, as_tar])
@settings(max_examples=60, deadline=None)
@given(names=NAMES, data=st.data())
def test_every_file_has_one_fate(
    pack, tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    from sfumato.errors import DataError

    names = [name for name in names if not any(other.startswith(f"{name}/") for other in names)]
    place = pack(tmp_path_factory.mktemp("set"), {name: data.draw(CONTENTS) for name in names})
    if pack is as_folder and any(name.endswith(".tar") for name in names):
        return  # read as shards where no image lies beside them
    try:
        found = listing(place)
    except DataError:  # nothing to learn from
        assert not any(
            name.lower().endswith((".png", ".jpg")) and "mask" not in name for name in names
        ) or metadata_refuse(names)
        return
    assert found.total == len(names)
    assert {entry.name for entry in found.entries} | {
        r.name for r in found.rejects if not r.part
    } <= set(names)


def test_a_tar_or_table_beside_images_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "score": [0.5]}), tmp_path / "scores.parquet")
    table = (tmp_path / "scores.parquet").read_bytes()
    tar = as_tar(tmp_path, {"9.png": image(9)}).read_bytes()
    found = listing(
        as_folder(
            tmp_path,
            {"0.png": image(0), "1.png": image(1), "old.tar": tar, "scores.parquet": table},
        )
    )
    assert [entry.name for entry in found.entries] == ["0.png", "1.png"]
    assert all("archive or table" in reasons(found)[name] for name in ("old.tar", "scores.parquet"))


METADATA = {
    "commas": ("metadata.csv", "file_name,caption\n0.png,a cat, on a mat\n1.png,a dog\n"),
    "a space before a quotation mark": (
        "metadata.csv",
        'file_name, caption\n0.png, "a cat, on a mat"\n1.png, a dog\n',
    ),
    "semicolons": ("metadata.csv", "\ufefffilename;text\n./0.png;a cat, on a mat\n1.png;a dog\n"),
    "tabs": ("metadata.tsv", "Image\tPrompt\n0\ta cat, on a mat\n1\ta dog\n"),
    "backslashes": (
        "labels.csv",
        'path,id,Caption\n.\\0.png,7,"a cat, on a mat"\n.\\1.png,8,a dog\n',
    ),
    "a quotation mark that is never closed": (
        "captions.csv",
        'image,caption\n0.png,"a cat, on a mat"\n1.png,a dog\n2.png,"oh\n',
    ),
    "a quoted line break": (
        "metadata.csv",
        'file_name,caption\n0.png,"a cat, on a mat"\n1.png,a dog\n2.png,"two\nlines"\n',
    ),
    "one bad line": (
        "metadata.jsonl",
        '{"file_name": "0.png", "text": "a cat, on a mat"}\n{"file_name": \n{"file": "x"}\n'
        '{"file_name": "1.png", "text": "a dog"}\n',
    ),
    "captions by name": (
        "captions.json",
        '{"0.png": "a cat, on a mat", "1.png": {"caption": "a dog"}}',
    ),
    "several lines an image": (
        "captions.txt",
        "image|caption\n0.png|a cat, on a mat\n1.png|a dog\n",
    ),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_are_read_as_people_write_them(kind: str, tmp_path: Path) -> None:
    name, text = METADATA[kind]
    found = listing(
        as_folder(
            tmp_path, {"0.png": image(0), "1.png": image(1), "2.png": image(2), name: text.encode()}
        )
    )
    captions = {entry.name: entry.captions for entry in found.entries}
    assert captions["0.png"] == ("a cat, on a mat",)
    assert captions["1.png"] == ("a dog",)
    assert captions.get("2.png", ()) in ((), ("two\nlines",), ('"oh',))
    assert sum(reject.part for reject in found.rejects) == (2 if kind == "one bad line" else 0)


def test_a_bad_row_costs_that_row_and_says_where_it_is(tmp_path: Path) -> None:
    text = "file_name,category,caption\n0.png,a,x\n1.png,b,c,d,e\n\n2.png,b,one, two, three\nnone.png,a,x\n"
    found = listing(
        as_folder(
            tmp_path, {f"{i}.png": image(i) for i in range(3)} | {"metadata.csv": text.encode()}
        )
    )
    assert [(e.name, e.captions) for e in found.entries] == [
        ("0.png", ("x",)), ("1.png", ("c,d,e",)), ("2.png", ("one, two, three",)),
    ]  # fmt: skip
    assert {r.name: r.reason for r in found.rejects} == {
        "metadata.csv, line 6": "'none.png' does not exist"
    }


def test_folder_categories_stay_unless_metadata_have_a_column_for_them(tmp_path: Path) -> None:
    images = {"cats/0.png": image(0), "dogs/1.png": image(1), "dogs/2.png": image(2)}
    rows = b"file_name,caption\ncats/0.png,x\ndogs/1.png,y\n"
    found = listing(as_folder(tmp_path, images | {"metadata.csv": rows}))
    assert [(e.name, e.category) for e in found.entries] == [
        ("cats/0.png", "cats"),
        ("dogs/1.png", "dogs"),
    ]
    assert reasons(found) == {"dogs/2.png": "not named in the metadata"}
    assert any("data.source.unnamed=use" in remark for remark in found.remarks)
    used = Folder(str(tmp_path / "set"), unnamed="use").listing()
    assert [(e.name, e.category, e.captions) for e in used.entries][2] == ("dogs/2.png", "dogs", ())
    off = Folder(str(tmp_path / "set"), metadata="off").listing()
    assert [e.captions for e in off.entries] == [()] * 3
    assert {r.name for r in off.rejects} == {"metadata.csv"}
    (tmp_path / "set" / "metadata.csv").write_bytes(
        b"file_name,label\ncats/0.png,tabby\ndogs/1.png,\n"
    )
    assert [e.category for e in Folder(str(tmp_path / "set")).listing().entries] == ["tabby", None]


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    found = listing(
        as_folder(
            tmp_path,
            {"0.png": image(), "metadata.csv": b"file_name,caption,width,score\n0.png,x,1,2\n"},
        )
    )
    assert "metadata.csv: columns that are not used: width, score" in found.remarks


def test_a_split_column_holds_out(tmp_path: Path) -> None:
    rows = b"file_name,split\n0.png,train\n1.png,test\n2.png,validation\n"
    found = listing(
        as_folder(tmp_path, {f"{i}.png": image(i) for i in range(3)} | {"metadata.csv": rows})
    )
    assert [e.holdout for e in found.entries] == [None, "test", "validation"]


@pytest.mark.parametrize(
    ("encoding", "texts"),
    [
        ("gbk", ["一只红色的猫坐在桌子上", "白色背景上的蓝色圆形", "两个人在公园里散步"]),
        ("big5", ["一隻紅色的貓坐在桌子上", "白色背景上的藍色圓形", "兩個人在公園裡散步"]),
        (
            "shift_jis",
            ["赤い猫がテーブルの上に座っている", "白い背景に青い丸", "公園を歩く二人の人"],
        ),
        (
            "euc_kr",
            ["빨간 고양이가 탁자 위에 앉아 있다", "흰 배경의 파란 원", "공원을 걷는 두 사람"],
        ),
        (
            "cp1251",
            [
                "красный кот сидит на столе",
                "синий круг на белом фоне",
                "два человека гуляют в парке",
            ],
        ),
        (
            "cp1252",
            ["un chat à côté d'une fenêtre", "une forêt enneigée près de l'étang", "naïve café"],
        ),
        (
            "cp1250",
            ["czerwony kot przy żółtej ścianie", "niebieskie koło na białym tle", "źdźbło trawy"],
        ),
        ("utf-16-le", ["一只红色的猫坐在桌子上", "a red cat", "两个人"]),
        ("utf-16-be", ["a red cat", "a blue dog", "x"]),
        ("utf-16", ["一只红色的猫", "a red cat", "x"]),
        ("utf-8-sig", ["一只红色的猫", "a red cat", "x"]),
    ],
)
def test_captions_in_any_usual_encoding_are_read_and_the_guess_is_said(
    encoding: str, texts: list[str], tmp_path: Path
) -> None:
    files = {f"{i}.txt": text.encode(encoding) for i, text in enumerate([*texts, "plain ASCII"])}
    found = listing(as_folder(tmp_path, files | {f"{i}.png": image(i) for i in range(4)}))
    assert [entry.captions for entry in found.entries] == [
        (text,) for text in [*texts, "plain ASCII"]
    ] or encoding.startswith("utf-16-")
    assert [entry.captions[0] for entry in found.entries[:3]] == texts
    assert any("guess" in remark for remark in found.remarks) == (
        encoding not in ("utf-16", "utf-8-sig")
    )


def test_one_encoding_is_chosen_for_all_texts_of_a_set() -> None:
    texts = Texts()
    for number, text in enumerate(["白色背景上的蓝色圆形", "红", "一只红色的猫坐在桌子上"]):
        texts.add(str(number), text.encode("gbk"))
    texts.add("unicode", "naïve".encode())
    texts.settle()
    # by itself, that one letter could be anything
    assert [texts["1"], texts["unicode"]] == ["红", "naïve"]
    assert texts.note.startswith("3 of 4 texts are not Unicode and were read as gb18030")


@pytest.mark.parametrize("links", [["cats", "dogs"], ["cats", "dogs", "birds"]])
def test_categories_that_are_links_to_folders_are_read(links: list[str], tmp_path: Path) -> None:
    store = as_folder(
        tmp_path,
        {
            f"{c}/{i}.png": image(3 * k + i)
            for k, c in enumerate(("birds", "cats", "dogs"))
            for i in range(3)
        },
    )
    (tmp_path / "linked").mkdir()
    for name in ("birds", "cats", "dogs"):
        if name in links:
            (tmp_path / "linked" / name).symlink_to(store / name, target_is_directory=True)
        else:
            os.rename(store / name, tmp_path / "linked" / name)
    found = listing(tmp_path / "linked")
    assert {(e.name, e.category) for e in found.entries} == {
        (f"{c}/{i}.png", c) for c in ("birds", "cats", "dogs") for i in range(3)
    }


def test_names_that_folders_allow_do_not_lose_their_captions(tmp_path: Path) -> None:
    found = listing(
        as_folder(
            tmp_path,
            {
                "12:30:00.png": image(0),
                "12:30:00.txt": b"noon",
                "~cat.png": image(1),
                "~cat.txt": b"a cat",
            },
        )
    )
    assert [entry.captions for entry in found.entries] == [("noon",), ("a cat",)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            {
                "train_images": 6,
                "train_labels": 6,
                "val_images": 2,
                "val_labels": 2,
                "test_images": 3,
            },
            {None: 6, "val": 2, "test": 3},
        ),
        ({"x_train": 5, "y_train": 5, "x_test": 2, "y_test": 2}, {None: 5, "test": 2}),
        ({"images": 4, "labels": 4, "weights": 4}, {None: 4}),
        ({"images_train": 4, "labels_train": 4, "images_test": 2}, {None: 4, "test": 2}),
    ],
)
def test_arrays_are_found_by_the_names_that_people_give_them(
    names: dict[str, int], expected: dict, tmp_path: Path
) -> None:
    arrays = {
        n: noise(8, 8 * k).reshape(k, 8, 8, 3)
        if "label" not in n and n[0] != "y"
        else np.arange(k)[:, None]
        for n, k in names.items()
    }
    np.savez(tmp_path / "a.npz", **arrays)
    found = listing(tmp_path / "a.npz")
    assert {
        h: sum(e.holdout == h for e in found.entries) for h in {e.holdout for e in found.entries}
    } == expected
    assert [e.category for e in found.entries[:2]] == ["0", "1"]
    assert {r.name for r in found.rejects} == set(names) & {"weights"}


def test_tables_and_shards_called_like_splits_are_held_out(tmp_path: Path) -> None:
    names = [
        "train-00000-of-00001.parquet",
        "test-00000-of-00001.parquet",
        "data/val/0.tar",
        "other.tar",
    ]
    assert held_out_files(names) == {names[1]: "test", names[2]: "val"}
    assert held_out_files(names[1:3]) == {}
    for name in ("train", "test"):
        as_tar(tmp_path, {f"{name}{i}.png": image(ord(name[1]) + i) for i in range(2)}).rename(
            tmp_path / f"{name}-000.tar"
        )
    found = listing(tmp_path)
    assert [e.holdout for e in found.entries] == ["test", "test", None, None]


@pytest.mark.parametrize(
    "name",
    [
        "Train",
        "training_set",
        "train2017",
        "TRAIN_images",
        "train_pictures",
        "train-00000-of-00010",
        "trainset",
        "tr",
    ],
)
def test_training_folders_by_any_usual_name(name: str) -> None:
    assert split_of(name) == TRAIN


@pytest.mark.parametrize(
    "name",
    [
        "Test",
        "test_set",
        "val2017",
        "testing",
        "VALIDATION",
        "valid",
        "dev",
        "test-images",
        "Test Pictures",
        "hold-out",
    ],
)
def test_held_out_folders_by_any_usual_name(name: str) -> None:
    assert split_of(name) == HELD_OUT


@pytest.mark.parametrize(
    "name",
    [
        "trains",
        "device",
        "valley",
        "testament",
        "trainer",
        "cats",
        "",
        "train" * 20,
        "te" + "1" * 60,
    ],
)
def test_other_folders_are_not_splits(name: str) -> None:
    assert split_of(name) is None


@pytest.mark.parametrize(
    ("names", "categories"),
    [
        (["car/0", "train/1", "plane/2"], ["car", "train", "plane"]),  # a train among vehicles
        (["00000/0", "01000/1"], [None, None]),  # parts, as FFHQ has them
        (["0", "sub/1"], [None, None]),  # one folder does not make a category
        (["a/b/0", "a/c/1", "logo"], ["b", "c", None]),
        (["train/images/0", "val/images/1"], [None, None]),
    ],
)
def test_folders_are_read_as_a_person_would(names: list[str], categories: list[str | None]) -> None:
    layout = FolderLayout.of(names)
    assert [layout.place(name).category for name in names] == categories


def test_the_account_names_what_decoding_refused_and_balances(tmp_path: Path) -> None:
    place = as_folder(
        tmp_path,
        {f"{i}.png": image(i) for i in range(4)} | {"bad.png": b"not an image", "notes.docx": b"x"},
    )
    ledger = index(DataConfig(source=source_at(str(place)), resolution=8, cache="off")).ledger
    assert ledger.balanced
    assert ledger.used == 4
    assert ledger.line().startswith("6 files: 4 images used, 2 left out (")
    assert json.dumps(ledger.plain())


def test_everything_that_decoding_notes_is_said_in_words() -> None:
    """ "20 values outside range" were 20 images."""
    source = "".join(
        path.read_text() for path in (Path(sfumato.__file__).parent / "data").rglob("*.py")
    )
    noted = set(re.findall(r'notes\.append\("(\w+)"\)', source))
    assert len(noted) > 8
    assert noted <= set(NOTES)
    assert (
        describe_note("upscaled", ["a.png"])
        == "smaller than the training resolution, and upscaled: 1 image, e.g. a.png"
    )
    assert describe_note("upscaled", ["a.png", "b.png"]).endswith(": 2 images, e.g. a.png")
