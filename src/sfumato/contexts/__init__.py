"""Contexts: each way to steer a model is one object in one file, from its configuration to its
metrics.
"""

from sfumato.contexts.category import Category, trained_categories
from sfumato.contexts.config import ContextConfig, register, unregister
from sfumato.contexts.protocol import Context, Measured, Metric, RequestInfo
from sfumato.contexts.registry import CONTEXTS, by_keyword, part_of, steering, values_in_turn
from sfumato.contexts.text import PromptNote, Text, Truncated, Unfamiliar

__all__ = [
    "CONTEXTS",
    "Category",
    "Context",
    "ContextConfig",
    "Measured",
    "Metric",
    "PromptNote",
    "RequestInfo",
    "Text",
    "Truncated",
    "Unfamiliar",
    "by_keyword",
    "part_of",
    "register",
    "steering",
    "trained_categories",
    "unregister",
    "values_in_turn",
]  # fmt: skip
