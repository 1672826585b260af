"""Nothing on the page tells whose machine it is, and commands still work."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ds_compress.cli.diagnosis import paste
from ds_compress.cli.diagnosis.paste import in_shell, paste_safe


@pytest.fixture(autouse=True)
def anna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("LOGNAME", "anna")
    monkeypatch.setattr(paste, "_hosts", lambda: ("node7.lab.example", "node7"))


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("/home/anna/.cache/x", "~/.cache/x"),
        ("CXX=/home/anna/g++, /home/anna", "CXX=~/g++, ~"),
        ("/home/annabel/x", "/home/annabel/x"),
        ("/mnt/home/anna/x", "/mnt/home/$USER/x"),
        ("/scratch/anna/ext", "/scratch/$USER/ext"),
        ("/scratch/anna-2/banana", "/scratch/anna-2/banana"),
        ("on node7.lab.example and node7, not node70", "on $HOSTNAME and $HOSTNAME, not node70"),
        ("x belongs to bob, not to you", "x belongs to another user, not to you"),
        ("x may be written by the group lab, and", "x may be written by a group and"),
    ],
)
def test_names_and_homes_are_replaced(text: str, safe: str) -> None:
    assert paste_safe(text) == safe


def test_a_home_at_the_root_replaces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert paste_safe("/usr/lib/x") == "/usr/lib/x"


@pytest.mark.parametrize(
    "path", ["/home/anna/plain", "/home/anna/a b/$x", '/data/anna/it\'s "q"', "/data/back\\slash `ls`"]
)
def test_a_shell_reads_the_path_back(path: str) -> None:
    environment = {"HOME": "/home/anna", "USER": "anna", "PATH": "/usr/bin:/bin"}
    command = ["sh", "-c", f"printf %s {in_shell(Path(path))}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == path
    assert "anna" not in in_shell(Path(path))
