"""The names that a user can give, as plain text.

Importing this module does not import torch, so that a typo is reported at once. Tests hold these
tables equal to the recipes, sources and configurations that they describe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.errors import ConfigError, closest, nearest
from sfumato.foreign_models import refuse_diffusers

SUMMARIES = {
    "digits": "Handwritten digits, 8 x 8, steered by category: one minute on two cores.",
    "ddpm": (
        "Textbook diffusion model on digits of 8 x 8: 1,000 linear betas, noise "
        "prediction, clipped: "
        "three minutes on two cores."
    ),
    "emoji": (
        "OpenMoji's images at 32 x 32, steered by fifteen categories; combinations of profession "
        "and skin "
        "tone held out: 45 minutes."
    ),
    "emoji-text": (
        "OpenMoji's images at 32 x 32, steered by their names, which a small transformer learns "
        "to read: "
        "45 minutes on two cores."
    ),
    "emoji-doodle": "OpenMoji's images at 32 x 32 from their line drawings: 10 minutes on two "
    "cores.",
    "emoji-inpaint": (
        "OpenMoji's images at 32 x 32 with holes in them, filled; by name, if one is given: 10 "
        "minutes on two cores."
    ),
    "emoji-points": "OpenMoji's images at 32 x 32 from points along their outlines: 10 minutes "
    "on two cores.",
    "emoji-everything": (
        "OpenMoji's images at 32 x 32 by name, category, doodle, points and reference, alone and "
        "together: "
        "45 minutes on two cores."
    ),
    "emoji-latent": (
        "OpenMoji's images at 64 x 64, steered by category, in latents of an autoencoder trained "
        "first: 10 + 20 minutes."
    ),
    "solids-points": "Shaded solids at 32 x 32 from 3-D points on their surface, with their "
    "names: 10 minutes on two cores.",
}
BUILT_IN = ("digits", "emoji", "solids")  # sets of images
KEYS = (
    "seed",
    "batch_size",
    "micro_batch",
    "budget",
    "optimizer",
    "ema",
    "post_hoc_ema",
    "adapter",
    "preservation",
    "base",
    "precision",
    "compile",
    "log",
    "checkpoint",
    "validation",
    "preview",
    "stall_minutes",
    "stop",
    "name",
    "data",
    "autoencoder",
    "network",
    "conditioner",
    "denoiser",
    "auxiliary",
    "objective",
    "sampling",
    "sweep",
    "distributed",
)


def unknown(name: str) -> ConfigError:
    """Return the error for a name that refers to nothing, with the nearest recipe."""
    return ConfigError(
        f"{name!r} is not a recipe, YAML file or folder",
        where="train",
        hint=f"{closest(name, SUMMARIES)}`sfumato recipes` lists the built-in ones; a folder or file must exist",
    )


def require(source: str, overrides: Sequence[str] = ()) -> None:
    """Raise errors that are certain to come later, before anything heavy is imported.

    Raises:
        ConfigError: for a source that does not exist, and for an override that sets nothing or
            misspells a key.
        RunError: for a model folder of diffusers.
    """
    path = Path(source)
    refuse_diffusers(path)
    remote = "://" in source or source.startswith("hub:")
    if not (
        source in SUMMARIES
        or source in BUILT_IN
        or remote
        or path.suffix in (".yaml", ".yml")
        or path.exists()
    ):
        raise unknown(source)
    require_keys(overrides, source)


def require_keys(overrides: Sequence[str], source: str) -> None:
    """Raise ConfigError for an override that sets nothing or misspells a key."""
    for override in overrides:
        _require_key(override, source)


def _require_key(override: str, source: str) -> None:
    path, equals, _ = override.partition("=")
    key = path.partition(".")[0]
    if not path or not equals:
        raise ConfigError(
            f"{override!r} sets nothing",
            where="overrides",
            hint="write key=value, e.g. budget.minutes=5, and put a value with spaces in quotes: "
            "data.caption='a photo of sks dog'",
        )
    near = nearest(key, KEYS, cutoff=0.75)
    # what is near none of these may be near a key inside one, which the schema knows
    if key not in KEYS and near:
        raise ConfigError(
            f"unknown key `{key}` (did you mean `{near}`?)",
            where=source,
            hint="`sfumato config show RECIPE` prints every key, `config schema` their types",
        )
