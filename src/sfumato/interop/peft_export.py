"""What a run of OFT, LoKr or DoRA has learned, as a folder of peft, opened by peft before it counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.adapters import PeftAdapter, PeftLayer, opened_by_peft, peft_layers, peft_tensors
from sfumato.errors import CheckpointError
from sfumato.interop.lora_files import PEFT_CONFIG, PEFT_FILE
from sfumato.interop.lora_writing import target_modules
from sfumato.interop.merging import round_tensor

ROUNDING = 1e-6  # relative


def write_kind(
    folder: Path,
    network: nn.Module,
    adapter: PeftAdapter,
    among: Mapping[str, object],
    *,
    dtype: torch.dtype,
    header: Mapping[str, str],
    base: str,
) -> list[str]:
    """Write a folder of `PeftModel.from_pretrained`; return lines that say what was compared.

    Args:
        network: with layers of peft.
        among: all layers of the network that could be adapted.
        base: name of the base model.
    Raises:
        ConfigError: if a value would be infinite in this precision.
        CheckpointError: if peft computes something else with the folder.
    """
    layers = peft_layers(network)
    config = adapter.config(target_modules(layers, among))
    tensors = {
        name: round_tensor(name, tensor.detach().cpu(), dtype)
        for name, tensor in peft_tensors(network, config).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / PEFT_FILE, metadata=dict(header))
    plain = config.to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    (folder / PEFT_CONFIG).write_text(
        json.dumps(plain, indent=2, sort_keys=True, default=sorted), encoding="utf-8"
    )
    return _compared(folder, network, layers, adapter.described, dtype)


def _compared(
    folder: Path,
    network: nn.Module,
    layers: Mapping[str, PeftLayer],
    described: str,
    dtype: torch.dtype,
) -> list[str]:
    """Have peft open the folder, and compare what each layer computes."""
    theirs = dict(opened_by_peft(network, folder).named_modules())
    worst, place = 0.0, ""
    for name, layer in layers.items():
        lost = _difference(theirs[name], layer)
        if lost >= worst:
            worst, place = lost, name
    if dtype is torch.float32 and worst > ROUNDING:
        raise CheckpointError(
            f"peft computes something else with what was written: {worst:.1e} of the change of the "
            f"outputs, in {place}",
            where=str(folder),
            hint="report this with the run's config.yaml",
        )
    file = folder / PEFT_FILE
    lines = [
        f"{described} on {len(layers)} layers, {str(dtype).removeprefix('torch.')}, "
        f"{file.stat().st_size / 1e6:.1f} MB",
        f"opened by peft: {len(layers)} of {len(layers)} layers, largest relative difference of a "
        f"layer's outputs {worst:g}",
    ]
    if dtype is not torch.float32:
        lines.append(f"the largest by rounding is in {place}")
    return lines


@torch.no_grad()
def _difference(theirs: Any, layer: Any) -> float:
    """Return the largest difference of outputs for a random input, relative to the largest one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_input_shape(layer.weight), generator=generator)
    own: Tensor = layer(x)
    return float((theirs(x) - own).abs().max() / own.abs().max())


def _input_shape(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of a small input of a layer."""
    _, inputs, *kernel = weight.shape
    return (2, inputs, *(side + 2 for side in kernel)) if kernel else (4, inputs)
