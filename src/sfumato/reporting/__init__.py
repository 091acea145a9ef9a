"""The report of a run: one HTML file that answers when to stop, whether it copies, and how good it is.

Everything is read from the files of the run; no model is loaded.
"""

from sfumato.reporting.run_report import write_report

__all__ = ["write_report"]
