"""What a file is that is called .safetensors and cannot be read as one."""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import CheckpointError

HEAD_BYTES = 64
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
# first bytes of files that are met in the place of weights: what they are, and what to do
_MET = (
    (
        (b"version https://git-lfs",),
        "is a git-LFS pointer, not the weights themselves",
        "run `git lfs pull` in the repository that it was cloned from, or download the file",
    ),
    (
        (b"<!doctype", b"<html", b"<?xml"),
        "is a web page, not weights",
        "download it again, logged in if the model asks for that",
    ),
    (
        (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "is a pickle of PyTorch under another name, which can run code",
        "download the model with its safetensors files",
    ),
)


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return the error for weights that could not be read because of `error`."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        return CheckpointError(
            "no such file",
            where=str(path),
            hint="only .safetensors are read; download the model with its safetensors files",
        )
    except OSError as reason:
        return CheckpointError(
            f"cannot be read: {reason.strerror}",
            where=str(path),
            hint="check that it is a file, and its permissions",
        )
    if not head:
        return CheckpointError("is empty", where=str(path), hint="download it again")
    for beginnings, what, hint in _MET:
        if head.lstrip().lower().startswith(tuple(mark.lower() for mark in beginnings)):
            return CheckpointError(what, where=str(path), hint=hint)
    detail = " ".join(str(error).split())[:200]
    return CheckpointError(
        f"cannot be read: it is cut or damaged ({detail})",
        where=str(path),
        hint="download it again",
    )


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for a checkpoint that is a pickle, before it is opened."""
    if path.suffix.lower() in PICKLES and not path.is_dir():
        raise CheckpointError(
            f"is a {path.suffix} file: a pickle, which can run code when it is opened",
            where=str(path),
            hint="use the model's folder with safetensors files; many are published as both",
        )
