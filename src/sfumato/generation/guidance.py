"""Guidance of a request: its scales, the conditions that it leads away from, and the guided
denoiser.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from sfumato.conditioners import CompositeConditioner
from sfumato.diffusion import (
    ClassifierFree,
    Denoiser,
    GuidanceInterval,
    GuidanceRescale,
    GuidanceTerm,
    NetworkDenoiser,
    RescaledGuidance,
)
from sfumato.errors import ConfigError
from sfumato.generation.request import ResolvedRequest


def guidance_scales(
    guidance: float | Mapping[str, float], names: Sequence[str], default: float
) -> dict[str, float]:
    """Return the scale of each context; those that a mapping does not name get `usual`.

    Raises:
        ConfigError: for a name that is not in `names`, or a scale that is not finite.
    """
    scales = dict(guidance) if isinstance(guidance, Mapping) else dict.fromkeys(names, guidance)
    for name, scale in scales.items():
        if name not in names or not math.isfinite(scale):
            raise ConfigError(
                f"guidance {name} = {scale}",
                where="sample",
                hint=f"finite numbers for {', '.join(names) or 'nothing'}; 1 is off",
            )
    return {name: scales.get(name, default) for name in names}


def require_guided(scales: Mapping[str, float], requested: Collection[str]) -> None:
    """Raise ConfigError if no requested context is guided, so that nothing can be rescaled."""
    if all(scales[name] == 1 for name in scales if name in requested):
        raise ConfigError(
            "guidance rescale has no effect: no prediction is guided",
            where="sample",
            hint="give a guidance other than 1, and what to guide to, such as a prompt; or leave "
            "it out",
        )


def guidance_terms(
    conditioner: CompositeConditioner,
    part: ResolvedRequest,
    requested: Collection[str],
    scales: Mapping[str, float],
) -> tuple[GuidanceTerm, ...]:
    """Return the conditions that guidance leads away from, with scales; () if all scales are 1.

    Each condition holds only the contexts before its own, and negative values for the others;
    contexts that guidance does not act on are in all of them. Successive contexts with the same scale share a term.

    Raises:
        ConfigError: for a negative prompt without guidance, or the absence of a context that
            training never hid.
    """
    names = [name for name in scales if name in requested]
    if all(scales[name] == 1 for name in names):
        if part.negative:
            raise ConfigError(
                "a negative prompt has no effect at guidance 1",
                where="sample",
                hint="give a guidance above 1, such as 3",
            )
        return ()
    _require_trained_absence(conditioner, names, scales, negative=part.negative)
    count = len(part.start)
    always = {name: part.context[name] for name in conditioner.unguided if name in part.context}
    terms: list[GuidanceTerm] = []
    for number, name in enumerate(names):
        if not terms or scales[name] != scales[names[number - 1]]:
            before = names[:number]
            less = {known: part.context[known] for known in before if known in part.context}
            instead = {
                known: values for known, values in part.negative.items() if known not in before
            }
            context = always | instead | less
            terms.append(GuidanceTerm(conditioner(context, count), scales[name]))
    return tuple(terms)


def _require_trained_absence(
    conditioner: CompositeConditioner,
    names: Sequence[str],
    scales: Mapping[str, float],
    *,
    negative: Collection[str],
) -> None:
    """Raise ConfigError if guidance needs an unconditional prediction that was never trained, since
    the dropout of a context is 0.
    """
    steps = [1.0, *(scales[name] for name in names)]
    first = next(
        number
        for number, (before, after) in enumerate(itertools.pairwise(steps))
        if before != after
    )
    hidden = [name for name in names[first:] if name not in negative]
    never = [name for name in hidden if conditioner.parts[name].dropout == 0]
    if never:
        raise ConfigError(
            f"guidance needs an unconditional prediction for {' and '.join(never)}, but "
            f"{'its' if len(never) == 1 else 'their'} dropout is 0, so it was never trained",
            where="sample",
            hint="leave guidance at 1, or train with "
            f"{', '.join(f'conditioner.{name}.dropout=0.1' for name in never)}",
        )


def guided(
    plain: NetworkDenoiser,
    terms: tuple[GuidanceTerm, ...],
    interval: tuple[float, float],
    rescale: GuidanceRescale | None = None,
) -> Denoiser:
    """Return the denoiser with classifier-free guidance inside an interval (low, high) of log-SNR.

    Without terms, it is the plain denoiser.

    Args:
        rescale: what is done to guided predictions; None leaves them as they are.
    Raises:
        ConfigError: for an empty interval.
    """
    if not terms:
        return plain
    if not interval[0] < interval[1]:
        raise ConfigError(
            f"guidance from log-SNR {interval[0]} to {interval[1]}",
            where="sample",
            hint="name the lower one first",
        )
    guidance = ClassifierFree(denoiser=plain, terms=terms)
    inside: Denoiser = (
        guidance
        if rescale is None
        else RescaledGuidance(
            guidance=guidance, parameterization=plain.parameterization, rescale=rescale
        )
    )
    return GuidanceInterval(inside=inside, outside=plain, low=interval[0], high=interval[1])
