"""A check of what a set of images can and cannot teach: measured, explained, and shown. Nothing
here changes or deletes a file.
"""

from sfumato.data.check.findings import KINDS
from sfumato.data.check.inspect import Inspection, IntendedModel, inspect_data
from sfumato.data.check.report import write

__all__ = ["KINDS", "Inspection", "IntendedModel", "inspect_data", "write"]
