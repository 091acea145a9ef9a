"""The scale of each layer of a LoRA, as peft's configuration says it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError

HEADER_KEY = "lora_adapter_metadata"  # of diffusers, with the component's name before each key
NETWORKS = ("unet", "transformer")
# settings that change what the factors mean, and the values that do not
HARMLESS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
}
# initializations that change the base's weights
CHANGED_BASES = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """What scales a LoRA of peft.

    Attributes:
        rank, alpha: of the layers that no pattern names; None if they are not said.
        rank_pattern, alpha_pattern: of others, by regular expressions of their names' ends.
        use_rslora: whether alpha is divided by the root of the rank.
    """

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str) -> PeftSettings:
        """Read the values of adapter_config.json.

        Raises:
            CheckpointError: for settings that are not supported, or of the wrong type.
        """
        kind = values.get("peft_type", "LORA")
        start = values.get("init_lora_weights")
        if kind != "LORA":
            raise _refusal(f"is of the kind {kind}", where)
        if isinstance(start, str) and start.lower().startswith(CHANGED_BASES):
            raise _refusal(f"belongs to a changed base (init_lora_weights = {start!r})", where)
        for key, legal in HARMLESS.items():
            if values.get(key, legal[0]) not in legal:
                raise _refusal(f"{key} = {values[key]!r}", where)
        try:
            return cls(
                rank=None if values.get("r") is None else int(values["r"]),
                alpha=None if values.get("lora_alpha") is None else float(values["lora_alpha"]),
                rank_pattern={k: int(v) for k, v in (values.get("rank_pattern") or {}).items()},
                alpha_pattern={k: float(v) for k, v in (values.get("alpha_pattern") or {}).items()},
                use_rslora=bool(values.get("use_rslora")),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"cannot be understood: {error}", where=where, hint="download it again"
            ) from None

    def scale(self, layer: str, rank: int, *, where: str) -> float:
        """Return the scale of a layer whose factors have this rank.

        Raises:
            CheckpointError: if the configuration names another rank for it.
        """
        said = _of(self.rank_pattern, layer, self.rank, where)
        if said is not None and said != rank:
            raise CheckpointError(
                f"{layer} has rank {rank}, and the configuration says {said:g}",
                where=where,
                hint="the configuration belongs to another file",
            )
        alpha = _of(self.alpha_pattern, layer, self.alpha, where)
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _of(patterns: Mapping[str, Any], layer: str, default: Any, where: str) -> Any:
    """Return the value of the first pattern that fits, as peft finds it."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{pattern!r} is not a regular expression: {error}",
                where=where,
                hint="download it again",
            ) from None
    return default


def read_peft_config(path: Path) -> PeftSettings:
    """Read adapter_config.json.

    Raises:
        CheckpointError: if it cannot be read, or says what is not supported.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot be read: {error}", where=str(path), hint="download it again"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError("is not a JSON object", where=str(path), hint="download it again")
    return PeftSettings.parse(values, where=str(path))


def header_settings(header: Mapping[str, str], *, where: str) -> dict[str, PeftSettings]:
    """Return what the header of a file of diffusers says, by part; {} if it says nothing.

    Raises:
        CheckpointError: if it cannot be read, or says what is not supported.
    """
    try:
        values = json.loads(header.get(HEADER_KEY, "{}"))
        parts = {key.partition(".")[0] for key in values}
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{HEADER_KEY} in its header cannot be read: {error}",
            where=where,
            hint="download it again",
        ) from None
    settings = {}
    for part in parts:
        own = {
            key.removeprefix(f"{part}."): value
            for key, value in values.items()
            if key.startswith(f"{part}.")
        }
        settings[part] = PeftSettings.parse(own, where=where)
    # diffusers calls every network by its folder's name; a model has one of them
    for name in NETWORKS:
        if name in settings:
            settings |= {other: settings[name] for other in NETWORKS if other not in settings}
    return settings


def _refusal(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{what}, which is not supported",
        where=where,
        hint="only plain LoRA is read; other programs can convert it to one",
    )
