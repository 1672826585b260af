"""Lets pages link to files beside `docs/`: they are copied into the site, under `repository/`.

On a code host the link `../ds_configs/small_zero2.json` leads to that file; on the site it would lead nowhere.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)(?=[)#\s])")


def _beside_docs(source: str, link: str) -> str | None:
    """The path in the repository of what a page links to; None where that is a page of the site."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link))
    return None if path.startswith("docs/") or not (ROOT / path).is_file() else path


def on_files(files: Any, config: Any) -> Any:
    wanted = set()
    for file in files.documentation_pages():
        for found in _LINK.finditer(Path(file.abs_src_path).read_text(encoding="utf-8")):
            path = _beside_docs(file.src_uri, found[2])
            if path is not None:
                wanted.add(path)
    for path in sorted(wanted):
        # A .md file there would become a page of its own: it is copied as text.
        name = f"repository/{path}" + (".txt" if path.endswith(".md") else "")
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def rewritten(found: re.Match[str]) -> str:
        path = _beside_docs(page.file.src_uri, found[2])
        if path is None:
            return found[0]
        name = f"repository/{path}" + (".txt" if path.endswith(".md") else "")
        return found[1] + posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(rewritten, markdown)
