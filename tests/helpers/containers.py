"""The same few samples, packed into every container that a source reads."""

import csv
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.image_bytes import encode, noise

SIDE = 8


@dataclass(frozen=True)
class Sample:
    name: str
    category: str
    captions: tuple[str, ...]
    values: np.ndarray

    @property
    def image(self) -> bytes:
        return encode(self.values)


def sample(name: str, *captions: str, seed: int) -> Sample:
    return Sample(f"{name}.png", name.partition("/")[0], captions, noise(SIDE, SIDE, seed=seed))


SAMPLES = (
    sample("cat/a b", "a cat", seed=0),
    sample("cat/été", "ein Kätzchen, “tabby”", "a kitten\u2028on two lines, 'quoted'", seed=1),
    sample("cat/猫 🐈", "猫が寝ている 🐈", seed=2),
    sample("dog/1", seed=3),
    sample("dog/2 again", "the first cat once more", seed=0),
    sample("dog/Ω", '=1+1; <b>&amp;</b>, "x"\ty', seed=4),
)
CATEGORIES = [sample.category for sample in SAMPLES]


def put(root: Path, files: dict[str, bytes]) -> Path:
    """A folder of files."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def images(*, flat: bool = False) -> dict[str, bytes]:
    """The images by name; flat, the folders' slash is a dash."""
    return {s.name.replace("/", "-") if flat else s.name: s.image for s in SAMPLES}


def sidecars(kind: str) -> dict[str, bytes]:
    """What lies beside the images: two captions are a .txt and a .caption."""
    found = {}
    for s in SAMPLES:
        stem = s.name.removesuffix(".png")
        if kind == "json":
            found[f"{stem}.json"] = json.dumps(
                {"captions": s.captions, "category": s.category}
            ).encode()
        else:
            found |= {
                stem + suffix: text.encode()
                for suffix, text in zip((".txt", ".caption"), s.captions, strict=False)
            }
    return found


def rows() -> list[dict]:
    return [
        {"file_name": s.name, "captions": list(s.captions), "label": s.category} for s in SAMPLES
    ]


def metadata_csv() -> bytes:
    """One column has room for one caption."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file_name", "text", "label"])
    writer.writerows([s.name, s.captions[0] if s.captions else "", s.category] for s in SAMPLES)
    return text.getvalue().encode()


def metadata_jsonl() -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows()).encode()


def metadata_parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows()), buffer)
    return buffer.getvalue()


def table(path: Path, *, struct: bool = True) -> Path:
    """A parquet file as Hugging Face's, with ClassLabel; or one with plain bytes."""
    names = sorted(set(CATEGORIES))
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    column = [{"bytes": s.image, "path": s.name} if struct else s.image for s in SAMPLES]
    labels = [names.index(s.category) for s in SAMPLES]
    found = pa.table(
        {"image": column, "text": [list(s.captions) for s in SAMPLES], "label": labels}
    )
    pq.write_table(
        found.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        ),
        path,
        row_group_size=4,
    )
    return path


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def webdataset(path: Path) -> Path:
    return tar(path, dict(sorted((images() | sidecars("json")).items())))


def zipped(path: Path, files: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def edm_zip(path: Path) -> Path:
    labels = json.dumps({"labels": [[s.name, s.category] for s in SAMPLES]}).encode()
    return zipped(path, {"dataset.json": labels} | images())


def npz(path: Path, *, compressed: bool = False) -> Path:
    save = np.savez_compressed if compressed else np.savez
    save(path, images=np.stack([s.values for s in SAMPLES]), labels=np.array(CATEGORIES))
    return path


def saved(path: Path) -> Path:
    """A folder that `save_to_disk` of Hugging Face's `datasets` wrote."""
    import datasets

    names = sorted(set(CATEGORIES))
    features = datasets.Features(
        image=datasets.Image(),
        captions=datasets.List(datasets.Value("string")),
        label=datasets.ClassLabel(names=names),
    )
    columns = {
        "image": [{"bytes": s.image, "path": None} for s in SAMPLES],
        "captions": [list(s.captions) for s in SAMPLES],
        "label": [names.index(s.category) for s in SAMPLES],
    }
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(path))
    return path
