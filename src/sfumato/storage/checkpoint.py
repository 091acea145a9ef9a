"""Checkpoints that are either complete or absent: written to a temporary folder, synced and renamed
into place, after which old ones are pruned.

Tensors are stored as safetensors and everything else as JSON; nothing is pickled. Implements
promises R3 to R5 of docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.storage.atomic import atomic_folder, atomic_path, write_text
from sfumato.storage.manifest import require_files, table_of_files
from sfumato.storage.untrusted import read_json, read_tensors

MANIFEST = "manifest.json"
SCHEMA = 2
NAME = re.compile(r"step-(\d{9,})")


class ForeignCheckpointError(CheckpointError):
    """An intact checkpoint that another version of sfumato wrote."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint as read back: JSON state, and tensors by file ("model", "ema", "optimizer")."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @property
    def counters(self) -> dict[str, Any]:
        """The counters of the run.

        Raises:
            CheckpointError: if there are none.
        """
        counters = self.state.get("counters")
        if not isinstance(counters, dict):
            raise CheckpointError("holds no counters", where=str(self.path / "state.json"))
        return counters

    @property
    def step(self) -> int:
        """The step at which it was saved."""
        return int(self.path.name.partition(".")[0][5:])


def save(
    root: Path,
    *,
    step: int,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    keep: int,
    sound: bool = True,
    replaces: bool = False,
) -> Path:
    """Commit a checkpoint, then prune all but the newest `keep` and the newest sound one.

    A checkpoint of this step that exists already is left as it is, unless it is to be replaced.

    Args:
        root: the folder of checkpoints.
        sound: whether the loss is in its usual range; if it is not, the weights may have diverged.
        replaces: whether one of this step is replaced, once the new one is written whole.
    Raises:
        CheckpointError: if the checkpoint could not be written; existing checkpoints are untouched.
    """
    final = root / f"step-{step:09d}"
    if final.exists() and not replaces:
        return final
    written = final.with_name(f"{final.name}.new") if final.exists() else final
    try:
        if written != final:
            shutil.rmtree(written, ignore_errors=True)  # of a process that was killed
        with atomic_folder(written, durable=True) as temporary:
            for name, group in tensors.items():
                save_file(_on_host(group), temporary / f"{name}.safetensors")
            (temporary / "state.json").write_text(
                json.dumps(_finite(dict(state)), indent=1, allow_nan=False)
            )
            files = table_of_files(temporary)
            manifest = {
                "schema": SCHEMA,
                "step": step,
                "torch": torch.__version__,
                "sound": sound,
                "files": files,
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if written != final:
            before = set_aside(final, "replaced")
            written.rename(final)
            shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not be written: {error}",
            where=str(final),
            hint="free some disk space; earlier checkpoints are intact",
        ) from None
    _point_latest(root, final.name)
    _prune(root, keep)
    return final


def _prune(root: Path, keep: int) -> None:
    """Remove all checkpoints except the newest `keep` and the newest sound one."""
    checkpoints = paths(root)
    newest_sound = next(filter(_is_sound, checkpoints), None)
    for old in checkpoints[keep:]:
        if old != newest_sound:
            shutil.rmtree(old, ignore_errors=True)


def _is_sound(path: Path) -> bool:
    """Return whether the loss was in its usual range; True if the manifest does not say."""
    try:
        return bool(read_json(path / MANIFEST).get("sound", True))
    except CheckpointError:
        return True  # `load` says what is wrong with it


def set_newer_aside(root: Path, *, step: int) -> list[Path]:
    """Rename the checkpoints after a step to `.replaced`, so that a run goes on from that step.

    Raises:
        CheckpointError: listing the steps there are, if it has no checkpoint of that step.
    """
    found = {int(path.name[5:]): path for path in paths(root)}
    if step not in found:
        raise CheckpointError(
            f"step {step} has no checkpoint",
            where=str(root),
            hint=f"there are {', '.join(map(str, sorted(found))) or 'none'}; checkpoint.keep says "
            "how many are kept",
        )
    aside = [set_aside(path, "replaced") for number, path in found.items() if number > step]
    _point_latest(root, found[step].name)
    return aside


def set_diverged_aside(root: Path) -> int | None:
    """Rename checkpoints newer than the newest sound one to `.diverged`; those of an earlier time are
    removed.

    Returns:
        the step of the newest sound checkpoint; None if there is none.
    """
    earlier = list(root.glob("step-*.diverged"))
    for path in paths(root):
        if _is_sound(path):
            _point_latest(root, path.name)
            return int(path.name[5:])
        while earlier:  # of the trouble before; the newest is enough to look at
            shutil.rmtree(earlier.pop(), ignore_errors=True)
        set_aside(path, "diverged")
    return None


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that it is never loaded."""
    aside = path.with_name(f"{path.name}.{why}")
    if aside.exists():
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.{why}")
    return path.rename(aside)


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON lacks, by words that a configuration can read."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save_snapshot(
    root: Path, *, step: int, weights: Mapping[str, Tensor], facts: Mapping[str, str] | None = None
) -> Path:
    """Keep weights alone, permanently, under `root`; `facts` are written into the file's header.

    Raises:
        CheckpointError: if the snapshot could not be written.
    """
    final = root / f"step-{step:09d}.safetensors"
    _write(final, weights, facts)
    return final


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, dtypes and shapes; "" if there are none."""
    if not tensors:
        return ""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        hashed.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        hashed.update(values.flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def storage_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many of some tensors are stored in each precision."""
    return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()))


def save_frozen(root: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a run's frozen parameters once beside its checkpoints, in a file named by their hash.

    Returns:
        the hash; "" if there are no frozen parameters.
    Raises:
        CheckpointError: if they could not be written.
    """
    name = digest(tensors)
    final = root / f"frozen-{name}.safetensors"
    if name and not final.is_file():
        _write(final, tensors)
    return name


def _write(
    final: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a file and sync it to the disk; `facts` go into its header.

    Raises:
        CheckpointError: if the file could not be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(final, durable=True) as temporary:
            save_file(_on_host(tensors), temporary, metadata=None if facts is None else dict(facts))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not be written: {error}", where=str(final), hint="free some disk space"
        ) from None


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU; any that share storage, such as tied weights, are cloned apart."""
    held: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        held[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return held


def load_frozen(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Load the frozen parameters that a checkpoint refers to; {} if it refers to none.

    Raises:
        CheckpointError: if they are missing or altered.
    """
    name = state.get("frozen", "")
    if not name:
        return {}
    file = path.parent / f"frozen-{name}.safetensors"
    try:
        tensors = read_tensors(file)
    except CheckpointError as error:
        raise CheckpointError(
            f"frozen parameters cannot be read: {error.what}", where=str(file)
        ) from None
    if digest(tensors) != name:
        raise CheckpointError(
            "frozen parameters differ from what was saved (hash)", where=str(file)
        )
    return tensors


def require_frozen(loaded: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the frozen parameters are those that a run was trained with."""
    before, now = loaded.state.get("frozen", ""), digest(tensors)
    if before == now:
        return
    then, stored = loaded.state.get("frozen_storage", {}), storage_of(tensors)
    if then and then.keys() != stored.keys():
        raise CheckpointError(
            f"the frozen parameters are stored as {_counted(stored)}, and were stored as "
            f"{_counted(then)} when this run was trained",
            where=str(loaded.path),
            hint="leave network.base_dtype as it was, or train a new run",
        )
    raise CheckpointError(
        f"the {len(tensors)} frozen parameters of the model are not those that this run was "
        f"trained with: their hash is {now[:12] or 'empty'}, and was {before[:12] or 'empty'}",
        where=str(loaded.path),
        hint="use the pretrained weights that the run began with, or train a new run",
    )


def _counted(storage: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(storage.items())) or "nothing"


def load_snapshot(root: Path, *, step: int) -> dict[str, Tensor]:
    """Load the weights of the last snapshot at or before `step`.

    Raises:
        CheckpointError: listing the steps available if there is no such snapshot, or if it cannot
            be read.
    """
    steps = sorted(
        int(path.stem[5:]) for path in root.glob("step-*.safetensors") if NAME.fullmatch(path.stem)
    )
    earlier = [snapshot for snapshot in steps if snapshot <= step]
    if not earlier:
        listed = ", ".join(map(str, steps)) or "none yet"
        raise CheckpointError(
            f"no snapshot at or before step {step}", where=str(root), hint=f"there are {listed}"
        )
    path = root / f"step-{earlier[-1]:09d}.safetensors"
    return read_tensors(path)


def paths(root: Path) -> list[Path]:
    """Return the committed checkpoints under `root`, newest first."""
    checkpoints = [
        path for path in root.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(checkpoints, key=lambda path: int(path.name[5:]), reverse=True)


def load_newest(root: Path) -> tuple[Checkpoint, list[str]]:
    """Load the newest intact checkpoint.

    Damaged ones are renamed to `.corrupt`, never deleted, and reported in the second value.

    Raises:
        CheckpointError: if there is none, or if another version wrote it. A run never silently
            starts over.
    """
    loaded, damaged = _newest_intact(root)
    warnings: list[str] = []
    for path, error in damaged:
        warnings.append(
            f"{error} -- kept as {set_aside(path, 'corrupt').name}; trying the one before"
        )
    if loaded is None:
        raise CheckpointError(
            "no usable checkpoint" + "".join(f"; {line}" for line in warnings),
            where=str(root),
            hint="start a new run with `sfumato train`; nothing is restarted silently",
        )
    return loaded, warnings


def read_newest(root: Path) -> tuple[Checkpoint, list[str]]:
    """Load the newest intact checkpoint without renaming any; damaged ones are reported.

    Meant for commands that only read a run. The reports are in the second value.

    Raises:
        CheckpointError: if there is none, or if another version wrote it.
    """
    loaded, damaged = _newest_intact(root)
    if loaded is None and not damaged:
        raise CheckpointError(
            "holds no checkpoint yet", where=str(root), hint="wait for the first one, or train"
        )
    if loaded is None:
        raise CheckpointError(
            f"none of {len(damaged)} checkpoint(s) is intact; "
            f"{'; '.join(error.args[0] for _, error in damaged)}",
            where=str(root),
            hint="copy an intact one here from a backup, or train a new run",
        )
    return loaded, [
        f"{error} -- skipped; step {loaded.path.name[5:].lstrip('0') or 0} is used"
        for _, error in damaged
    ]


def _newest_intact(root: Path) -> tuple[Checkpoint | None, list[tuple[Path, CheckpointError]]]:
    """Load the newest intact checkpoint, None if there is none; list the newer, damaged ones.

    Each of these comes with the error that it raised.
    """
    damaged: list[tuple[Path, CheckpointError]] = []
    for path in paths(root):
        try:
            return load(path), damaged
        except ForeignCheckpointError:
            raise
        except CheckpointError as error:
            damaged.append((path, error))
    return None, damaged


def load(path: Path) -> Checkpoint:
    """Load one checkpoint, checking the size and hash of every file against the manifest.

    Raises:
        CheckpointError: naming the file that is missing, truncated or altered.
        ForeignCheckpointError: if another version of sfumato wrote it.
    """
    names = require_whole(path)
    tensors = {
        Path(name).stem: read_tensors(path / name, finite=Path(name).stem != "optimizer")
        for name in names
        if name.endswith(".safetensors")
    }
    return Checkpoint(path=path, state=state_of(path), tensors=tensors)


def require_whole(path: Path) -> list[str]:
    """Return the names of a checkpoint's files, which are as its manifest says; see `load`."""
    manifest = read_json(path / MANIFEST)
    schema = manifest.get("schema")
    if schema != SCHEMA:
        raise ForeignCheckpointError(
            f"was written by another version of sfumato (schema {schema}; this one reads {SCHEMA})",
            where=str(path),
            hint="use that version; nothing was changed",
        )
    return require_files(path, manifest.get("files"))


def state_of(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint, without a look at its tensors.

    Raises:
        CheckpointError: if it cannot be read.
    """
    return read_json(path / "state.json")


def configuration_of(path: Path) -> dict[str, Any]:
    """Return the configuration that a checkpoint was written under, as plain data.

    Raises:
        CheckpointError: if it cannot be read.
    """
    config = state_of(path).get("config")
    if not isinstance(config, dict):
        raise CheckpointError("holds no configuration", where=str(path / "state.json"))
    return config


def _point_latest(root: Path, name: str) -> None:
    """Write the name of the newest checkpoint to `latest`, for people; nothing reads it back."""
    with contextlib.suppress(OSError):
        write_text(root / "latest", name + "\n")
