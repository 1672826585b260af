"""Versions against the ranges that the package declares."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from ds_compress.cli.diagnosis import versions
from ds_compress.cli.diagnosis.section import Section

DECLARED = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]


def look(monkeypatch: pytest.MonkeyPatch, needs: list[str], broken: dict[str, Any] | None = None) -> Section:
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    section = Section("versions")
    versions.look(section, versions.Imports({"torch": None, "ds_compress.public": None, **(broken or {})}))
    return section


def test_all_that_the_package_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = DECLARED["optional-dependencies"]
    needs = [
        *DECLARED["dependencies"],
        *(f'{need}; extra == "{e}"' for e, all_ in extras.items() for need in all_),
    ]
    named = {Requirement(need).name for need in DECLARED["dependencies"]}
    optional = {
        Requirement(n).name for e in ("prune", "onnx", "openvino", "secure", "search") for n in extras[e]
    }
    section = look(monkeypatch, needs, dict.fromkeys(named | optional))
    assert set(section.facts) == {"python", "ds_compress"} | named | optional
    assert section.findings == []


@pytest.mark.parametrize(
    ("need", "what", "remedy"),
    [
        ("torch>=99", "outside of the supported range >=99", "pip install 'torch>=99'"),
        ("no-such-package-here>=1", "is not installed", "pip install 'no-such-package-here>=1'"),
        ('safetensors<0.1; extra == "onnx"', "outside of", "pip install 'ds_compress[onnx]'"),
    ],
)
def test_findings(monkeypatch: pytest.MonkeyPatch, need: str, what: str, remedy: str) -> None:
    (finding,) = look(monkeypatch, [need]).findings
    assert what in finding.what and finding.remedy == remedy


def test_what_is_optional_and_missing_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    section = look(monkeypatch, ['no-such-package-here>=1; extra == "secure"', 'other-one; extra == "dev"'])
    assert section.findings == [] and "other-one" not in section.facts
    assert "not installed; wanted for secure" in section.facts["no-such-package-here"][0]


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = look(monkeypatch, ["safetensors"], {"safetensors": "ImportError: libx.so.1"}).findings
    assert finding.what.endswith("cannot be imported: ImportError: libx.so.1")


def test_a_broken_torch_is_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {name: "OSError: libcudart" for name in ("torch", "accelerate", "ds_compress.public")}
    (finding,) = look(monkeypatch, ["accelerate", "torch"], broken).findings
    assert finding.what.startswith("torch ")


@pytest.mark.parametrize(
    "program", ["raise OSError('lib\\nmore')", "raise SystemExit(3)", "import nothing_here"]
)
def test_whatever_an_import_raises_is_a_line(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text(program)
    monkeypatch.syspath_prepend(str(tmp_path))
    error = versions.Imports().attempt("broken-package")
    assert error is not None and "\n" not in error
