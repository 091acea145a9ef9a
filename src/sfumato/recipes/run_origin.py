"""Whether a run was made on this machine. One that was not may name models on a hub, or addresses, that
it then fetches from: only with the person's leave.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from sfumato import config as configuration
from sfumato.data import files
from sfumato.errors import ConfigError
from sfumato.recipes.paths import DATA, NAMES, path_entries
from sfumato.recipes.run import Run
from sfumato.storage.atomic import atomic_file
from sfumato.storage.cache_folder import cache_folder

SEAL = "local.json"  # in a run, beside its configuration
ALLOW = "SFUMATO_ALLOW_HUB"  # set by --allow-hub
ENCODERS = ("conditioner.text.encoder", "conditioner.text.path")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def seal(text: str) -> dict[str, str]:
    """Return what local.json says of the config.yaml of a run that this machine made."""
    return {"seal": _mac(text)}


def is_made_here(run: Path) -> bool:
    """Return whether this machine wrote a run's configuration as it is."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        text = (run / "config.yaml").read_text(encoding="utf-8")
        stated = json.loads((run / SEAL).read_text())["seal"]
        return hmac.compare_digest(str(stated), _mac(text))
    return False


def require_leave(run: Path, settings: Run, *, data: bool) -> None:
    """Raise ConfigError if a run from elsewhere names a model on a hub, or an address.

    Args:
        data: whether its images are read, too.
    """
    if os.environ.get(ALLOW) or is_made_here(run):
        return
    plain: dict[str, Any] = configuration.plain(settings)
    text = plain["conditioner"].get("text") or {}
    named = {key: holder[name] for key, holder, name in path_entries(plain)}
    named |= {f"conditioner.text.{key}": text[key] for key in ("encoder", "path") if key in text}
    named["data.source.path"] = plain["data"]["source"].get("path")
    for key, place in named.items():
        if (data or key not in DATA) and isinstance(place, str) and _is_remote(key, place):
            raise ConfigError(
                f"names {place!r}, which would be fetched from the network, and the run was not "
                "made on this machine",
                where=f"{run}: {key}",
                hint="if you trust whoever made it, add --allow-hub (or set SFUMATO_ALLOW_HUB=1 where "
                "no person is); or name a folder that is here",
            )


def require_own_mirror(run: Path, mirror: str, *, named: Collection[str]) -> None:
    """Raise ConfigError if a run from elsewhere would be copied to an address that it brought along.

    Args:
        named: addresses that the person has named.
    """
    if mirror and mirror not in named and not os.environ.get(ALLOW) and not is_made_here(run):
        raise ConfigError(
            f"copies the run to {mirror!r}, and the run was not made on this machine",
            where=f"{run}: checkpoint.mirror",
            hint="name another address, or checkpoint.mirror='' for none; if you trust whoever made "
            "it, add --allow-hub",
        )


def _is_remote(key: str, place: str) -> bool:
    """Return whether a place is fetched from the network.

    The name of an encoder is, unless it is an existing path.
    """
    if files.is_url(place) or place.startswith("hub:"):
        return True
    known = place in NAMES or place.startswith("package:") or os.path.exists(place)
    return not known and (key in ENCODERS or HUB_NAME.fullmatch(place) is not None)


def _mac(text: str) -> str:
    return hmac.new(_key(), text.encode(), hashlib.sha256).hexdigest()


def _key() -> bytes:
    """Return this machine's key, which is made when it is first needed."""
    file = cache_folder() / "machine-key"
    with suppress(OSError):
        if len(key := file.read_bytes()) == 32:
            return key
    key = secrets.token_bytes(32)
    with suppress(OSError), atomic_file(file) as opened:
        opened.write(key)
        if hasattr(os, "fchmod"):  # not on Windows
            os.fchmod(opened.fileno(), 0o600)
    return key
