"""The package diffusers (extra `diffusers`), imported when it is needed, and without its notices."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sfumato.errors import ConfigError


def import_diffusers(what: str, *, where: str, extras: str = "diffusers") -> Any:
    """Import diffusers.

    Args:
        what: the part of the configuration that needs it.
        where: where that is set.
        extras: of sfumato, that install what is missing.
    Raises:
        ConfigError: if it is not installed.
    """
    with quiet():
        try:
            diffusers = importlib.import_module("diffusers")
        except ImportError:
            raise ConfigError(
                f"{what} needs diffusers", where=where, hint=f"pip install 'sfumato[{extras}]'"
            ) from None
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        if importlib.util.find_spec("transformers") is not None:
            settings = importlib.import_module("transformers.utils.logging")
            settings.set_verbosity_error()
            settings.disable_progress_bar()
    return diffusers


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the notices that diffusers and what it imports print about optional packages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
