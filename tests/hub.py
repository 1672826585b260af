"""A model hub on this machine: what `huggingface_hub` needs of one to upload a folder and to fetch it again.

It keeps files in memory, takes all of them within the commit (no LFS, no Xet), and refuses a model card without a head.
It was written from the requests of huggingface_hub 2.4; a real hub checks more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"


@dataclass
class Hub:
    """address: for HF_ENDPOINT. files: by repository and path. tokens: that were sent."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)


@contextmanager
def hub() -> Iterator[Hub]:
    """One that answers until the end of the block."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state.tokens.add(self.headers.get("Authorization") or "")
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[:2] == ["api", "validate-yaml"]:
                content = json.loads(body)["content"]
                errors = [] if content.startswith("---\n") else [{"message": "a card without metadata"}]
                self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
            elif parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                state.files.setdefault(name if "/" in name else f"me/{name}", {})
                self._json({"url": f"{state.address}/{name}"})
            elif parts[-2:-1] == ["preupload"]:
                files = json.loads(body)["files"]
                self._json(
                    {
                        "files": [
                            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                        ]
                    }
                )
            elif parts[-2:-1] == ["commit"]:
                self._commit("/".join(parts[2:4]), body)
            else:
                self._json({"error": f"POST {self.path}"}, 404)

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "whoami-v2"]:
                self._json({"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
                return
            repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            files = state.files.get(repository)
            if files is None:
                self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            elif parts[0] == "api" and "tree" in parts:
                self._json(
                    [
                        {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}
                        for path, content in files.items()
                    ]
                )
            elif parts[0] == "api":
                siblings = [{"rfilename": path} for path in files]
                self._json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings})
            else:
                self._file(files.get("/".join(parts[4:])))

        do_HEAD = do_GET

        def _commit(self, repository: str, body: bytes) -> None:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    value = row["value"]
                    state.files[repository][value["path"]] = base64.b64decode(value["content"])
            self._json({"commitUrl": f"{state.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

        def _file(self, content: bytes | None) -> None:
            if content is None:
                self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            self._send(content, 200, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT})

        def _json(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self._send(
                json.dumps(answer).encode(), status, {"Content-Type": "application/json", **(headers or {})}
            )

        def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
