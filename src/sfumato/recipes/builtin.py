"""The built-in recipes, each a function that returns a Run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sfumato.autoencoders import KLConfig
from sfumato.conditioners import (
    CategoryConfig,
    DoodleConfig,
    Holes,
    ImageConfig,
    LearnedTextConfig,
    PointsConfig,
    ReferenceConfig,
    SplatConfig,
)
from sfumato.contexts import ContextConfig
from sfumato.data import DataConfig, Digits, Emoji, Solids
from sfumato.diffusion import Epsilon, LinearBetas, Objective, UniformEpsilon, UnitVariance
from sfumato.generation.diffusion_model import DenoiserConfig, SamplingConfig
from sfumato.networks import UNetConfig
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.recipes.early_checks import unknown
from sfumato.recipes.run import Run
from sfumato.sampling import DDIM
from sfumato.training import (
    Budget,
    CheckpointConfig,
    FixedEMA,
    MuonConfig,
    OptimizerConfig,
    PowerEMA,
    PreviewConfig,
    ValidationConfig,
)


def digits() -> Run:
    """Handwritten digits, 8 x 8, steered by category: one minute on two cores."""
    return Run(
        name="digits",
        data=DataConfig(source=Digits(), resolution=8, channels=1, holdout=0.15),
        network=UNetConfig(
            channels=32, multipliers=(1, 2), blocks=1, attention_depths=(1,), head_channels=32
        ),
        conditioner=ContextConfig(category=CategoryConfig(size=64)),
        denoiser=DenoiserConfig(input_scale=UnitVariance(0.75)),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        batch_size=64,
        budget=Budget(minutes=1),
        validation=ValidationConfig(every_steps=400),
        preview=PreviewConfig(every_steps=200, num=40),
        checkpoint=CheckpointConfig(every_steps=400),
        sampling=SamplingConfig(guidance=1.3, steps=20),
    )


def ddpm() -> Run:
    """Textbook diffusion model on digits of 8 x 8: 1,000 linear betas, noise prediction,
    clipped: three minutes on two cores.

    In a YAML file `recipe: ddpm` trains any other data the same way; set data.source,
    data.resolution and data.channels.

    Source: Ho et al. 2020 (arXiv:2006.11239). Times are continuous here, so training also sees
        levels between two of the 1,000.
    """
    betas = LinearBetas(beta_start=1e-4, beta_end=0.02, steps=1000)
    return Run(
        name="ddpm",
        data=digits().data,
        network=digits().network,
        # 1: x enters the network as it is
        denoiser=DenoiserConfig(parameterization=Epsilon(), input_scale=UnitVariance(1.0)),
        objective=Objective(schedule=betas, weighting=UniformEpsilon()),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        ema=FixedEMA(0.9999),
        batch_size=64,
        budget=Budget(minutes=3),
        preview=PreviewConfig(every_steps=2000),  # each takes 1,000 steps
        sampling=SamplingConfig(sampler=DDIM(eta=1.0), schedule=betas, steps=1000, clip=True),
    )


def emoji() -> Run:
    """OpenMoji's images at 32 x 32, steered by fifteen categories; combinations of profession and
    skin tone held out: 45 minutes.
    """
    return Run(
        name="emoji",
        data=DataConfig(source=Emoji(size=64), resolution=32),
        network=UNetConfig(
            channels=32, multipliers=(1, 2, 4), blocks=1, attention_depths=(2,), dropout=0.1
        ),
        conditioner=ContextConfig(category=CategoryConfig()),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=100, muon=MuonConfig()),
        ema=PowerEMA(0.1),
        batch_size=64,
        budget=Budget(minutes=45),
        sampling=SamplingConfig(guidance=1.5),
    )


def emoji_text() -> Run:
    """OpenMoji's images at 32 x 32, steered by their names, which a small transformer learns to
    read: 45 minutes on two cores.
    """
    return replace(
        emoji(),
        name="emoji-text",
        network=UNetConfig(
            channels=32, multipliers=(1, 2, 4, 8), blocks=1, attention_depths=(2, 3)
        ),
        conditioner=ContextConfig(text=LearnedTextConfig(length=16)),
        sampling=SamplingConfig(guidance=2.0),
    )


def emoji_doodle() -> Run:
    """OpenMoji's images at 32 x 32 from their line drawings: 10 minutes on two cores."""
    doodle = ContextConfig(doodle=DoodleConfig(synthetic=0.3))
    return replace(emoji_text(), name="emoji-doodle", conditioner=doodle, budget=Budget(minutes=10))


def emoji_inpaint() -> Run:
    """OpenMoji's images at 32 x 32 with holes in them, filled; by name, if one is given: 10 minutes
    on two cores.
    """
    both = ContextConfig(
        text=LearnedTextConfig(length=16, dropout=0.3), image=ImageConfig(degradation=Holes())
    )
    return replace(emoji_text(), name="emoji-inpaint", conditioner=both, budget=Budget(minutes=10))


def emoji_points() -> Run:
    """OpenMoji's images at 32 x 32 from points along their outlines: 10 minutes on two cores."""
    points = ContextConfig(points=PointsConfig(splat=SplatConfig()))
    return replace(emoji_text(), name="emoji-points", conditioner=points, budget=Budget(minutes=10))


def emoji_everything() -> Run:
    """OpenMoji's images at 32 x 32 by name, category, doodle, points and reference, alone and
    together: 45 minutes on two cores.
    """
    # The more a context tells, the more often it is hidden: with all shown at once, nothing would
    # be learnt from names.
    every = ContextConfig(
        category=CategoryConfig(dropout=0.6),
        text=LearnedTextConfig(length=16, dropout=0.2),
        reference=ReferenceConfig(dropout=0.75),
        doodle=DoodleConfig(synthetic=0.3, dropout=0.65),
        points=PointsConfig(splat=SplatConfig(), dropout=0.65),
    )
    return replace(emoji_text(), name="emoji-everything", conditioner=every)


def emoji_latent() -> Run:
    """OpenMoji's images at 64 x 64, steered by category, in latents of an autoencoder trained
    first: 10 + 20 minutes.
    """
    return replace(
        emoji(),
        name="emoji-latent",
        data=DataConfig(source=Emoji(size=64), resolution=64),
        autoencoder=TrainedAutoencoder(
            network=KLConfig(channels=(16, 32, 64, 128), latent_channels=16, blocks=1, groups=4)
        ),
        network=UNetConfig(channels=64, multipliers=(1, 2), attention_depths=(0, 1), dropout=0.1),
        denoiser=DenoiserConfig(input_scale=UnitVariance(1.0)),
        budget=Budget(minutes=20),
    )


def solids_points() -> Run:
    """Shaded solids at 32 x 32 from 3-D points on their surface, with their names: 10 minutes on
    two cores.

    Some pairs of shape and colour are held out.
    """
    return replace(
        emoji_text(),
        name="solids-points",
        data=DataConfig(source=Solids(), resolution=32),
        conditioner=ContextConfig(
            text=LearnedTextConfig(length=8, dropout=0.3), points=PointsConfig(splat=SplatConfig())
        ),
        budget=Budget(minutes=10),
    )


RECIPES: dict[str, Callable[[], Run]] = {
    "digits": digits,
    "ddpm": ddpm,
    "emoji": emoji,
    "emoji-text": emoji_text,
    "emoji-doodle": emoji_doodle,
    "emoji-inpaint": emoji_inpaint,
    "emoji-points": emoji_points,
    "emoji-everything": emoji_everything,
    "emoji-latent": emoji_latent,
    "solids-points": solids_points,
}


def recipe(name: str) -> Run:
    """Return the built-in recipe of a name.

    Raises:
        ConfigError: if there is none; it suggests the nearest name.
    """
    if name in RECIPES:
        return RECIPES[name]()
    raise unknown(name)
