"""One image made here and one by diffusers from the exported folder, from the same noise."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.config import kind_of
from sfumato.diffusers_library import import_diffusers, quiet
from sfumato.errors import SfumatoError
from sfumato.foreign_models import PIPELINE
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.diffusers_export import write_diffusers
from sfumato.interop.diffusers_folder import SCHEDULER, read_json
from sfumato.interop.opening import COMPARED_STEPS
from sfumato.interop.scheduler_writer import write_scheduler
from sfumato.interop.schedulers import REPLACED
from sfumato.interop.trained_model import TrainedModel
from sfumato.networks.diffusers_backbone import pack
from sfumato.networks.diffusers_models import DiffusersConfig
from sfumato.platform import total_memory
from sfumato.sampling import DDIM, KeyedNoise
from sfumato.training.parameters import count

# of the network in float32, that are in memory together: ours, the merged one, that of diffusers,
# and about as much for the other parts
COPIES = 5
MERGED = ("none", "lora")  # kinds of adapters whose changes are in the network's own weights


@dataclass(frozen=True, kw_only=True)
class Call:
    """How the call of a class of pipelines is told what ours is told.

    Attributes:
        scale: the argument for the guidance scale, and offset: what is added to it.
        packed: whether its latents are tokens of 2 x 2 cells.
        arguments: further ones.
    """

    scale: str = "guidance_scale"
    offset: float = 0.0
    packed: bool = False
    arguments: tuple[tuple[str, Any], ...] = ()


AS_IT_IS = (("use_resolution_binning", False), ("clean_caption", False))
CALLS = {
    "StableDiffusionPipeline": Call(),
    "StableDiffusionXLPipeline": Call(),
    "StableDiffusion3Pipeline": Call(),
    "PixArtSigmaPipeline": Call(arguments=AS_IT_IS),
    "SanaPipeline": Call(arguments=AS_IT_IS),
    "Lumina2Pipeline": Call(),
    "ZImagePipeline": Call(offset=-1.0),
    "FluxPipeline": Call(scale="true_cfg_scale", packed=True, arguments=(("negative_prompt", ""),)),
    "QwenImagePipeline": Call(
        scale="true_cfg_scale", packed=True, arguments=(("negative_prompt", " "),)
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Parity:
    """The comparison.

    Attributes:
        difference: largest one between the two images, of 0 to 1; None if they were not made.
        note: why not; or what both were made with.
        images: ours and that of diffusers, (2, C, H, W) in [0, 1].
    """

    difference: float | None = None
    note: str = ""
    images: Tensor | None = None

    def sentence(self) -> str:
        """Return the comparison in words."""
        if self.difference is None:
            return f"not compared with diffusers: {self.note}"
        return (
            "diffusers makes the same image from the exported folder, up to "
            f"{self.difference:.1e} (of 0 to 1; {self.note})"
        )

    def plain(self) -> dict[str, Any]:
        """Return difference and note as plain data."""
        return {"difference": self.difference, "note": self.note}


def compare_with_diffusers(model: TrainedModel, prompt: str, *, folder: Path) -> Parity:
    """Export a run to a temporary folder, and let diffusers make an image from it.

    Args:
        folder: in which the temporary one is made.
    """
    reason = _obstacle(model)
    if reason:
        return Parity(note=reason)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            out = Path(place) / "exported"
            write_diffusers(model, out, torch.float32)
            return _compared(model, out, prompt)
    except (SfumatoError, OSError, RuntimeError, ValueError, TypeError) as error:
        return Parity(note=" ".join(str(error).split())[:300])


def _obstacle(model: TrainedModel) -> str:
    """Return why the images cannot be made; "" if they can."""
    run, kind = model.run, kind_of(type(model.run.adapter))
    if not isinstance(run.network, DiffusersConfig):
        return f"diffusers has no class for the network {kind_of(type(run.network))}"
    if kind not in MERGED:
        return f"what adapter.kind={kind} trains is not part of a pipeline's folder"
    if "text" not in model.pipeline.reads:
        return "only models of text are compared"
    needed = COPIES * 4 * count(model.pipeline.model.network.parameters())
    if needed > total_memory():
        return (
            f"it would take about {needed / 2**30:.0f} GiB of memory, and this machine has "
            f"{total_memory() / 2**30:.0f}"
        )
    return ""


def _compared(model: TrainedModel, folder: Path, prompt: str) -> Parity:
    name = str(read_json(folder / PIPELINE)["_class_name"])
    if name not in CALLS:
        return Parity(note=f"calls of {name} are not known")
    ours = model.pipeline
    note = f"{COMPARED_STEPS} steps"
    diffusers = import_diffusers("the comparison", where="report", extras="diffusers,text")
    with quiet():
        theirs = diffusers.DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
        scheduler = read_json(folder / SCHEDULER)
        if scheduler["_class_name"] in REPLACED:  # by a sampler that diffusers has on other levels
            ours = replace(ours, sampling=replace(ours.sampling, sampler=DDIM()))
            written = write_scheduler(model.run.denoiser, ours.sampling)
            theirs.scheduler = diffusers.DDIMScheduler.from_config(written)
            note += f", both by DDIM in the place of {scheduler['_class_name']}"
        theirs.set_progress_bar_config(disable=True)
        image = _theirs(theirs, ours, CALLS[name], prompt)
    height, width = ours.image_shape[1:]
    own = ours.sample(1, prompt=prompt, seed=0, steps=COMPARED_STEPS, size=(height, width))
    return Parity(
        difference=float((own - image).abs().max()), note=note, images=torch.cat([own, image])
    )


def _theirs(theirs: Any, ours: Pipeline, call: Call, prompt: str) -> Tensor:
    """Return what a pipeline of diffusers makes from our noise of seed 0, (1, C, H, W) in [0, 1]."""
    (height, width), space = ours.image_shape[1:], ours.autoencoder
    shape = (1, space.latent_channels, height // space.factor, width // space.factor)
    noise = KeyedNoise(0)(torch.empty(shape))
    result = theirs(
        prompt,
        latents=pack(noise) if call.packed else noise,
        num_inference_steps=COMPARED_STEPS,
        height=height,
        width=width,
        output_type="np",
        **{call.scale: ours.sampling.guidance + call.offset},
        **dict(call.arguments),
    ).images
    return torch.as_tensor(result).permute(0, 3, 1, 2)
