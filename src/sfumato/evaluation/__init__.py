"""How good a model's images are: each figure appears beside that of real, held-out images."""

from sfumato.evaluation.adherence import Adherence, adherence_table, measure_adherence
from sfumato.evaluation.composition import Composition, composition, composition_table
from sfumato.evaluation.fidelity import evaluate
from sfumato.evaluation.gallery import gallery
from sfumato.evaluation.report import EvaluationReport, evaluate_pipeline
from sfumato.evaluation.rows import Evaluation

__all__ = [
    "Adherence",
    "Composition",
    "Evaluation",
    "EvaluationReport",
    "adherence_table",
    "composition",
    "composition_table",
    "evaluate",
    "evaluate_pipeline",
    "gallery",
    "measure_adherence",
]
