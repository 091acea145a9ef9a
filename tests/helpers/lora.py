"""Models with a LoRA that changes something, and what other programs read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sfumato
from sfumato.adapters import Factors, LoRA, adaptable_layers, adapted_layers
from sfumato.interop.diffusers_folder import read_folder
from sfumato.interop.trained_model import TrainedModel
from sfumato.runs.preparation import build_model


def tuned(folder: Path, **changes: Any) -> TrainedModel:
    """A folder of diffusers with a LoRA on all linear layers and convolutions; alpha / rank = 1/4."""
    content = read_folder(folder)
    adapter = LoRA(**{"rank": 4, "alpha": 1.0, "convolutions": True, **changes})
    run = replace(content.run, adapter=adapter)
    model = build_model(run, content.info).eval().requires_grad_(False)
    disturb(model)
    pipeline = replace(sfumato.load(folder), model=model)
    return TrainedModel(pipeline=pipeline, run=run, directory=folder.parent / "run", step=7)


def disturb(model: nn.Module, scale: float = 0.3) -> None:
    """Give a new LoRA something to say."""
    generator = torch.Generator().manual_seed(2)
    for layer in adapted_layers(model).values():
        layer.lora_B.data = scale * torch.randn(layer.lora_B.shape, generator=generator)


def own_changes(trained: TrainedModel) -> dict[str, Tensor]:
    """The change of each layer of a run: scale B A."""
    network = trained.pipeline.model.network.implementation
    return {
        name: layer.scale
        * (layer.lora_B.flatten(1) @ layer.lora_A.flatten(1)).view_as(layer.weight)
        for name, layer in adapted_layers(network).items()
    }


def random_changes(module: nn.Module, ranks: tuple[int, ...] = (2, 3, 5)) -> dict[str, Factors]:
    """Factors of several ranks for all layers of a module."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for number, (name, layer) in enumerate(adaptable_layers(module).items()):
        rank = ranks[number % len(ranks)]
        outputs, *inputs = layer.weight.shape
        down = torch.randn((rank, *inputs), generator=generator)
        up = torch.randn((outputs, rank, *[1] * (len(inputs) - 1)), generator=generator)
        found[name] = Factors(0.2 * down, 0.2 * up)
    return found


def change(down: Tensor, up: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


def of_peft(module: nn.Module) -> dict[str, Tensor]:
    """The change of each layer that peft has put into a module, from its factors and its scale."""
    found = {}
    for name, layer in module.named_modules():
        adapters = getattr(layer, "lora_A", None)
        if adapters is not None and len(adapters):
            key = next(iter(adapters))
            product = change(layer.lora_A[key].weight.detach(), layer.lora_B[key].weight.detach())
            found[name.removeprefix("base_model.model.")] = layer.scaling[key] * product
    return found


def by_comfyui_rule(file: Path, ends: tuple[str, str] = ("lora_A", "lora_B")) -> dict[str, Tensor]:
    """The change of each layer of a file: alpha / rank where there is an alpha, else 1."""
    tensors, found = load_file(file), {}
    for key, down in tensors.items():
        layer, found_end, _ = key.partition(f".{ends[0]}.weight")
        if found_end:
            up, alpha = tensors[f"{layer}.{ends[1]}.weight"], tensors.get(f"{layer}.alpha")
            scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
            found[layer] = scale * change(down, up)
    return found


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Over all layers; the layers must be the same."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def theirs(folder: Path) -> Any:
    """A folder's pipeline of diffusers."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
