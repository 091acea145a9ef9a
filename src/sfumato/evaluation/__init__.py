"""How good a model's pictures are, each figure beside what real, held-out pictures get."""

from sfumato.evaluation.adherence import Adherence, adherence_table, measure_adherence
from sfumato.evaluation.report import Evaluation, evaluate

__all__ = ["Adherence", "Evaluation", "adherence_table", "evaluate", "measure_adherence"]
