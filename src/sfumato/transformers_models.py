"""Models of the package transformers (extra `text`), from a folder or a hub: safetensors only, and
none of their code is run.
"""

from __future__ import annotations

import importlib
from typing import Any

from sfumato.errors import ConfigError


def from_transformers(
    kind: str, place: str, *, where: str, revision: str | None = None, **settings: Any
) -> Any:
    """Load a class of `transformers` by its name, from a folder or by the model's name on a hub.

    Raises:
        ConfigError: if the package is not installed, or nothing can be loaded.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            "needs the package transformers", where=where, hint="pip install 'sfumato[text]'"
        ) from None
    try:
        return getattr(transformers, kind).from_pretrained(
            place, revision=revision or "main", trust_remote_code=False, **settings
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"cannot be loaded: {' '.join(str(error).split())[:300]}",
            where=f"{where} = {place}",
            hint="name a folder with config.json, model.safetensors and, for texts, a tokenizer, "
            "or a model on a hub that can be reached",
        ) from None
