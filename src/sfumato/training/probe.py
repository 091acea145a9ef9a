"""Images that errors are measured on: at which levels, with which noises, under which contexts."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from sfumato.condition import ContextValues, reorder, select_rows
from sfumato.diffusion import Schedule
from sfumato.training.denoising_error import Triples, make_triples

MIN_DRAWS = 25  # of noise a level, over all images


class Probe(NamedTuple):
    """Images that errors are measured on.

    Attributes:
        x0: the images or their latents, (P, C, H, W).
        weights: where errors count, (P, 1, H, W); None for everywhere.
        context: what the model is told of them.
    """

    x0: Tensor
    weights: Tensor | None
    context: ContextValues

    def triples(
        self, count: int, *, schedule: Schedule, seed: int, bins: int, most: int
    ) -> TripleSet:
        """Return triples of the first images, at most `count`; few images have several a level.

        Args:
            bins: ranges of noise.
            most: triples of an image in a range.
        """
        x0, first = self.x0[:count], slice(0, count)
        draws = max(1, min(most, MIN_DRAWS + len(x0) - 1) // len(x0))
        triples = make_triples(x0, schedule, seed=seed, bins=bins, draws=draws)
        weights = None if self.weights is None else self.weights[first]
        return TripleSet(replace(triples, weights=weights), select_rows(self.context, first))


class TripleSet(NamedTuple):
    """Triples of some images, and the contexts of these."""

    triples: Triples
    context: ContextValues

    def first(self, count: int) -> TripleSet:
        """Return the triples of the first images, at most `count`; their noises stay the same."""
        whole, chosen = self.triples, slice(0, count)
        if count >= len(whole.x0):
            return self
        triples = replace(
            whole,
            x0=whole.x0[chosen],
            levels=whole.levels.at(slice(0, count * whole.bins * whole.draws)),
            weights=None if whole.weights is None else whole.weights[chosen],
        )
        return TripleSet(triples, select_rows(self.context, chosen))

    def shuffled(self, name: str) -> TripleSet:
        """Return the same with each image under one context of the next image."""
        count = len(self.triples.x0)
        following = [(i + 1) % count for i in range(count)]
        changed = reorder({name: self.context[name]}, following)
        return TripleSet(self.triples, {**self.context, **changed})
