"""How good a model's pictures are, each figure beside what real, held-out pictures get."""

from sfumato.evaluation.report import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
