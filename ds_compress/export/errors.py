"""The one error of an export."""

from __future__ import annotations


class ExportError(RuntimeError):
    """The model cannot be exported as asked, or the exported folder does not compute what the model does.

    The message names the module and says what else to do. Nothing was left in the output folder.
    """
