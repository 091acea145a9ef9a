"""Safetensors files of other programs: read whole, or said what they are instead."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato.errors import CheckpointError

HEADER_LIMIT = 100 << 20  # bytes, the format's own limit
# how files begin that are no safetensors, what they are, and what to do
IMPOSTORS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "is a pointer of git-lfs, a line of text in place of the file",
        "download the file itself, e.g. with `git lfs pull`",
    ),
    (
        b"<!doctype",
        "is a web page, as downloads give that need a login or failed",
        "open the link in a browser, log in if it asks, and download the file itself",
    ),
    (
        b"<html",
        "is a web page, as downloads give that need a login or failed",
        "open the link in a browser, log in if it asks, and download the file itself",
    ),
    (
        b"pk\x03\x04",
        "is a pickle or a zip archive under another name",
        "pickles can run programs and are not read: get the file as .safetensors",
    ),
    (
        b"\x80",
        "is a pickle under another name",
        "pickles can run programs and are not read: get the file as .safetensors",
    ),
    (b"gguf", "is a GGUF file", "get the file as .safetensors"),
    (b"\x1f\x8b", "is compressed (gzip)", "unpack it first"),
)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a file, on the CPU, and the texts in its header.

    Raises:
        CheckpointError: if it is no safetensors file, saying what it is; if it is cut or damaged;
            or if a value is not finite, naming the tensor.
    """
    require_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot be read: {error}", where=str(path), hint="download it again"
        ) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"{name} has values that are not finite",
                where=str(path),
                hint="it is damaged, or its training diverged: use another file",
            )
    return tensors, header


def require_safetensors(path: Path) -> None:
    """Raise CheckpointError, saying what the file is, unless it is a whole safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            header = file.read(length) if length <= HEADER_LIMIT else b""
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", where=str(path), hint="name an existing file"
        ) from None
    begins = start.lstrip().lower()
    # the first bytes of a safetensors file are the length of its header, and may be any
    if header[:1] != b"{":
        for beginning, what, hint in IMPOSTORS:
            if begins.startswith(beginning):
                raise CheckpointError(what, where=str(path), hint=hint)
    if size < 8 or (length <= HEADER_LIMIT and len(header) < length):
        raise CheckpointError(
            f"is cut: it has {size} bytes, and its header alone has more",
            where=str(path),
            hint="download it again",
        )
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name[:2] != "__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise CheckpointError(
            "is not a safetensors file", where=str(path), hint="get the file as .safetensors"
        ) from None
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise CheckpointError(
            f"is cut: {size} of {whole} bytes are there",
            where=str(path),
            hint="download it again",
        )
