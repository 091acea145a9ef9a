"""Single files of Stable Diffusion's layout, converted to folders in diffusers' layout.

The folder is kept in the cache, so that nothing else needs to know of single files. Configurations
and tokenizers come from another folder of the same family, and so do the parts that the file lacks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.condition import ContextSizes
from sfumato.diffusers_library import import_diffusers, quiet
from sfumato.errors import CheckpointError, ConfigError
from sfumato.foreign_models import CONFIG, PIPELINE, is_pipeline_folder
from sfumato.interop.base_folder import TEXT_WEIGHTS, BaseFolder, file_digest
from sfumato.interop.diffusers_folder import SCHEDULER, read_json
from sfumato.interop.ldm_names import UNET, Row, clip_names, unet_rows, vae_rows
from sfumato.interop.single_file_layout import (
    PIPELINES,
    SUFFIX,
    VELOCITY,
    ZERO_SNR,
    FileFacts,
    facts_of_names,
    scheduler_of,
    text_prefixes,
    text_rows,
)
from sfumato.networks.diffusers_models import DiffusersConfig, require_family
from sfumato.networks.diffusers_weights import WEIGHTS
from sfumato.storage.atomic import atomic_folder
from sfumato.storage.cache_folder import cache_folder

NOTES = "single_file.json"  # in a converted folder
AVERAGES = "model_ema."
SCALES = ("scale_weight", "weight_scale")  # of float8 weights; two spellings are in use
# buffers that are recomputed, and marks
IGNORED = re.compile(
    rf"{VELOCITY}|{ZERO_SNR}|.*position_ids|.*logit_scale|.*attn_mask|scaled_fp8|.*\.scaled_fp8|"
    r"(log_|sqrt_)?(one_minus_)?(recip_)?(recipm1_)?(alphas|betas)\w*|\w*alphas_cumprod\w*|"
    r"posterior_\w+|logvar|denoiser\.\w+|model_ema\.(decay|num_updates)|global_step"
)
LORA = re.compile(r".*(lora_|\.lora\.|hada_|lokr_|\.alpha$).*")


@dataclass(frozen=True)
class ConvertedFile:
    """A single file as a folder in diffusers' layout.

    Attributes:
        folder: in the cache.
        notes: lines that say what was taken from where, and what was left out.
    """

    folder: Path
    notes: tuple[str, ...]


def read_single_file(path: Path, like: Path) -> ConvertedFile:
    """Convert a single file to a folder in the cache, or find it there.

    Args:
        path: a .safetensors file.
        like: a pipeline's folder of the same family: its configurations and tokenizers are used,
            and the parts that the file does not have.
    Raises:
        CheckpointError: if the file is none of these, damaged, or does not fit the family.
        ConfigError: if `like` is not a folder of such a family.
    """
    require_readable(path)
    if not is_pipeline_folder(like):
        raise ConfigError(
            f"has no {PIPELINE}",
            where=str(like),
            hint="name a pipeline's folder of the same family as the file, with its "
            "configurations and tokenizers",
        )
    target = cache_folder() / "single_files" / _key(path, like)
    if not (target / NOTES).is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_folder(target, replaces=False) as folder:
                notes = convert(path, like, folder)
                plain = {"file": path.name, "notes": notes}
                (folder / NOTES).write_text(json.dumps(plain, indent=1))
        except OSError:
            if not (target / NOTES).is_file():  # another process was first
                raise
    return ConvertedFile(target, tuple(read_json(target / NOTES)["notes"]))


def _key(path: Path, like: Path) -> str:
    """Return a hash of the file, and of the names, sizes and times of the folder's files."""
    parts = [file_digest(path)]
    for file in sorted(like.rglob("*")):
        if file.is_file():
            state = file.stat()
            name = file.relative_to(like).as_posix()
            parts.append(f"{name} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def require_readable(path: Path) -> None:
    """Raise CheckpointError, saying what it is, unless a path is a whole .safetensors file."""
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", where=str(path), hint="check the path"
        ) from None
    download = "download the file itself, e.g. with the hub's download button"
    if head.startswith(b"version https://git-lfs"):
        what, hint = "is a pointer of git-lfs, not the file", f"run git lfs pull, or {download}"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        what, hint = "is a web page, not the file", f"{download} (log in if it asks for that)"
    elif head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        what = "is a pickle of PyTorch, which can run code when it is read"
        hint = "get the .safetensors version of the model"
    elif path.suffix != SUFFIX:
        what = f"is not a {SUFFIX} file"
        hint = "get the .safetensors version of the model"
    else:
        try:
            with safe_open(path, "pt"):
                return
        except (SafetensorError, OSError) as error:
            what, hint = f"is damaged or cut off ({error})", "download it again"
    raise CheckpointError(what, where=str(path), hint=hint)


def convert(path: Path, like: Path, folder: Path) -> list[str]:
    """Write the parts of a single file as a folder in diffusers' layout, which exists and is empty.

    Returns:
        Lines that say what was taken from where, and what was left out.
    Raises:
        CheckpointError: if the file does not fit the family of `like`.
        ConfigError: if `like` is of another family than these files have.
    """
    base = BaseFolder.read(like)
    _require_family(base)
    tensors = _scaled(load_file(path))
    facts = facts_of_names(set(tensors))
    _require_network(tensors, path)
    used: set[str] = set()
    notes: list[str] = []
    for part, name in (("unet", f"{WEIGHTS}{SUFFIX}"), ("vae", f"{WEIGHTS}{SUFFIX}")):
        rows, shapes = _network_rows(base) if part == "unet" else _vae_rows(base)
        notes += _write_part(_Part(part, name, rows, shapes), tensors, base, folder, used, path)
    for part, prefix in text_prefixes(base):
        settings = read_json(like / part / CONFIG)
        names = clip_names(settings, projection=base.part_class(part).endswith("WithProjection"))
        rows = text_rows(names, prefix)
        notes += _write_part(_Part(part, TEXT_WEIGHTS, rows, {}), tensors, base, folder, used, path)
    for part in base.text_parts:
        if part.startswith("tokenizer"):
            base.copy_part(part, folder / part)
    notes += _write_descriptions(base, facts, folder)
    return notes + _unused(tensors, used)


def _require_family(base: BaseFolder) -> None:
    kind = base.index.get("_class_name")
    if kind not in PIPELINES:
        raise ConfigError(
            f"single files are read like Stable Diffusion 1, 2 and XL, and this is a {kind}",
            where=str(base.path),
            hint=f"name a folder of one of {', '.join(PIPELINES)}",
        )


def _require_network(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError, saying what it is, unless a file has a network."""
    if any(name.startswith(UNET) for name in tensors):
        return
    if sum(bool(LORA.fullmatch(name)) for name in tensors) > len(tensors) / 2:
        what, hint = "is a LoRA, not a whole model", "use it with --lora, on its base model"
    elif len(tensors) <= 4:
        what, hint = "holds only a few tensors, such as an embedding", "name a whole model"
    else:
        examples = ", ".join(sorted(tensors)[:2])
        what = f"has no tensor of a network ({UNET}...), but e.g. {examples}"
        hint = "only files of Stable Diffusion 1, 2 and XL can be read"
    raise CheckpointError(what, where=str(path), hint=hint)


def _scaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply float8 weights by their scales, and return all others as they are."""
    for name in list(tensors):
        stem, _, last = name.rpartition(".")
        weight = tensors.get(f"{stem}.weight")
        if last in SCALES and weight is not None:
            scale = tensors.pop(name).float().flatten()
            if len(scale) not in (1, len(weight)):
                raise CheckpointError(
                    f"{len(scale)} scales for {len(weight)} rows",
                    where=name,
                    hint="get a version of the model without scaled float8",
                )
            tensors[f"{stem}.weight"] = weight.float() * scale.view(-1, *[1] * (weight.ndim - 1))
    return {
        name: tensor.half() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _network_rows(base: BaseFolder) -> tuple[list[Row], dict[str, torch.Size]]:
    """Return the rows and shapes of the network that the folder's configuration describes."""
    settings = read_json(base.path / "unet" / CONFIG)
    architecture = str(settings.get("_class_name"))
    sizes: ContextSizes = require_family(architecture).context_sizes(settings)
    config = DiffusersConfig(
        architecture=architecture,
        settings={key: value for key, value in settings.items() if not key.startswith("_")},
    )
    with torch.device("meta"):
        network = config.build(image_channels=settings["in_channels"], context=sizes)
    shapes = {
        name.removeprefix("model."): tensor.shape for name, tensor in network.state_dict().items()
    }
    return unet_rows(shapes, settings), shapes


def _vae_rows(base: BaseFolder) -> tuple[list[Row], dict[str, torch.Size]]:
    """Return the rows and shapes of the autoencoder that the folder's configuration describes."""
    settings = read_json(base.path / "vae" / CONFIG)
    if settings.get("_class_name") != "AutoencoderKL":
        raise ConfigError(
            f"the autoencoder is of class {settings.get('_class_name')}",
            where=str(base.path),
            hint="single files have an AutoencoderKL: name a folder that has one too",
        )
    diffusers = import_diffusers("a single file", where="like")
    with torch.device("meta"), quiet():
        vae = diffusers.AutoencoderKL.from_config(settings)
    shapes = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    return vae_rows(shapes, settings), shapes


@dataclass(frozen=True)
class _Part:
    """A part of a pipeline, and the rows of its tensors."""

    name: str
    file: str
    rows: list[Row]
    shapes: Mapping[str, torch.Size]


def _write_part(
    part: _Part,
    tensors: Mapping[str, Tensor],
    base: BaseFolder,
    folder: Path,
    used: set[str],
    path: Path,
) -> list[str]:
    """Write a part from the file, or copy it from the base if the file has nothing of it."""
    missing = [row.file for row in part.rows if row.file not in tensors]
    if len(missing) == len(part.rows):
        base.copy_part(part.name, folder / part.name)
        return [f"{part.name}: not in the file, taken from {base.path.name}"]
    if missing:
        raise CheckpointError(
            f"{part.name}: {len(missing)} of {len(part.rows)} tensors are missing, e.g. "
            f"{missing[0]}",
            where=str(path),
            hint=f"the file is not of the family of {base.path}, or it is incomplete",
        )
    target: dict[str, Tensor] = {}
    for row in part.rows:
        for name, tensor in row.split(tensors[row.file]).items():
            shape = part.shapes.get(name, tensor.shape)
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{row.file} has shape {tuple(tensor.shape)}, and {base.path.name} has "
                    f"{tuple(shape)}",
                    where=str(path),
                    hint="name a folder of the same family with --like (inpainting and editing "
                    "models, whose first layer is wider, are not supported)",
                )
            target[name] = tensor
    used.update(row.file for row in part.rows)
    place = folder / part.name
    place.mkdir()
    save_file(target, place / part.file, metadata={"format": "pt"})
    (place / CONFIG).write_text(json.dumps(read_json(base.path / part.name / CONFIG), indent=2))
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in target.values())
    return [f"{part.name}: from the file ({', '.join(sorted(dtypes))})"]


def _write_descriptions(base: BaseFolder, facts: FileFacts, folder: Path) -> list[str]:
    """Write the index and the scheduler, which the file may overrule."""
    scheduler, lines = scheduler_of(facts, read_json(base.path / SCHEDULER))
    (folder / SCHEDULER).parent.mkdir()
    (folder / SCHEDULER).write_text(json.dumps(scheduler, indent=2))
    kept = ("unet", "vae", "scheduler", *base.text_parts)
    index = {
        name: value if not isinstance(value, list) or name in kept else [None, None]
        for name, value in base.index.items()
    }
    (folder / PIPELINE).write_text(json.dumps(index, indent=2))
    return lines


def _unused(tensors: Iterable[str], used: set[str]) -> list[str]:
    """Return lines that say which tensors of the file were not used."""
    left = [name for name in tensors if name not in used and not IGNORED.fullmatch(name)]
    averages = [name for name in left if name.startswith(AVERAGES)]
    others = [name for name in left if not name.startswith(AVERAGES)]
    lines = []
    if averages:
        lines.append(
            f"the {len(averages)} averaged weights in the file ({AVERAGES}*) are not used: the "
            "weights beside them are, as in other programs"
        )
    if others:
        prefixes = Counter(".".join(name.split(".")[:2]) for name in others)
        named = ", ".join(f"{count} of {prefix}.*" for prefix, count in prefixes.most_common(4))
        lines.append(f"{len(others)} tensors of the file are not used: {named}")
    return lines
