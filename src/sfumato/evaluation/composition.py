"""Composition: samples of combinations of words that training excluded, compared with real images
of these combinations.

Three methods are compared: the model; the nearest-neighbour baseline, which returns the training
image whose caption is most similar to the prompt; and the model's samples for other prompts
(shuffled). A model that memorizes is no better than the nearest-neighbour baseline; one that ignores
its prompt is no better than shuffled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sfumato.data import Dataset, to_float
from sfumato.data.choice import choose_evenly
from sfumato.evaluation.figures import Estimate
from sfumato.generation.pipeline import Pipeline
from sfumato.observability.tables import format_table

MAX_HELD_OUT = 120  # held-out images whose captions are prompts
SAMPLES_PER_PROMPT = 4


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Metrics of one method on held-out combinations.

    Attributes:
        maker: name of the method.
        prompts: number of distinct prompts.
        own: fraction of images whose nearest real image, among training and held-out images, has
            the requested caption.
        words: overlap (Jaccard index) of that nearest image's caption with the prompt.
        distance: root mean squared distance in [-1, 1] to the real image of the prompt.
    """

    maker: str
    prompts: int
    n: int
    own: Estimate
    words: Estimate
    distance: Estimate

    def plain(self) -> dict[str, Any]:
        """Return the row as plain data."""
        names = {
            "own": "nearest real image has the requested caption",
            "words": "overlap of its caption with the prompt",
            "distance": "root mean squared distance to the real image",
        }
        reference = f"real images of {self.prompts} prompts"
        figures = {key: getattr(self, key).figure(words, reference) for key, words in names.items()}
        return {
            "maker": self.maker,
            "prompts": self.prompts,
            "n": self.n,
            **{name: None if each is None else each.plain() for name, each in figures.items()},
        }


def composition(
    pipeline: Pipeline,
    dataset: Dataset,
    held_out: NDArray[np.int64],
    *,
    seed: int = 1,
    guidance: float | None = None,
) -> list[Composition]:
    """Return metrics for the held-out images at some positions, which must have captions.

    Of more than MAX_HELD_OUT images, that many are evenly chosen. The last row is of the real
    images.
    """
    held_out = choose_evenly(held_out, MAX_HELD_OUT)
    training = dataset.with_common_shape(dataset.training)
    training = training[[bool(captions) for captions in dataset.captions(training)]]
    places = [int(i) for i in (*training, *held_out)]
    captions = {i: texts[0] for i, texts in zip(places, dataset.captions(places), strict=True)}
    related = _related(training, held_out, captions)
    real = to_float(dataset.images(held_out)[0])
    gallery_positions = np.concatenate([related, held_out])
    gallery = to_float(dataset.images(gallery_positions)[0])
    texts = [captions[int(i)] for i in gallery_positions]
    prompts = [captions[int(i)] for i in held_out]
    prompt_of = torch.arange(len(held_out)).repeat(SAMPLES_PER_PROMPT)
    samples = (
        pipeline.sample(
            len(prompt_of), prompt=[prompts[i] for i in prompt_of], seed=seed, guidance=guidance
        )
        * 2
        - 1
    )
    neighbours = gallery[
        torch.tensor([_most_similar(prompt, texts[: len(related)]) for prompt in prompts])
    ]
    shuffled = (prompt_of + len(held_out) // 2) % len(held_out)
    identity = torch.arange(len(held_out))
    return [
        _metrics("the model", samples, prompt_of, prompts, real, gallery, texts),
        _metrics(
            "nearest-neighbour baseline: the training image of the nearest caption",
            neighbours,
            identity,
            prompts,
            real,
            gallery,
            texts,
        ),
        _metrics("the model, other prompts", samples, shuffled, prompts, real, gallery, texts),
        _metrics("the real image", real, identity, prompts, real, gallery, texts),
    ]


def _related(
    training: NDArray[np.int64], held_out: NDArray[np.int64], captions: dict[int, str]
) -> NDArray[np.int64]:
    """Return the training images whose captions are similar to those of the held-out images.

    More than half of the words in their captions also appear in captions of held-out images. If
    there are none, all training images are returned.
    """
    combined = set().union(*(words(captions[int(i)]) for i in held_out))
    chosen = [
        i
        for i in training
        if len(words(captions[int(i)]) & combined) * 2 > len(words(captions[int(i)]))
    ]
    return np.array(chosen or list(training), np.int64)


def words(caption: str) -> frozenset[str]:
    """Return the distinct words of a caption, in lower case."""
    return frozenset(re.findall(r"\w+", caption.casefold()))


def overlap(a: str, b: str) -> float:
    """Return the Jaccard index of the words of two captions."""
    first, second = words(a), words(b)
    return len(first & second) / max(1, len(first | second))


def _most_similar(prompt: str, texts: Sequence[str]) -> int:
    return max(range(len(texts)), key=lambda i: overlap(prompt, texts[i]))


def _metrics(
    method: str,
    images: Tensor,
    prompt_of: Tensor,
    prompts: Sequence[str],
    real: Tensor,
    gallery: Tensor,
    texts: Sequence[str],
) -> Composition:
    half = max(1, images.shape[-1] // 2)
    small, references = (F.adaptive_avg_pool2d(x, half).flatten(1) for x in (images, gallery))
    nearest = torch.cdist(small, references).argmin(1).tolist()
    requested = [prompts[i] for i in prompt_of.tolist()]
    retrieved = [texts[i] for i in nearest]
    pairs = list(zip(retrieved, requested, strict=True))
    return Composition(
        maker=method,
        prompts=len(set(prompts)),
        n=len(images),
        own=Estimate.of(torch.tensor([float(words(a) == words(b)) for a, b in pairs])),
        words=Estimate.of(torch.tensor([overlap(a, b) for a, b in pairs])),
        distance=Estimate.of((images - real[prompt_of]).square().flatten(1).mean(1).sqrt()),
    )


def composition_table(rows: Sequence[Composition]) -> str:
    """Format the metrics as a table."""
    head = (
        "method",
        "n",
        "nearest real image is the requested one",
        "overlap of its caption",
        "distance to the real image",
    )
    return format_table(
        [
            head,
            *(
                (row.maker, str(row.n), str(row.own), str(row.words), str(row.distance))
                for row in rows
            ),
        ]
    )
