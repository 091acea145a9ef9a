"""LoRA files for other programs: diffusers, kohya's sd-scripts (also read by ComfyUI and the web
interfaces), and peft.

Alpha is multiplied into the factors, and written as the rank where a format has it, so that every
reader computes the same change: those that divide alpha by the rank, and those that do not. A file
has one spelling throughout, since some readers look at the first name only.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.adapters import Factors
from sfumato.errors import CheckpointError
from sfumato.interop.lora_files import PEFT_CONFIG, PEFT_FILE, Changes
from sfumato.interop.lora_names import (
    LayerNames,
    is_sdxl,
    underscored,
    with_text_model,
)
from sfumato.interop.lora_scales import HEADER_KEY, NETWORKS
from sfumato.interop.original_names import stability_names

SUFFIXES = {"diffusers": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}
KOHYA_PREFIXES = {"unet": "lora_unet", "transformer": "lora_transformer"}


def diffusers_names(changes: Changes) -> dict[tuple[str, str], str]:
    """Return the names of layers in a file of diffusers, by part and path.

    The part comes first; layers of CLIP have `text_model.`, with and without which diffusers reads
    them, and without which others do not.
    """
    return {
        (part, layer): f"{part}.{layer if part in NETWORKS else with_text_model(layer)}"
        for part, layers in changes.items()
        for layer in layers
    }


def kohya_names(changes: Changes, names: LayerNames) -> dict[tuple[str, str], str]:
    """Return the names of layers in a file of sd-scripts, by part and path.

    Layers of SDXL's U-Net have Stability's names, as sd-scripts trains that code; others have
    diffusers'. Transformers have the prefix lora_transformer_, by which OneTrainer writes and
    ComfyUI reads them.
    """
    network = names.shapes(names.network)
    theirs = stability_names(network) if is_sdxl(network) else {}
    several = is_sdxl(network) or "text_encoder_2" in changes
    found = {}
    for part, layers in changes.items():
        number = (part.removeprefix("text_encoder").strip("_") or "1") if several else ""
        prefix = KOHYA_PREFIXES.get(part, f"lora_te{number}")
        for layer in layers:
            name = theirs.get(layer, layer) if part in NETWORKS else with_text_model(layer)
            found[part, layer] = f"{prefix}_{underscored(name)}"
    if len(set(found.values())) < len(found):
        twice = next(name for name, count in Counter(found.values()).items() if count > 1)
        raise CheckpointError(
            f"two layers would have the name {twice}",
            where="lora-kohya",
            hint="use lora-diffusers, in which names have dots",
        )
    return found


def write_diffusers(
    path: Path,
    changes: Changes,
    layer_names: LayerNames,
    *,
    dtype: torch.dtype,
    header: Mapping[str, str],
) -> dict[tuple[str, str], str]:
    """Write a file of diffusers' `load_lora_weights`; return the names of its layers.

    Raises:
        CheckpointError: if a value would be infinite in this precision.
    """
    names = diffusers_names(changes)
    tensors: dict[str, Tensor] = {}
    for (part, layer), name in names.items():
        factors = rounded(changes[part][layer], dtype, f"{part}.{layer}")
        for suffix, factor in zip(SUFFIXES["diffusers"], (factors.down, factors.up), strict=True):
            tensors[f"{name}.{suffix}.weight"] = factor
    metadata = {
        f"{part}.{key}": value
        for part, layers in changes.items()
        for key, value in peft_settings(
            layers, layer_names.shapes(part), anchored=part in NETWORKS
        ).items()
    }
    save_file(tensors, path, metadata={**header, HEADER_KEY: json.dumps(metadata, sort_keys=True)})
    return names


def write_kohya(
    path: Path,
    changes: Changes,
    layer_names: LayerNames,
    *,
    dtype: torch.dtype,
    header: Mapping[str, str],
) -> dict[tuple[str, str], str]:
    """Write a file of sd-scripts; return the names of its layers.

    A part whose layers have several ranks gets no alpha tensors: diffusers (0.42) gives attention
    layers the alpha of others, while every reader takes a missing one for the rank.

    Raises:
        CheckpointError: if a value would be infinite in this precision, or two layers would have
            one name.
    """
    names = kohya_names(changes, layer_names)
    uniform = {
        part: len({factors.rank for factors in layers.values()}) == 1
        for part, layers in changes.items()
    }
    tensors: dict[str, Tensor] = {}
    for (part, layer), name in names.items():
        factors = rounded(changes[part][layer], dtype, f"{part}.{layer}")
        for suffix, factor in zip(SUFFIXES["kohya"], (factors.down, factors.up), strict=True):
            tensors[f"{name}.{suffix}.weight"] = factor
        if uniform[part]:
            tensors[f"{name}.alpha"] = torch.tensor(float(factors.rank))
    save_file(tensors, path, metadata=dict(header))
    return names


def write_peft(
    folder: Path,
    changes: Changes,
    layer_names: LayerNames,
    *,
    dtype: torch.dtype,
    header: Mapping[str, str],
    base: str,
) -> dict[Path, dict[tuple[str, str], str]]:
    """Write a folder of `PeftModel.from_pretrained`, or one for each part if there are several.

    Layers have the names that they have here: peft looks for no others.

    Returns:
        The names of the layers in each file.
    Raises:
        CheckpointError: if a value would be infinite in this precision.
    """
    files = {}
    for part, layers in changes.items():
        names = {(part, layer): f"base_model.model.{layer}" for layer in layers}
        place = folder / part if len(changes) > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for layer, change in layers.items():
            factors = rounded(change, dtype, f"{part}.{layer}")
            for suffix, factor in zip(
                SUFFIXES["diffusers"], (factors.down, factors.up), strict=True
            ):
                tensors[f"{names[part, layer]}.{suffix}.weight"] = factor
        save_file(tensors, place / PEFT_FILE, metadata=dict(header))
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "bias": "none",
            "inference_mode": True,
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            **peft_settings(layers, layer_names.shapes(part)),
        }
        (place / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        files[place / PEFT_FILE] = names
    return files


def peft_settings(
    layers: Mapping[str, Factors], among: Mapping[str, object], *, anchored: bool = True
) -> dict[str, object]:
    """Return rank, alpha and layers as peft's configuration says them; alpha is the rank.

    Args:
        among: all layers of the part.
        anchored: whether names are whole paths; those in a text encoder are not, since some
            versions of transformers have `text_model.` before them.
    """
    ranks = {layer: factors.rank for layer, factors in layers.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    start = "^" if anchored else ""
    others = {f"{start}{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": target_modules(layers, among),
    }


def target_modules(layers: Iterable[str], among: Iterable[str]) -> str | list[str]:
    """Return layers as peft's configuration names them.

    A list names all layers that end so; where that would be more than these, a regular expression
    names them.

    Args:
        among: all layers of the part.
    """
    named = sorted(layers)
    own = set(named)
    ends = tuple(f".{layer}" for layer in named)
    ambiguous = any(other not in own and other.endswith(ends) for other in among)
    return "|".join(map(re.escape, named)) if ambiguous else named


def rounded(factors: Factors, dtype: torch.dtype, layer: str) -> Factors:
    """Return the factors in another precision.

    Raises:
        CheckpointError: if a value is not finite, or would be infinite; naming the layer.
    """
    result = factors.map(lambda factor: factor.to(dtype).contiguous())
    for before, after in ((factors.down, result.down), (factors.up, result.up)):
        if not bool(torch.isfinite(before).all()):
            raise CheckpointError(
                "has values that are not finite",
                where=layer,
                hint="the training diverged: export an earlier checkpoint, or --weights raw",
            )
        if not bool(torch.isfinite(after).all()):
            raise CheckpointError(
                f"has values up to {float(before.abs().max()):.3g}, which are infinite in "
                f"{str(dtype).removeprefix('torch.')}",
                where=layer,
                hint="use --dtype bfloat16 or float32",
            )
    return result
