"""Options of one call of `Pipeline.sample`, and the defaults of the model where they are not set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato import config as configuration
from sfumato.diffusion import GuidanceRescale, MatchDeviation
from sfumato.errors import ConfigError
from sfumato.generation.diffusion_model import Model, SamplingConfig
from sfumato.sampling import SamplerConfig, chosen_sampler, sampler_name


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions:
    """What a call of `Pipeline.sample` uses; see `SamplingOptions`."""

    steps: int
    sampler: SamplerConfig
    guidance: float | Mapping[str, float]
    interval: tuple[float, float]
    clip: bool
    guidance_rescale: GuidanceRescale | None = None

    def settings(self) -> dict[str, Any]:
        """Return steps, sampler, guidance and clip as plain data, for records.

        What is done to guided predictions comes with them, if anything is.
        """
        rescale = self.guidance_rescale
        named = None if rescale is None else configuration.kind_of(type(rescale))
        rule = {} if rescale is None else {"kind": named, **configuration.plain(rescale)}
        return {
            "steps": self.steps,
            "sampler": sampler_name(self.sampler),
            "guidance": self.guidance,
            "clip": self.clip,
            **({"guidance_rescale": rule} if rule else {}),
        }


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of one call; None takes the model's default.

    Attributes:
        steps: denoising steps.
        sampler: a sampler, or its name in `sfumato.sampling.SAMPLERS`.
        guidance: one scale for all contexts, or one for each by name.
        interval: log-SNR from where to where guidance acts.
        clip: whether each guess of the clean image is clamped to [-1, 1].
        autoguidance: an earlier snapshot of the same run, and the scale at which images are led
            away from its predictions.
        resample: how many times each step is taken (RePaint).
        guidance_rescale: what is done to guided predictions; a number phi is
            `MatchDeviation(share=phi)`, as in diffusers, and 0 leaves them as they are.
    """

    steps: int | None = None
    sampler: str | SamplerConfig | None = None
    guidance: float | Mapping[str, float] | None = None
    interval: tuple[float, float] | None = None
    clip: bool | None = None
    autoguidance: tuple[Model, float] | None = None
    resample: int = 1
    guidance_rescale: float | GuidanceRescale | None = None

    def resolve(self, defaults: SamplingConfig, *, inpainting: bool) -> ResolvedOptions:
        """Fill in the defaults of the model.

        Args:
            inpainting: whether a part of each image is kept, which decides the default sampler.
        Raises:
            ConfigError: for an unknown sampler, or a rescaling beyond 0 to 1.
        """
        return ResolvedOptions(
            steps=defaults.steps if self.steps is None else self.steps,
            sampler=chosen_sampler(
                self.sampler, defaults.sampler, inpainting=inpainting, resample=self.resample
            ),
            guidance=defaults.guidance if self.guidance is None else self.guidance,
            interval=defaults.interval if self.interval is None else self.interval,
            clip=defaults.clip if self.clip is None else self.clip,
            guidance_rescale=defaults.guidance_rescale
            if self.guidance_rescale is None
            else _rescale(self.guidance_rescale),
        )


def _rescale(value: float | GuidanceRescale) -> GuidanceRescale | None:
    if isinstance(value, GuidanceRescale):
        return value
    if value == 0:
        return None
    if not 0 <= value <= 1:
        raise ConfigError(
            f"guidance_rescale = {value:g}", where="sample", hint="use 0 (nothing) to 1"
        )
    return MatchDeviation(share=value)
