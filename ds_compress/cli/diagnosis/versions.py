"""Which packages are installed, whether ds_compress supports their versions, and whether they can be imported.

The supported ranges are those that the package was installed with, so that there is no second list of them.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ds_compress.cli.diagnosis.section import Section
from ds_compress.version import __version__

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_EXTRAS = ("prune", "onnx", "openvino", "secure", "search")
"""Optional parts of the library; the other extras are for those who work on it."""
_MODULES = {"pyOpenSSL": "OpenSSL", "pyyaml": "yaml"}
"""Whose module has another name."""
_NOT_IMPORTED = frozenset({"typer", "rich", "jinja2", "tqdm", "regex", "xxhash", "pydantic"})
"""Of which the version is enough: whoever reads this has imported the first two, and the others are one file each."""


@dataclass
class Imports:
    """What happened when packages were imported, by name: None where it went well, else what was raised."""

    errors: dict[str, str | None] = field(default_factory=dict)

    def attempt(self, package: str) -> str | None:
        """Imports a package, once; returns what was raised."""
        if package not in self.errors:
            self.errors[package] = self._attempt(_MODULES.get(package, package.replace("-", "_")))
        return self.errors[package]

    def can_use(self, package: str) -> bool:
        return self.attempt(package) is None

    def _attempt(self, module: str) -> str | None:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
        return None


def look(section: Section, imports: Imports) -> None:
    """Adds a fact per package, and a finding for each that will not work."""
    _python(section)
    imports.attempt("torch")  # first: what fails without it is no finding of its own
    requirements = list(_requirements())
    if not requirements:
        section.add("supported ranges", "unknown: this ds_compress was not installed by pip")
        requirements = [(_bare(name), "") for name in ("torch", "deepspeed", "transformers")]
    for requirement, extra in sorted(requirements, key=lambda item: item[1]):
        _package(section, imports, requirement, extra)
    _ourselves(section, imports)


def _ourselves(section: Section, imports: Imports) -> None:
    others_work = not any(imports.errors.values())
    error = imports.attempt("ds_compress.public")
    broken = f"; cannot be imported: {error}" if error else ""
    section.add("ds_compress", f"{__version__}{broken}", _data(__version__, "", True, error))
    if error and others_work:
        section.find(
            f"ds_compress {__version__} cannot be imported: {error}",
            "pip install --force-reinstall ds_compress",
        )


def _python(section: Section) -> None:
    found, wanted = platform.python_version(), ""
    with contextlib.suppress(metadata.PackageNotFoundError, KeyError):
        wanted = metadata.metadata("ds_compress")["Requires-Python"] or ""
    fits = _fits(found, wanted)
    section.add("python", f"{found}{_range(wanted, fits)}", _data(found, wanted, fits))
    if not fits:
        section.find(f"Python {found} is not one of {wanted}", "install ds_compress into a newer Python")


def _package(section: Section, imports: Imports, requirement: Requirement, extra: str) -> None:
    name, wanted = requirement.name, str(requirement.specifier)
    pip = f"pip install 'ds_compress[{extra}]'" if extra else f"pip install '{name}{wanted}'"
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        words = f"not installed; wanted for {extra}: {pip}" if extra else "not installed"
        section.add(name, words, _data(None, wanted, None, None, extra))
        if not extra:
            section.find(f"{name} is not installed, and ds_compress cannot work without it", pip)
        return
    fits = _fits(installed, wanted)
    error = None if name in _NOT_IMPORTED else imports.attempt(name)
    broken = f"; cannot be imported: {error}" if error else ""
    data = _data(installed, wanted, fits, error, extra)
    section.add(name, f"{installed}{_range(wanted, fits)}{broken}", data)
    if not fits:
        section.find(f"{name} {installed} is outside of the supported range {wanted}", pip)
    if error and (name == "torch" or imports.can_use("torch")):
        section.find(
            f"{name} {installed} cannot be imported: {error}",
            f"pip install --force-reinstall '{name}{wanted}'",
        )


def _requirements() -> Iterator[tuple[Requirement, str]]:
    """(requirement, extra that it belongs to, "" for none)"""
    from packaging.requirements import Requirement

    try:
        texts = metadata.requires("ds_compress") or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            yield requirement, ""
            continue
        extra = next((extra for extra in _EXTRAS if marker.evaluate({"extra": extra})), None)
        if extra is not None:
            yield requirement, extra


def _bare(name: str) -> Requirement:
    from packaging.requirements import Requirement

    return Requirement(name)


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _data(
    installed: str | None, supported: str, fits: bool | None, import_error: str | None = None, extra: str = ""
) -> dict[str, Any]:
    """A package in JSON; fits is null where it is not installed, extra where it is no part of one."""
    return {
        "installed": installed,
        "supported": supported,
        "fits": fits,
        "import_error": import_error,
        "extra": extra or None,
    }


def _range(wanted: str, fits: bool) -> str:
    if not wanted:
        return ""
    return f" (supported: {wanted})" if fits else f" (NOT SUPPORTED: {wanted} is needed)"
