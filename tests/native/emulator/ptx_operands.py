"""Instructions of PTX and their operands as C++ expressions; which opcode is translated by which function."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.native.emulator.ptx_parser import Kernel

CPP_TYPES = {
    "b8": "uint8_t", "u8": "uint8_t", "s8": "int8_t", "b16": "uint16_t", "u16": "uint16_t", "s16": "int16_t",
    "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t", "b64": "uint64_t", "u64": "uint64_t",
    "s64": "int64_t", "f32": "float", "f64": "double", "pred": "bool",
}  # fmt: skip
SPECIAL_REGISTERS = {
    f"%{name}.{axis}": f"{variable}.{axis}"
    for name, variable in {
        "tid": "threadIdx",
        "ctaid": "blockIdx",
        "ntid": "blockDim",
        "nctaid": "gridDim",
    }.items()
    for axis in "xyz"
}


class Untranslated(Exception):
    """An instruction whose meaning is not known to the translator."""


@dataclass
class Instruction:
    """One instruction: its opcode's parts, consumed as they are understood, and its operands."""

    text: str
    name: str
    modifiers: list[str]
    operands: list[str]
    kernel: Kernel

    def take(self, *choices: str) -> str | None:
        """Removes and returns the modifier that is one of `choices`, if there is one."""
        for choice in choices:
            if choice in self.modifiers:
                self.modifiers.remove(choice)
                return choice
        return None

    def need(self, *choices: str) -> str:
        if (taken := self.take(*choices)) is None:
            raise Untranslated(f"{self.text}: expected one of {choices}")
        return taken

    def type(self) -> str:
        """The last type of the opcode."""
        for modifier in reversed(self.modifiers):
            if modifier in CPP_TYPES or modifier in ("f16", "bf16"):
                self.modifiers.remove(modifier)
                return modifier
        raise Untranslated(f"{self.text}: no type")

    def value(self, i: int, type_: str) -> str:
        return value(self.operands[i], type_, self.kernel)

    def set(self, expression: str, type_: str, i: int = 0) -> str:
        return f"set({register(self.operands[i])}, ({CPP_TYPES[type_]})({expression}));"


Handler = Callable[[Instruction], str]
HANDLERS: dict[str, Handler] = {}


def opcode(*names: str) -> Callable[[Handler], Handler]:
    def remember(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return remember


# --- operands --------------------------------------------------------------------------------------------------


def register(name: str) -> str:
    if not name.startswith("%"):
        raise Untranslated(f"{name} is no register")
    return name[1:].replace(".", "_").replace("$", "_")


def value(operand: str, type_: str, kernel: Kernel) -> str:
    """An operand as a C++ expression of the given type."""
    cpp = CPP_TYPES[type_]
    if operand in SPECIAL_REGISTERS:
        return f"({cpp}){SPECIAL_REGISTERS[operand]}"
    if operand.startswith("%"):
        return f"get<{cpp}>({register(operand)})"
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
        return f"get<{cpp}>(0x{operand[2:]}u)"
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
        return f"get<{cpp}>(0x{operand[2:]}ull)"
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
        return f"({cpp}){operand.rstrip('U')}ll"
    if operand in kernel.shared_offsets:
        return f"({cpp}){kernel.shared_offsets[operand]}u"
    if operand in kernel.parameters:
        return f"({cpp})(uintptr_t)parameters[{kernel.parameters.index(operand)}]"
    raise Untranslated(f"operand {operand}")


def vector(operand: str) -> list[str]:
    """The elements of {a, b, c}, or the operand alone."""
    return (
        [part.strip() for part in operand.strip("{} ").split(",")] if operand.startswith("{") else [operand]
    )


def base_and_offset(operand: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    if match is None:
        raise Untranslated(f"address {operand}")
    return match[1], int(match[2] or 0)


def address(operand: str, space: str, cpp: str, count: int, kernel: Kernel) -> str:
    """A C++ pointer to `count` elements in a state space."""
    base, offset = base_and_offset(operand)
    if space == "param":
        if base.startswith("%"):  # an array among the parameters, indexed at run time
            return f"(const {cpp}*)({value(base, 'u64', kernel)} + {offset})"
        return f"(const {cpp}*)((const char*)parameters[{kernel.parameters.index(base)}] + {offset})"
    width = "u32" if space == "shared" else "u64"
    return f"{space}<{cpp}>({value(base, width, kernel)} + {offset}, {count})"


def label(name: str) -> str:
    return name.replace("$", "_")
