"""Errors for people to read: each says what is wrong, where, and how to fix it.

Nothing else belongs here. Every problem that the user can fix is a `SfumatoError`; the command line
prints it without a traceback and exits with the class's `exit_code`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

_PASSWORD = re.compile(r"(?<=://)[^/\s'\"]+@")  # of scheme://user:password@host
_SIGNATURE = re.compile(
    r"([?&](?:[\w.-]*(?:signature|token|key|secret|passw|credential|auth)[\w.-]*"
    r"|(?:[\w.-]*[._-])?sig)=)[^&\s'\"]+",
    re.IGNORECASE,
)  # of a signed URL


_TOKEN = re.compile(
    r"\b(hf_(?=[A-Za-z0-9]{20})|Bearer\s+)[\w.-]{8,}"
)  # of the Hugging Face hub, and of headers


def redact_secrets(text: str) -> str:
    """Replace passwords and signatures in URLs, and access tokens, by ***."""
    return _TOKEN.sub(r"\1***", _SIGNATURE.sub(r"\1***", _PASSWORD.sub("***@", text)))


def without_secrets(value: Any) -> Any:
    """Redact the secrets in all texts of plain data, at any depth."""
    if isinstance(value, str):
        return redact_secrets(value)
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return the beginning of a hint that names the nearest known name; "" if none is near."""
    near = nearest(name, known, cutoff=cutoff)
    return "" if near is None else f"did you mean {near!r}? "


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that is spelled most similarly; None if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


class SfumatoError(Exception):
    """An error with a remedy: `what` happened, `where`, and `hint`, the next thing to do."""

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        what, where = redact_secrets(what), redact_secrets(where)
        self.what, self.where, self.hint = what, where, hint
        lines = [f"{where}: {what}" if where else what]
        if hint:
            lines.append(f"  hint: {hint}")
        super().__init__("\n".join(lines))


class ConfigError(SfumatoError):
    """A key, value or recipe that the configuration does not have."""


class DataError(SfumatoError):
    """A source that cannot be read, or holds nothing to learn from."""


class ScheduleError(SfumatoError):
    """A noise level that the requested formula cannot be evaluated at."""


class ShapeError(SfumatoError):
    """A tensor whose shape does not fit the network or the request."""


class CheckpointError(SfumatoError):
    """A checkpoint that is missing, incomplete or damaged."""


class RunError(SfumatoError):
    """A run directory that cannot be created, found or locked."""


class DivergedError(SfumatoError):
    """Training that produced non-finite losses or gradients again and again."""

    exit_code = 3


class UnsavedError(SfumatoError):
    """A training whose last checkpoint could not be written."""

    exit_code = 74  # EX_IOERR of sysexits.h


class PeerError(SfumatoError):
    """Another process of the same run that has ended, or failed; it says why."""

    exit_code = 76  # EX_PROTOCOL of sysexits.h


class OutputError(SfumatoError):
    """A file or folder that cannot be written to, or that holds what must not be replaced."""


class NonFiniteError(SfumatoError, ValueError):
    """A model whose output is not finite: its weights are damaged, or it diverged."""

    exit_code = 3
