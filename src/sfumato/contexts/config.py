"""Which contexts steer a model. The keys are those of the table of contexts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sfumato import config as configuration
from sfumato.conditioners import CompositeConditioner, Conditioner, ConditioningInfo
from sfumato.contexts.protocol import Context, Encoder
from sfumato.contexts.registry import CONTEXTS
from sfumato.data import Dataset

GENERATED = (
    "__init__",
    "__repr__",
    "__eq__",
    "__hash__",
    "__setattr__",
    "__delattr__",
    "__match_args__",
)


class ContextConfig:
    """What steers the model: for each context its configuration, or None; all None for an
    unconditional model.

    A frozen dataclass whose fields are the contexts that have a configuration: see `register`.
    """

    if TYPE_CHECKING:

        def __init__(self, **contexts: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the contexts that are configured."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)  # type: ignore[arg-type]

    @property
    def user_inputs(self) -> tuple[str, ...]:
        """Names of the configured contexts that a request may set."""
        return tuple(name for name in self.names if CONTEXTS[name].is_user_input)

    @property
    def needs_images(self) -> bool:
        """Whether something is made from the training images themselves.

        Latents alone are then not enough.
        """
        return any(CONTEXTS[name].derived_from_images for name in self.names)

    def info_fields(self, dataset: Dataset) -> dict[str, Any]:
        """Return the fields of `ConditioningInfo` that the contexts need, from the training set."""
        merged: dict[str, Any] = {}
        for name, config in self._used():
            fields = dict(CONTEXTS[name].info_fields(config, dataset))
            more = {**merged.get("more", {}), **fields.get("more", {})}
            merged |= {**fields, "more": more}
        return merged

    def build(self, info: ConditioningInfo, *, encoder: Encoder) -> CompositeConditioner:
        """Build the untrained conditioner for a training set.

        Args:
            encoder: where a pretrained text encoder comes from.
        Raises:
            ConfigError: if the set lacks what the configuration needs.
        """
        built = (
            (name, CONTEXTS[name].build(config, info, encoder)) for name, config in self._used()
        )
        parts: Mapping[str, Conditioner] = {name: part for name, part in built if part is not None}
        return CompositeConditioner(parts, factor=info.factor)

    def _used(self) -> list[tuple[str, Any]]:
        """Return name and configuration of each context that is configured or needs none.

        They are in the order of the table.
        """
        configured = {name: getattr(self, name) for name in self.names}
        return [
            (name, configured.get(name))
            for name, context in CONTEXTS.items()
            if name in configured or context.config is None
        ]


DOCUMENTATION = ContextConfig.__doc__ or ""


def register(context: Context) -> None:
    """Add your own context to the table.

    Its name becomes a key under `conditioner`, its keyword one of `Pipeline.sample`.
    """
    CONTEXTS[context.name] = context
    _declare()


def unregister(name: str) -> None:
    """Remove a context from the table."""
    del CONTEXTS[name]
    delattr(ContextConfig, name)
    _declare()


def _summary(context: Context) -> str:
    """Return the first paragraph of a context's docstring, on one line."""
    paragraph = (inspect.getdoc(type(context)) or context.name).partition("\n\n")[0]
    return " ".join(paragraph.split())


def _declare() -> None:
    """Make ContextConfig the dataclass of the present table."""
    for name in GENERATED:
        if name in ContextConfig.__dict__:
            delattr(ContextConfig, name)
    configured = {
        name: context.config for name, context in CONTEXTS.items() if context.config is not None
    }
    lines = [f"        {name}: {_summary(CONTEXTS[name])}" for name in configured]
    ContextConfig.__doc__ = "\n".join([DOCUMENTATION, "", "    Attributes:", *lines, "    "])
    ContextConfig.__annotations__ = {name: config | None for name, config in configured.items()}
    for name in configured:
        setattr(ContextConfig, name, None)
    dataclass(frozen=True, kw_only=True)(ContextConfig)
    configuration.clear_model_cache()


_declare()
