"""Combinations that the model has not seen.

Samples of their prompts are compared with the real images that were kept from training.

Three makers are compared: the model; a copyist, which returns the training image whose caption is
most like the prompt (the nearest-neighbour baseline); and the model's samples for other prompts
(shuffled). A model that only remembers does no better than the copyist; one that ignores its prompt
does no better than shuffled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sfumato.data import Dataset, to_float
from sfumato.evaluation.adherence import Figure, spread
from sfumato.generation.pipeline import Pipeline
from sfumato.observability.tables import format_table

LARGEST = 120  # held-out images that are requested
EACH = 4  # samples of each held-out prompt


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Figures of one maker on held-out combinations.

    Attributes:
        own: share of images whose nearest real image, held-out ones among them, has the caption
            that was requested.
        words: overlap (Jaccard) of that nearest image's caption with the prompt.
        distance: root mean squared distance in [-1, 1] to the real image of the prompt.
    """

    maker: str
    prompts: int
    n: int
    own: Figure
    words: Figure
    distance: Figure


def composition(
    pipeline: Pipeline,
    dataset: Dataset,
    held: NDArray[np.int64],
    *,
    seed: int = 1,
    guidance: float | None = None,
) -> list[Composition]:
    """Return figures for the held-out images at positions `held`, which must have captions.

    Of more than LARGEST images, that many are evenly chosen. The last row is of the real images.
    """
    held = spread(held, LARGEST)
    seen = dataset.with_common_shape(dataset.training)
    seen = seen[[bool(dataset.entries[i].captions) for i in seen]]
    captions = {int(i): dataset.entries[i].captions[0] for i in (*seen, *held)}
    family = _family(seen, held, captions)
    real = to_float(dataset.images(held)[0])
    gallery_positions = np.concatenate([family, held])
    gallery = to_float(dataset.images(gallery_positions)[0])
    texts = [captions[int(i)] for i in gallery_positions]
    prompts = [captions[int(i)] for i in held]
    asked = torch.arange(len(held)).repeat(EACH)
    samples = (
        pipeline.sample(
            len(asked), prompt=[prompts[i] for i in asked], seed=seed, guidance=guidance
        )
        * 2
        - 1
    )
    copies = gallery[
        torch.tensor([_most_alike(prompt, texts[: len(family)]) for prompt in prompts])
    ]
    others = (asked + len(held) // 2) % len(held)
    everyone = torch.arange(len(held))
    return [
        _figures("the model", samples, asked, prompts, real, gallery, texts),
        _figures(
            "a copyist: the training image of the nearest caption",
            copies,
            everyone,
            prompts,
            real,
            gallery,
            texts,
        ),
        _figures("the model, other prompts", samples, others, prompts, real, gallery, texts),
        _figures("the real image", real, everyone, prompts, real, gallery, texts),
    ]


def _family(
    seen: NDArray[np.int64], held: NDArray[np.int64], captions: dict[int, str]
) -> NDArray[np.int64]:
    """Return the training images that could be mistaken for the held-out ones.

    More than half of the words in their captions also appear in captions of held-out images. If
    there are none, all training images are returned.
    """
    combined = set().union(*(words(captions[int(i)]) for i in held))
    chosen = [
        i
        for i in seen
        if len(words(captions[int(i)]) & combined) * 2 > len(words(captions[int(i)]))
    ]
    return np.array(chosen or list(seen), np.int64)


def words(caption: str) -> frozenset[str]:
    """Return the different words of a caption, in lower case."""
    return frozenset(re.findall(r"\w+", caption.casefold()))


def overlap(a: str, b: str) -> float:
    """Return the number of words in both captions over that of words in either."""
    mine, theirs = words(a), words(b)
    return len(mine & theirs) / max(1, len(mine | theirs))


def _most_alike(prompt: str, texts: Sequence[str]) -> int:
    return max(range(len(texts)), key=lambda i: overlap(prompt, texts[i]))


def _figures(
    maker: str,
    images: Tensor,
    asked: Tensor,
    prompts: Sequence[str],
    real: Tensor,
    gallery: Tensor,
    texts: Sequence[str],
) -> Composition:
    half = max(1, images.shape[-1] // 2)
    small, theirs = (F.adaptive_avg_pool2d(x, half).flatten(1) for x in (images, gallery))
    nearest = torch.cdist(small, theirs).argmin(1).tolist()
    wanted = [prompts[i] for i in asked.tolist()]
    found = [texts[i] for i in nearest]
    return Composition(
        maker=maker,
        prompts=len(set(prompts)),
        n=len(images),
        own=Figure.of(
            torch.tensor([float(words(a) == words(b)) for a, b in zip(found, wanted, strict=True)])
        ),
        words=Figure.of(torch.tensor([overlap(a, b) for a, b in zip(found, wanted, strict=True)])),
        distance=Figure.of((images - real[asked]).square().flatten(1).mean(1).sqrt()),
    )


def composition_table(rows: Sequence[Composition]) -> str:
    """Format the figures as a table."""
    head = (
        "maker",
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
