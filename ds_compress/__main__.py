"""`python -m ds_compress`."""

from __future__ import annotations

from ds_compress.cli import app

app(prog_name="ds_compress")
