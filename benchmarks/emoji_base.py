"""A small text-to-image model in Stable Diffusion's layout, from scratch: OpenMoji's images without
food and two professions, which it can be fine-tuned on.

    python benchmarks/emoji_base.py FOLDER [--size tiny|small|full]
    sfumato finetune FOLDER/model FOLDER/left-out/astronaut.tar
    sfumato sample FOLDER/model --prompt "tiger" --guidance 3

Five stages, of which a finished one is not repeated: images; an autoencoder, as
`autoencoder.kind=trained` trains it; CLIP's text encoder and tokenizer, by contrast with the images'
latents; a UNet2DConditionModel, by `sfumato train`; and its export, FOLDER/model, which
`StableDiffusionPipeline` opens. The two long ones, autoencoder and U-Net, go on where they were
interrupted.

`full` is for a GPU: 64 px, latents of 16 x 16, a U-Net of 17 million parameters. `small` is for one
core and an hour: 32 px, latents of 8 x 8, 4 million parameters, eleven of the fifteen categories,
one skin tone outside of the professions. `tiny` is for tests. Needs the extras `emoji`, `diffusers`
and `text`.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from clip_text import train_text_encoder, train_tokenizer
from torch import Tensor

import sfumato
from sfumato.autoencoders import KLConfig
from sfumato.autoencoders import io as autoencoders
from sfumato.data import DataConfig, Dataset, index, source_at, to_float
from sfumato.data.sources import emoji
from sfumato.interop.diffusers_folder import read_folder
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder, trained_folder
from sfumato.storage.atomic import atomic_file, atomic_folder
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import (
    Budget,
    LossesConfig,
    MuonConfig,
    OptimizerConfig,
    PowerEMA,
    PreviewConfig,
    ValidationConfig,
)

# groups by their images' last caption, the name after the category
LEFT_OUT = {
    "food": r"food: .*",
    "astronaut": r"professions: ((wo)?man )?astronaut\b.*",
    "cook": r"professions: ((wo)?man )?cook\b.*",
}
FEW = 10  # images of each group that was left out, to fine-tune on
# Stable Diffusion's betas, rescaled to end in noise alone, since these images are mostly white
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": False,
}  # fmt: skip

Images = list[tuple[str, list[str], str]]  # key, captions and category


@dataclass(frozen=True)
class Size:
    """How large the model is, and how long each part is trained.

    Attributes:
        resolution: side of the images in pixels.
        without: categories that are left out.
        tones: whether all skin tones are kept, or those of professions alone.
        every: one image of so many is taken.
        autoencoder: its shape.
        perceptual: weight of its perceptual loss.
        encoder: hidden size, layers and words of the text encoder.
        unet: channels at each depth, and layers at each.
        steps: of the text encoder, in batches of 128.
        batch_size: of the U-Net.
        previews: images that are drawn during training.
        budgets: of the autoencoder and of the U-Net.
    """

    resolution: int
    without: tuple[str, ...]
    tones: bool
    every: int
    autoencoder: KLConfig
    perceptual: float
    encoder: tuple[int, int, int]
    unet: tuple[tuple[int, ...], int]
    steps: int
    batch_size: int
    previews: int
    budgets: tuple[Budget, Budget]


SIZES = {
    "tiny": Size(
        16, (), False, 60, KLConfig(channels=(8, 16), latent_channels=4, blocks=1, groups=2), 0.0,
        (16, 1, 300), ((16, 16), 1), 2, 8, 1, (Budget(steps=2), Budget(steps=2)),
    ),
    "small": Size(
        32, ("families", "flags", "symbols"), False, 1,
        KLConfig(channels=(16, 32, 64), latent_channels=8, blocks=1, groups=4), 0.0,
        (128, 2, 2000), ((64, 128), 1), 400, 64, 16, (Budget(steps=800), Budget(steps=900)),
    ),
    "full": Size(
        64, (), True, 1,
        KLConfig(channels=(64, 128, 256), latent_channels=4, blocks=2, groups=8), 0.1,
        (256, 4, 2000), ((128, 256), 1), 6000, 256, 64, (Budget(steps=20_000), Budget(steps=60_000)),
    ),
}  # fmt: skip


def main() -> None:
    """Build what is missing of a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where all of it is written to")
    parser.add_argument("--size", choices=SIZES, default="small")
    arguments = parser.parse_args()
    build(arguments.folder, SIZES[arguments.size])


def build(folder: Path, size: Size) -> Path:
    """Build what is missing of a model; return its folder."""
    data = write_images(folder, size)
    dataset = index(data)
    model, parts, run = folder / "model", folder / "parts", folder / "run"
    if not trained_folder(folder).is_dir():
        stage = TrainedAutoencoder(
            network=size.autoencoder,
            losses=LossesConfig(perceptual=size.perceptual),
            budget=size.budgets[0],
            preview=PreviewConfig(num=size.previews),
            validation=ValidationConfig(samples=16 * size.previews),
        )
        stage.prepare(dataset, RunDirectory(folder, root=folder), pixels=False)
    if not parts.is_dir():
        with atomic_folder(parts) as temporary:
            write_parts(temporary, dataset, trained_folder(folder), size)
    if (run / "config.yaml").is_file():
        sfumato.resume(run)
    else:
        sfumato.train(training_run(parts, data, size), run=run)
    if not model.is_dir():
        sfumato.export(run, "diffusers", model)
        with (model / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n{emoji.ATTRIBUTION}\n")
    return model


def write_images(folder: Path, size: Size) -> DataConfig:
    """Render the images into archives: those to train on, and ten of each group that is left out."""
    kept: Images = []
    groups: dict[str, Images] = {name: [] for name in LEFT_OUT}
    for key, captions, category in emoji.named_images():
        toned = "skin tone" in captions[0] and category != "professions"
        if category in size.without or (toned and not size.tones):
            continue
        image = (key, [*captions, f"{category}: {captions[0]}"], category)
        group = next((name for name, of in LEFT_OUT.items() if re.fullmatch(of, image[1][-1])), "")
        (groups[group] if group else kept).append(image)
    spread = {name: group[:: max(1, len(group) // FEW)][:FEW] for name, group in groups.items()}
    archives = {f"left-out/{name}.tar": images for name, images in spread.items()}
    archives["images.tar"] = kept[:: size.every]
    (folder / "left-out").mkdir(parents=True, exist_ok=True)
    for name, images in archives.items():
        if not (folder / name).is_file():
            with atomic_file(folder / name) as file:
                emoji.write(file, images, max(32, size.resolution))
    source = source_at(str((folder / "images.tar").resolve()))
    return DataConfig(source=source, resolution=size.resolution, holdout=0.05)


def write_parts(folder: Path, dataset: Dataset, autoencoder: Path, size: Size) -> None:
    """Write a pipeline whose U-Net is untrained and whose other parts are finished."""
    import diffusers

    (widths, blocks), (width, layers, words) = size.unet, size.encoder
    captions = [dataset.entries[i].captions for i in dataset.training]
    tokenizer = train_tokenizer(chain.from_iterable(captions), folder / "tokenizer", words=words)
    encoder = train_text_encoder(
        captions, encode(dataset, autoencoder), tokenizer,
        width=width, layers=layers, steps=size.steps,
    )  # fmt: skip
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=size.resolution // size.autoencoder.factor,
        in_channels=size.autoencoder.latent_channels, out_channels=size.autoencoder.latent_channels,
        block_out_channels=widths, layers_per_block=blocks,
        down_block_types=["CrossAttnDownBlock2D"] * len(widths),
        up_block_types=["CrossAttnUpBlock2D"] * len(widths),
        cross_attention_dim=width, attention_head_dim=max(1, widths[0] // 32),
        norm_num_groups=8,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(autoencoder),
        unet=unet, text_encoder=encoder, tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    (folder / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n", encoding="utf-8")


@torch.no_grad()
def encode(dataset: Dataset, autoencoder: Path) -> Tensor:
    """Return the latents of all training images, (N, C, h, w)."""
    codec = autoencoders.load(autoencoder)
    parts = [
        to_float(dataset.images(few).pixels) for few in torch.tensor(dataset.training).split(64)
    ]
    return torch.cat([codec.encode(part) for part in parts])


def training_run(parts: Path, data: DataConfig, size: Size) -> sfumato.Run:
    """Return the run that trains the U-Net of a pipeline from random weights."""
    run = read_folder(parts.resolve()).run
    return replace(
        run.from_scratch(),
        name="emoji-base",
        data=data,
        # constant, so that a training which is interrupted or prolonged is worth as much
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=100, schedule="constant", muon=MuonConfig()
        ),
        ema=PowerEMA(0.1),
        batch_size=size.batch_size,
        budget=size.budgets[1],
        preview=PreviewConfig(num=size.previews),
        validation=ValidationConfig(samples=16 * size.previews),
        # a divisor of 1,000: diffusers rounds other timesteps
        sampling=replace(run.sampling, guidance=3.0, steps=25),
    )


if __name__ == "__main__":
    main()
