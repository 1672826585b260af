"""Splits a PTX module into kernels: parameters, registers, shared arrays, statements. No meaning yet."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

IGNORED_DIRECTIVES = (".loc", ".file", ".pragma", ".maxntid", ".reqntid", ".minnctapersm", ".section")


class MalformedPtx(Exception):
    """Text that this parser does not take for PTX."""


@dataclass(frozen=True)
class Statement:
    """A label, or an instruction with its guarding predicate ('%p1', '!%p1' or None)."""

    text: str
    label: str | None = None
    predicate: str | None = None
    opcode: str = ""
    operands: list[str] = field(default_factory=list)


@dataclass
class Kernel:
    name: str
    parameters: list[str]
    registers: dict[str, str] = field(default_factory=dict)  # %r1 -> b32
    shared_offsets: dict[str, int] = field(default_factory=dict)  # static arrays, then the dynamic ones
    static_shared_bytes: int = 0
    statements: list[Statement] = field(default_factory=list)


def parse(text: str) -> list[Kernel]:
    """The kernels (.entry) of a module."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    text = re.sub(
        r"^\s*(?:" + "|".join(map(re.escape, IGNORED_DIRECTIVES)) + r")\b[^\n;{]*;?", "", text, flags=re.M
    )
    header = text[: text.index(".entry")]
    kernels = []
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*\{", text):
        parameters = re.findall(r"([\w$]+)\s*(?:\[\d+\])?\s*(?:,|$)", match[2].strip())
        kernel = Kernel(match[1], parameters)
        body = text[match.end() : closing_brace(text, match.end())]
        lay_out_shared(kernel, header + body)
        for piece in split_statements(body):
            add_statement(kernel, piece)
        kernels.append(kernel)
    if not kernels:
        raise MalformedPtx("no kernel")
    return kernels


def closing_brace(text: str, start: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise MalformedPtx("a kernel without an end")


def lay_out_shared(kernel: Kernel, text: str) -> None:
    """Static arrays one after another, then, on 128 bytes, the dynamic array (all names of it are one)."""
    offset = 0
    for alignment, name, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text):
        if ".extern" in text[: text.index(name)].rsplit(";", 1)[-1]:
            continue
        offset = -(-offset // int(alignment)) * int(alignment)
        kernel.shared_offsets[name] = offset
        offset += int(size)
    kernel.static_shared_bytes = -(-offset // 128) * 128
    for name in re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\s*\d*\s*\]", text):
        kernel.shared_offsets[name] = kernel.static_shared_bytes


def split_statements(body: str) -> list[str]:
    """Statements without their semicolons, labels with their colon. Braces between statements are scopes."""
    pieces, current = [], ""
    body = re.sub(r"^\s*([\w$]+:)(?!:)", r"\1;", body, flags=re.MULTILINE)
    for token in re.findall(r"[;{}]|[^;{}]+", body):
        if token == ";":
            pieces.append(current.strip())
            current = ""
        elif token not in "{}" or current.strip():
            current += token
    if current.strip():
        raise MalformedPtx(f"an unfinished statement: {current.strip()}")
    return pieces


def add_statement(kernel: Kernel, piece: str) -> None:
    if piece.startswith(".reg"):
        declare_registers(kernel, piece)
    elif piece.startswith(".shared"):
        pass  # laid out already
    elif piece.endswith(":"):
        kernel.statements.append(Statement(piece, label=piece[:-1]))
    elif piece.startswith("."):
        raise MalformedPtx(f"directive {piece}")
    else:
        kernel.statements.append(parse_instruction(piece))


def declare_registers(kernel: Kernel, piece: str) -> None:
    match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", piece, flags=re.DOTALL)
    if match is None:
        raise MalformedPtx(piece)
    for name in (part.strip() for part in match[2].split(",")):
        many = re.fullmatch(r"(%[\w$]+)<(\d+)>", name)
        for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            if kernel.registers.setdefault(each, match[1]) != match[1]:
                raise MalformedPtx(f"{each} is declared twice, differently")


def parse_instruction(piece: str) -> Statement:
    match = re.fullmatch(r"(?:@(!?%[\w$]+)\s+)?(\S+)\s*(.*)", piece, flags=re.DOTALL)
    if match is None:
        raise MalformedPtx(piece)
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,{\[]*", match[3])
    return Statement(
        " ".join(piece.split()), None, match[1], match[2], [" ".join(o.split()) for o in operands]
    )
