"""`ds_compress doctor`: one page for a bug report, and a verdict."""

from __future__ import annotations

from typing import Any

import typer

from ds_compress.cli.output import AsJson, print_json, stdout_to_stderr


def doctor(as_json: AsJson = False) -> None:
    """Prints what an install has, what runs where, and what will fail or hang, with its remedy.

    The page is for a bug report: it names no user, no host and no home folder. Nothing is compiled or removed.
    Exit status 0: all well; 1: something will fail or hang.
    """
    from ds_compress.cli.diagnosis import sections

    result: dict[str, Any] = {}
    findings: list[dict[str, str]] = []
    for look in sections():
        with stdout_to_stderr():
            section = look()
        result[section.name] = section.data()
        findings += [
            {"section": section.name, "what": found.what, "remedy": found.remedy}
            for found in section.findings
        ]
        if not as_json:
            typer.echo("\n".join([*section.lines(), ""]))
    if as_json:
        print_json({"ok": not findings, "findings": findings, **result})
    else:
        typer.echo("\n".join(_verdict(findings)))
    if findings:
        raise typer.Exit(1)


def _verdict(findings: list[dict[str, str]]) -> list[str]:
    if not findings:
        return ["verdict: all well"]
    lines = [f"verdict: {len(findings)} thing{'s' if len(findings) > 1 else ''} will fail or hang"]
    for number, finding in enumerate(findings, start=1):
        lines += [f"  {number}. {finding['what']}", f"     remedy: {finding['remedy']}"]
    return lines
