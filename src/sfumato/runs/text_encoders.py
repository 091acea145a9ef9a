"""Text encoders while a run trains: frozen ones are needed until all texts are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sfumato.conditioners import CompositeConditioner, ConditioningInfo
from sfumato.conditioners.pretrained_text import TEXTS_AT_ONCE
from sfumato.contexts import CONTEXTS, Text
from sfumato.data import Dataset
from sfumato.distributed import current
from sfumato.recipes.run import Run
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
    texts = texts_of(prepared.run, prepared.info, prepared.dataset, prepared.prior)
    if not texts or len(texts) > MAX_TEXTS:
        return ""
    world = current()
    for share in world.shares:
        world.together(partial(encode_share, conditioner, texts, share))
    conditioner.encode_ahead(texts)  # nothing is left where the cache is on disk
    count = conditioner.release_encoders()
    if not count:
        return ""
    return (
        f"text encoders: {count / 1e6:.1f}M parameters freed, since all {len(texts)} texts are "
        "encoded"
    )


def encode_share(conditioner: CompositeConditioner, texts: Sequence[str], share: slice) -> int:
    """Encode a share of texts, and return how many: whole chunks of what the encoder reads at once, on
    which rounding depends.
    """
    begins = range(0, len(texts), TEXTS_AT_ONCE)
    own = [text for begin in begins[share] for text in texts[begin : begin + TEXTS_AT_ONCE]]
    conditioner.encode_ahead(own)
    return len(own)


def texts_of(
    run: Run, info: ConditioningInfo, dataset: Dataset, prior: Dataset | None = None
) -> list[str]:
    """Return the different texts that training may read, sorted; [] without conditioning on text.

    Args:
        prior: images of what the base knows, if a user gives them.
    """
    if run.conditioner.text is None:
        return []
    texts = {"", *_captions(dataset), *([] if prior is None else _captions(prior))}
    if run.has_base:
        prompts = () if run.preservation is None else run.preservation.prompts
        texts |= set(CONTEXTS[Text.name].known_values(info, dataset, prompts))
    return sorted(texts)


def _captions(dataset: Dataset) -> set[str]:
    return {text for texts in dataset.captions() for text in texts}
