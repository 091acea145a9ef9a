"""What a set of images can and cannot teach: measured, explained, and shown. Nothing here changes or deletes a file."""

from sfumato.data.check.inspect import KINDS, Examination, IntendedModel, examine
from sfumato.data.check.report import write

__all__ = ["KINDS", "Examination", "IntendedModel", "examine", "write"]
