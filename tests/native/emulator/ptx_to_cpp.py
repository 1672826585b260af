"""Translates PTX to C++ that runs on the emulator: what nvcc really emitted, inline assembly included.

    cpp = translate(ptx_text)

Every kernel becomes one C++ function over plain variables, one statement per instruction; `ptx_runtime.h` gives
the instructions their meaning, and `dsc_ptx_kernel` finds a kernel by name. An opcode or a modifier that is not
known here raises `Untranslated`: nothing is guessed.
"""

from __future__ import annotations

from pathlib import Path

from tests.native.emulator import ptx_instructions, ptx_operands, ptx_parser
from tests.native.emulator.ptx_operands import (
    CPP_TYPES,
    HANDLERS,
    Instruction,
    Untranslated,
    address,
    label,
    opcode,
    register,
)
from tests.native.emulator.ptx_parser import Kernel, Statement, parse

# `translate`, and what a test needs that teaches the translator a further opcode.
__all__ = ["CPP_TYPES", "Instruction", "Untranslated", "address", "opcode", "sources", "translate"]


def sources() -> str:
    """The text of the translator itself: a translation is only as good as long as that stays."""
    files = (__file__, ptx_instructions.__file__, ptx_operands.__file__, ptx_parser.__file__)
    return "".join(Path(file).read_text() for file in files)


def translate_statement(statement: Statement, kernel: Kernel) -> str:
    if statement.label is not None:
        return f"{label(statement.label)}:;"
    name, *modifiers = statement.opcode.split(".")
    if name not in HANDLERS:
        raise Untranslated(f"{statement.opcode}: unknown opcode")
    ins = Instruction(statement.text, name, modifiers, statement.operands, kernel)
    body = HANDLERS[name](ins)
    if ins.modifiers:
        raise Untranslated(f"{statement.text}: unknown modifiers {ins.modifiers}")
    guard = ""
    if statement.predicate is not None:
        negated = statement.predicate.startswith("!")
        guard = f"if ({'!' * negated}{register(statement.predicate.lstrip('!'))}) "
    return f"{guard}{{ {body} }}"


def translate_kernel(kernel: Kernel) -> str:
    lines = [f"static void {kernel.name}_ptx([[maybe_unused]] void** parameters, size_t) {{"]
    lines += [f"    {CPP_TYPES[bits_of(t)]} {register(name)};" for name, t in kernel.registers.items()]
    lines += [f"    {translate_statement(statement, kernel)}" for statement in kernel.statements]
    return "\n".join([*lines, "}"])


def bits_of(type_: str) -> str:
    """A register is plain bits: .f32 and .s32 are b32."""
    return type_ if type_ == "pred" else f"b{type_[1:]}"


def translate(text: str, only: str = "") -> str:
    """The C++ of the kernels of a PTX module, and `dsc_ptx_kernel` which finds them by name.

    `only`: those whose name contains it.
    """
    kernels = [kernel for kernel in parse(text) if only in kernel.name]
    parts = ['#include "emulator/ptx_runtime.h"', "namespace ds_compress {", "using namespace ptx;"]
    parts += [translate_kernel(kernel) for kernel in kernels]
    entries = ", ".join(f'{{"{k.name}", {{{k.name}_ptx, {k.static_shared_bytes}}}}}' for k in kernels)
    parts += [
        "}  // namespace ds_compress",
        'extern "C" const ds_compress::emulator::PtxKernel* dsc_ptx_kernel(const char* name) {',
        "    using namespace ds_compress;",
        "    static const struct { const char* name; emulator::PtxKernel kernel; } kernels[] = {"
        + entries
        + "};",
        "    for (const auto& each : kernels) if (std::strcmp(each.name, name) == 0) return &each.kernel;",
        "    return nullptr;",
        "}",
    ]
    return "\n".join(parts) + "\n"
