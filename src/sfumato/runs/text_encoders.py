"""Text encoders while a run trains: frozen ones are needed until all texts are encoded."""

from __future__ import annotations

from functools import partial

from sfumato.conditioners import CompositeConditioner
from sfumato.conditioners.pretrained_text import TEXTS_AT_ONCE
from sfumato.contexts import CONTEXTS, Text
from sfumato.data import Dataset
from sfumato.distributed import current
from sfumato.runs.preparation import PreparedRun

MAX_TEXTS = 10_000  # that are encoded before training begins


def release_encoders(prepared: PreparedRun, conditioner: CompositeConditioner) -> str:
    """Encode all texts that training will read, and free the frozen text encoders.

    The processes share the texts. A text that was not foreseen loads the encoders again.

    Args:
        conditioner: of the model that is trained, with its adapters.
    Returns:
        A line that says so; "" if nothing was freed, which is so with very many texts.
    """
    texts = _texts(prepared)
    if not texts or len(texts) > MAX_TEXTS:
        return ""
    world, begins = current(), range(0, len(texts), TEXTS_AT_ONCE)
    for share in world.shares:
        own = [text for begin in begins[share] for text in texts[begin : begin + TEXTS_AT_ONCE]]
        world.together(partial(conditioner.encode_ahead, own))
    conditioner.encode_ahead(texts)  # nothing is left where the cache is on disk
    count = conditioner.release_encoders()
    if not count:
        return ""
    return (
        f"text encoders: {count / 1e6:.1f}M parameters freed, since all {len(texts)} texts are "
        "encoded"
    )


def _texts(prepared: PreparedRun) -> list[str]:
    """Return the different texts that training may read, sorted; [] without conditioning on text."""
    run, prior = prepared.run, prepared.prior
    if run.conditioner.text is None:
        return []
    texts = {"", *_captions(prepared.dataset), *([] if prior is None else _captions(prior))}
    if run.has_base:
        prompts = () if run.preservation is None else run.preservation.prompts
        texts |= set(CONTEXTS[Text.name].known_values(prepared.info, prepared.dataset, prompts))
    return sorted(texts)


def _captions(dataset: Dataset) -> set[str]:
    return {text for texts in dataset.captions() for text in texts}
