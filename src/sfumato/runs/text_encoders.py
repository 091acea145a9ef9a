"""Text encoders while a run trains: frozen ones are needed until all texts are encoded."""

from __future__ import annotations

from sfumato.conditioners import CompositeConditioner
from sfumato.contexts import CONTEXTS, Text
from sfumato.data import Dataset
from sfumato.runs.preparation import PreparedRun

MAX_TEXTS = 10_000  # that are encoded before training begins


def release_encoders(prepared: PreparedRun, conditioner: CompositeConditioner) -> str:
    """Encode all texts that training will read, and free the frozen text encoders.

    A text that was not foreseen loads them again.

    Args:
        conditioner: of the model that is trained, with its adapters.
    Returns:
        A line that says so; "" if nothing was freed, which is so with very many texts.
    """
    texts = _texts(prepared)
    if not texts or len(texts) > MAX_TEXTS:
        return ""
    count = conditioner.release_encoders(texts)
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
