"""Encoding ahead of training, by what is pretrained and frozen: images by the autoencoder, captions by
the text encoder.
"""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import ConfigError
from sfumato.recipes.model import text_encoder
from sfumato.recipes.run import Run
from sfumato.runs.preparation import conditioning_info, open_data
from sfumato.runs.text_encoders import encode_share, texts_of
from sfumato.training.precision import default_device


def encode_part(
    run: Run, number: int, count: int, *, directory: str | Path | None = None
) -> tuple[int, int]:
    """Encode one of `count` parts of a run's images and captions into the cache, once all images are
    decoded.

    Nothing depends on how they were divided. Captions of prior images are left to the run.

    Args:
        number: of the part, from 1.
        directory: as of `open_data`.
    Returns:
        how many batches of images and how many texts it has.
    Raises:
        ConfigError: if the run trains its own autoencoder, or nothing would be kept.
    """
    if run.data.cache == "off":
        raise ConfigError(
            "nothing that is encoded would be kept", where="data.cache", hint="set data.cache=auto"
        )
    dataset = open_data(run, directory=directory)
    share = slice(number - 1, None, count)
    batches = run.autoencoder.encode_part(dataset, share)
    info = conditioning_info(run, dataset)
    texts = texts_of(run, info, dataset)
    if not texts:
        return batches, 0
    conditioner = run.conditioner.build(info, encoder=text_encoder).to(default_device())
    return batches, encode_share(conditioner, texts, share)
