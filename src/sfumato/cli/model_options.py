"""Options of models of other programs, which several commands have."""

# No future annotations: typer reads these types when the commands are built.
from pathlib import Path
from typing import Annotated

import typer

LikeOption = Annotated[
    Path | None,
    typer.Option(
        help="For a single .safetensors file: a pipeline's folder of the same family, with its "
        "configurations and tokenizers."
    ),
]
VariantOption = Annotated[
    str,
    typer.Option(
        help="Which weights of a model folder of diffusers, if it has several, e.g. fp16."
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:STRENGTH]",
        help="LoRA to add, of diffusers, kohya or peft; may be repeated.",
    ),
]
PartialOption = Annotated[
    bool, typer.Option("--partial", help="Use what fits of a LoRA, and leave out the rest.")
]
