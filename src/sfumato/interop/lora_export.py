"""The LoRA of a run, written for other programs, and read back by their rule before it counts.

The readers' rule, of ComfyUI and the web interfaces: a layer's change is up @ down, times alpha /
rank where there is an alpha tensor. It is written here a second time, apart from the reader of
`lora_files`, so that a mistake in one shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sfumato.adapters import PeftAdapter, bare, without_added
from sfumato.errors import CheckpointError, ConfigError
from sfumato.interop.lora_conversion import as_products, ranks_in_words
from sfumato.interop.lora_files import DIFFUSERS_FILE, Changes
from sfumato.interop.lora_names import LayerNames, is_sdxl
from sfumato.interop.lora_scales import NETWORKS
from sfumato.interop.lora_writing import SUFFIXES, write_diffusers, write_kohya, write_peft
from sfumato.interop.opening import clip_skip_of
from sfumato.interop.peft_export import write_kind
from sfumato.interop.schedulers import PREDICTIONS
from sfumato.interop.trained_model import TrainedModel
from sfumato.storage.checkpoint import digest

MODELSPEC = "1.0.1"
# architectures as ModelSpec names them; for U-Nets, by the channels of the text
TRANSFORMERS = {"SD3Transformer2DModel": "stable-diffusion-3", "FluxTransformer2DModel": "flux-1"}
UNETS = {
    768: "stable-diffusion-v1",
    1024: "stable-diffusion-v2",
    2048: "stable-diffusion-xl-v1-base",
}
KOHYA_BASES = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
}
PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}  # ModelSpec has no others
STABILITY_CODE = "https://github.com/Stability-AI/generative-models"
LOSSLESS = torch.float32

Files = Mapping[Path, Mapping[tuple[str, str], str]]  # names in each file, by part and layer


@dataclass(frozen=True)
class RunLoRA:
    """What a run's LoRA changes, and the texts that describe it.

    Attributes:
        changes: with the scale multiplied in.
        names: of the layers of its base.
        header: texts that every format has in its header.
        base: name of the base model.
        architecture: as ModelSpec names it.
        notes: what other programs will not get.
    """

    changes: Changes
    names: LayerNames
    header: dict[str, str]
    base: str
    architecture: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, trained: TrainedModel) -> RunLoRA:
        """Collect the adapted layers of a run.

        Raises:
            ConfigError: if there are none.
        """
        model = trained.pipeline.model
        adapted = model.network.implementation
        converted = as_products(adapted, trained.run.adapter.described)
        if not converted.layers:
            raise ConfigError(
                "has no LoRA: all weights of the network were trained",
                where=str(trained.directory),
                hint="export the whole model, or train with adapter.kind=lora",
            )
        network = bare(adapted)
        texts = model.conditioner.trained_text_encoders()
        names = LayerNames(network, lambda: texts)
        architecture = _architecture(network, names)
        changes = {names.network: converted.layers} | {
            part: as_products(encoder, "").layers for part, encoder in texts.items()
        }
        return cls(
            changes=changes,
            names=names,
            header=_header(trained, architecture, changes),
            base=_base_name(trained),
            architecture=architecture,
            notes=(*converted.lines, *_notes(trained)),
        )


def lora_diffusers(trained: TrainedModel, path: Path, dtype: torch.dtype) -> list[str]:
    """Write the LoRA for diffusers' `load_lora_weights`: a folder, or a file if `path` ends so."""
    lora = RunLoRA.of(trained)
    file = path if path.suffix == ".safetensors" else path / DIFFUSERS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    header = _described(lora, "diffusers")
    names = write_diffusers(file, lora.changes, lora.names, dtype=dtype, header=header)
    return _report(lora, {file: names}, "diffusers", dtype)


def lora_kohya(trained: TrainedModel, path: Path, dtype: torch.dtype) -> list[str]:
    """Write the LoRA as a file of kohya's sd-scripts, for ComfyUI and the web interfaces.

    Our own U-Net is called lora_unet and our DiT lora_transformer, with their own layers' names.
    """
    lora = RunLoRA.of(trained)
    if lora.names.network == "transformer":
        unread = "note: diffusers does not read transformers in kohya's form; ComfyUI does"
        lora = replace(lora, notes=(*lora.notes, unread))
    ranks = _ranks(lora.changes)
    header = _described(lora, STABILITY_CODE) | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks[-1]),
        "ss_network_alpha": str(ranks[-1]),
        "ss_base_model_version": KOHYA_BASES.get(lora.architecture, lora.architecture),
        "ss_sd_model_name": lora.base,
        "ss_output_name": trained.run.name,
        "ss_steps": str(trained.step),
        # as sd-scripts counts
        **({"ss_clip_skip": str(count + 1)} if (count := clip_skip_of(trained.run)) else {}),
    }
    names = write_kohya(path, lora.changes, lora.names, dtype=dtype, header=header)
    return _report(lora, {path: names}, "kohya", dtype)


def lora_peft(trained: TrainedModel, path: Path, dtype: torch.dtype) -> list[str]:
    """Write what was learned as a folder for peft's `PeftModel.from_pretrained(network, folder)`.

    OFT, LoKr and DoRA are written as what they are.
    """
    if isinstance(trained.run.adapter, PeftAdapter):
        network = trained.pipeline.model.network.implementation
        names = LayerNames(bare(network))
        lines = write_kind(
            path,
            network,
            trained.run.adapter,
            names.shapes(names.network),
            dtype=dtype,
            header=_origin(trained),
            base=_base_name(trained),
        )
        return [*lines, *_notes(trained)]
    lora = RunLoRA.of(trained)
    header = _described(lora, "diffusers")
    files = write_peft(path, lora.changes, lora.names, dtype=dtype, header=header, base=lora.base)
    lines = _report(lora, files, "diffusers", dtype)
    if len(files) > 1:
        lines.append(f"a folder for each part: {', '.join(lora.changes)}")
    return lines


def _base_name(trained: TrainedModel) -> str:
    origin = trained.run.network.origin
    return Path(origin).resolve().parent.name if origin else trained.run.name


def _notes(trained: TrainedModel) -> list[str]:
    """Return what other programs will not get."""
    conditioner = trained.pipeline.model.conditioner
    encoders = conditioner.trained_text_encoders().values()
    in_file = {id(p) for encoder in encoders for p in encoder.parameters()}
    parameters = sum(p.numel() for p in conditioner.parameters() if id(p) not in in_file)
    note = f"note: the {parameters} parameters of the conditioner are not part of a LoRA file"
    return [note] if parameters else []


def _architecture(network: torch.nn.Module, names: LayerNames) -> str:
    """Return ModelSpec's name of an architecture; one of ours, or a tiny one, has its class's."""
    name = type(network).__name__
    if name != "UNet2DConditionModel":
        return TRANSFORMERS.get(name, name)
    shapes = names.shapes(names.network)
    if is_sdxl(shapes):
        return UNETS[2048]
    widths = {shape[1] for layer, shape in shapes.items() if layer.endswith("attn2.to_k")}
    return UNETS.get(max(widths, default=0), UNETS[768])


def _header(trained: TrainedModel, architecture: str, changes: Changes) -> dict[str, str]:
    size = f"{trained.pipeline.image_shape[2]}x{trained.pipeline.image_shape[1]}"
    predicted = [
        ("modelspec.prediction_type", name)
        for key, name in PREDICTION_TYPES.items()
        if PREDICTIONS[key] == trained.run.denoiser.parameterization
    ]
    return {
        **dict(predicted),
        **_origin(trained),
        "modelspec.sai_model_spec": MODELSPEC,
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.title": trained.run.name,
        "modelspec.resolution": size,
        "sfumato.rank": ",".join(map(str, _ranks(changes))),
    }


def _ranks(changes: Changes) -> list[int]:
    return sorted({factors.rank for layers in changes.values() for factors in layers.values()})


def _origin(trained: TrainedModel) -> dict[str, str]:
    """Return texts that say what was trained, from what."""
    network = trained.pipeline.model.network.implementation
    return {
        "format": "pt",
        "sfumato.base": _base_name(trained),
        "sfumato.base_sha256": digest(without_added(network.state_dict(), network)),
        "sfumato.step": str(trained.step),
        "sfumato.trained": trained.run.adapter.described,
    }


def _described(lora: RunLoRA, implementation: str) -> dict[str, str]:
    return lora.header | {"modelspec.implementation": implementation}


def change_by_readers_rule(path: Path, form: str) -> dict[str, Tensor]:
    """Return the change of each layer in a file, as programs without a configuration compute it.

    Args:
        form: "diffusers" or "kohya", how names end.
    Raises:
        CheckpointError: if a tensor belongs to no layer.
    """
    tensors = load_file(path)
    down_end, up_end = (f".{suffix}.weight" for suffix in SUFFIXES[form])
    found, used = {}, set()
    for key in tensors:
        if not key.endswith(down_end):
            continue
        layer = key.removesuffix(down_end)
        down, up = tensors[key].float(), tensors[layer + up_end].float()
        change = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
        if f"{layer}.alpha" in tensors:
            change = change * (tensors[f"{layer}.alpha"].item() / len(down))
        found[layer] = change
        used |= {key, layer + up_end, f"{layer}.alpha"}
    if left := tensors.keys() - used:
        raise CheckpointError(f"{sorted(left)[0]} belongs to no layer", where=str(path))
    return found


def _report(lora: RunLoRA, files: Files, form: str, dtype: torch.dtype) -> list[str]:
    """Read the files back, compare them with the run, and say how they differ.

    Raises:
        CheckpointError: if layers are missing, or differ by more than the precision explains.
    """
    largest, worst, place, count = 0.0, 0.0, "", 0
    for file, names in files.items():
        read = change_by_readers_rule(file, form)
        count += len(read)
        for (part, layer), name in names.items():
            own = lora.changes[part][layer].delta()
            if name not in read:
                raise CheckpointError(f"{name} is missing in what was written", where=str(file))
            difference = read[name] - own
            largest = max(largest, float(difference.abs().max()))
            lost = float(difference.norm() / own.norm().clamp(min=torch.finfo(torch.float32).tiny))
            if lost >= worst:
                worst, place = lost, layer
    written = sum(map(len, files.values()))
    if count != written or (dtype == LOSSLESS and largest > 0):
        raise CheckpointError(
            f"what was written is not what the run has: {count} of {written} layers, largest "
            f"difference of a weight's change {largest:g}, in {place}",
            where=str(next(iter(files))),
            hint="report this with the run's config.yaml",
        )
    ranks = ranks_in_words(_ranks(lora.changes))
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    precision = str(dtype).removeprefix("torch.")
    texts = sum(len(layers) for part, layers in lora.changes.items() if part not in NETWORKS)
    named = f"{count} layers" + (f" ({texts} of them of text encoders)" if texts else "")
    lines = [
        f"LoRA of rank {ranks} on {named} of {lora.base}, {precision}, "
        f"{megabytes:.1f} MB, alpha = rank",
        f"read back by the readers' rule (alpha / rank): {count} of {written} layers, largest "
        f"difference of a weight's change {largest:g}",
    ]
    if dtype != LOSSLESS:
        lines.append(
            f"rounding to {precision} loses up to {worst:.2%} of a layer's change (in {place})"
        )
    return [*lines, *lora.notes]
