"""`ds_compress report`: what trainings and their exports reached, as a page for a browser and as data.

sources     the files of a run: a checkpoint, an export, or a folder with both
summary     what they say of one run
modules     modules by layer, and zeros by the masks of a checkpoint
comparison  several runs, and what a user has measured of them
heat        what `ds_compress sensitivity` measured, as shaded cells
chart       lines and points in the coordinates of a picture
page        report.html, from templates/report.html.j2
"""

from __future__ import annotations

from ds_compress.report.comparison import report
from ds_compress.report.page import html

__all__ = ["html", "report"]
