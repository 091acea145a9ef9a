"""Contexts: each way to steer a model is one object in one file, from its configuration to its
metrics.
"""

from sfumato.contexts.category import Category, trained_categories
from sfumato.contexts.config import ContextConfig, register, unregister
from sfumato.contexts.protocol import Context, Metric, MetricInputs, RequestInfo
from sfumato.contexts.registry import CONTEXTS, by_keyword, enumerate_values, part_of, user_contexts
from sfumato.contexts.text import PromptNote, Text, Truncated, Unfamiliar

__all__ = [
    "CONTEXTS",
    "Category",
    "Context",
    "ContextConfig",
    "Metric",
    "MetricInputs",
    "PromptNote",
    "RequestInfo",
    "Text",
    "Truncated",
    "Unfamiliar",
    "by_keyword",
    "enumerate_values",
    "part_of",
    "register",
    "trained_categories",
    "unregister",
    "user_contexts",
]  # fmt: skip
