"""Text that may be pasted into a public bug report: no home folder, no user name, no host name.

What takes their place still works in a shell: `~`, `$USER`, `$HOSTNAME`.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import re
import socket
from pathlib import Path

_PLAIN = re.compile(r"[\w@%+=:,./~$-]+")
_SHORTEST_HOST = 3
_OTHERS = (
    (re.compile(r"belongs to .+?, not to you"), "belongs to another user, not to you"),
    (re.compile(r"may be written by the group \S+"), "may be written by a group"),
)
"""Messages of `ops.library_file` that name users and groups."""


def paste_safe(text: str) -> str:
    """`text` without what tells whose machine this is."""
    for pattern, replacement in (*_patterns(_homes(), _user(), _hosts()), *_OTHERS):
        text = pattern.sub(replacement, text)
    return text


def in_shell(path: Path) -> str:
    """`path` as a word of a shell command, paste-safe: `~` and `$USER` stay outside of single quotes."""
    shown = paste_safe(str(path))
    if _PLAIN.fullmatch(shown):
        return shown
    head, rest = ("~/", shown[2:]) if shown.startswith("~/") else ("", shown)
    escaped = re.sub(r'(["\\`]|\$(?!USER\b|HOSTNAME\b))', r"\\\1", rest)
    return f'{head}"{escaped}"'


@functools.lru_cache
def _patterns(homes: tuple[str, ...], user: str, hosts: tuple[str, ...]) -> list[tuple[re.Pattern[str], str]]:
    # A home is the beginning of a path, a user name a whole folder in one: `/scratch/anna/x` for the user `anna`.
    patterns = [(re.compile(rf"(?<![\w./~-]){re.escape(home)}(?![\w.-])"), "~") for home in homes]
    if user:
        patterns.append((re.compile(rf"(?<=/){re.escape(user)}(?![\w.-])"), "$USER"))
    patterns += [(re.compile(rf"(?<![\w.-]){re.escape(host)}(?![\w-])"), "$HOSTNAME") for host in hosts]
    return patterns


def _homes() -> tuple[str, ...]:
    found: list[str] = []
    with contextlib.suppress(RuntimeError, OSError):
        found = [str(Path.home()), str(Path.home().resolve())]
    return tuple(sorted({home for home in found if len(home) > 1}, key=len, reverse=True))


def _user() -> str:
    with contextlib.suppress(Exception):  # no such user in a container, no environment
        return getpass.getuser()
    return ""


@functools.cache
def _hosts() -> tuple[str, ...]:
    full = socket.gethostname()
    names = {full, full.partition(".")[0]}
    names = {name for name in names if len(name) >= _SHORTEST_HOST and name != "localhost"}
    return tuple(sorted(names, key=len, reverse=True))
