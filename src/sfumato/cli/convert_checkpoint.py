"""The command `sfumato convert-checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_checkpoint(
    file: Annotated[
        Path, typer.Argument(help="A pickled checkpoint: .ckpt, .pt, .pth, .bin or .pkl.")
    ],
    i_trust_this_file: Annotated[
        bool,
        typer.Option(
            "--i-trust-this-file",
            help="Needed: reading a pickle can run code. It is read by another process, tensors "
            "only, which lowers the risk and does not remove it.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The new file; by default FILE with the ending .safetensors."),
    ] = None,
) -> None:
    """Write the tensors of a pickled checkpoint as safetensors, which no other command reads."""
    from sfumato import safe_unpickle
    from sfumato.errors import CheckpointError
    from sfumato.storage.output_paths import require_free

    if not i_trust_this_file:
        raise CheckpointError(
            "is a pickle: reading it can run code of whoever made it",
            where=str(file),
            hint="download the model as .safetensors; or, if you know where it comes from, add "
            "--i-trust-this-file",
        )
    target = require_free(out or file.with_suffix(".safetensors"))
    left_out = safe_unpickle.convert(file, target, sha256=None).splitlines()
    if left_out:
        named = ", ".join(left_out[:8]) + (", ..." if len(left_out) > 8 else "")
        typer.echo(f"left out because they are not tensors: {named}", err=True)
    typer.echo(target)
