"""Whether the private names of DeepSpeed that ds_compress relies on are there, and as they were."""

from __future__ import annotations

from ds_compress.cli.diagnosis.section import Section


def look(section: Section) -> None:
    """Needs no process group: it looks at names, parameters and sources."""
    import deepspeed

    from ds_compress.engine.internals_check import TESTED_VERSIONS
    from ds_compress.engine.zero.internals_table import INTERNALS, missing_internals

    version = str(deepspeed.__version__).split("+")[0]
    is_tested = version in TESTED_VERSIONS
    tested = ", ".join(TESTED_VERSIONS)
    words = f"{version} is one of those" if is_tested else f"{version} is none of those"
    section.add(
        "tested versions", f"{tested}; {words}", {"tested": list(TESTED_VERSIONS), "is_tested": is_tested}
    )
    missing = missing_internals()
    fit = f"{len(INTERNALS)} names that ds_compress relies on are as expected"
    section.add("internals", "; ".join(missing) or fit, {"checked": len(INTERNALS), "problems": missing})
    if missing:
        what = f"DeepSpeed {version} differs from what ds_compress patches: {'; '.join(missing)}"
        section.find(what, f"pip install deepspeed=={TESTED_VERSIONS[-1]}")
