"""The report of a run: one HTML file that answers when to stop, whether it copies, and how good it is.

Everything is read from the files of the run; no model is loaded.
"""

from sfumato.reporting.half_run import compare_with_half
from sfumato.reporting.run_report import write_report

__all__ = ["compare_with_half", "write_report"]
