"""What `ds_compress doctor` looks at: one file per section; each works while other parts of the install are broken.

Nothing here compiles, downloads or removes anything. Whatever is said goes through `paste.paste_safe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ds_compress.cli.diagnosis.section import Section

if TYPE_CHECKING:
    from ds_compress.cli.diagnosis.versions import Imports


def sections() -> Iterator[Callable[[], Section]]:
    """The checks in their order; the first one imports the packages, and later ones know from it which can be used."""
    from ds_compress.cli.diagnosis import internals, kernels, locks, machine, versions

    imports = versions.Imports()
    yield _guarded("versions", lambda section: versions.look(section, imports))
    yield _guarded("machine", lambda section: machine.look(section, imports))
    yield _guarded("kernels", lambda section: _with("torch", imports, section, kernels.look))
    yield _guarded("locks", locks.look)
    yield _guarded(
        "deepspeed_internals", lambda section: _with("deepspeed", imports, section, internals.look)
    )


def _with(package: str, imports: Imports, section: Section, look: Callable[[Section], None]) -> None:
    """Runs `look` where the package that it stands on can be imported."""
    if imports.can_use("torch") and imports.can_use(package):
        look(section)
    else:
        section.add("unknown", f"{package if imports.can_use('torch') else 'torch'} cannot be imported")


def _guarded(name: str, look: Callable[[Section], None]) -> Callable[[], Section]:
    def run() -> Section:
        section = Section(name)
        try:
            look(section)
        except Exception as error:
            what = f"the section {name} ended early: {type(error).__name__}: {error}"
            section.find(
                what, "report it with this page: something that ds_compress relies on is broken here"
            )
        return section

    return run
