"""Runs launchers of one emulator library in a process of its own, which a fault or a sanitizer may end.

Standard input: a pickled (library, schedule, programs); standard output: a pickled list with the bytes of every
output buffer. "Device memory" is malloc'ed to the byte, so ASan knows its ends. Only the standard library is
imported: the sanitizers then have nothing of numpy or torch to look at.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys

Argument = str | int | float | list[str] | list[int] | None


def run_program(
    library: ctypes.CDLL,
    buffers: dict[str, bytes],
    calls: list[tuple[str, tuple[Argument, ...]]],
    outputs: tuple[str, ...],
) -> dict[str, bytes]:
    """One program: named buffers, launcher calls on them (a string argument is a buffer), what to hand back."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    memory: dict[str, int] = {}
    for name, content in buffers.items():
        memory[name] = libc.malloc(ctypes.c_size_t(len(content)))
        ctypes.memmove(memory[name], content, len(content))
    for function, arguments in calls:
        status = getattr(library, function)(*(native(argument, memory) for argument in arguments))
        if status != 0:
            raise SystemExit(f"emulator: {function} returned {status}")
    results = {name: ctypes.string_at(memory[name], len(buffers[name])) for name in outputs}
    for address in memory.values():
        libc.free(ctypes.c_void_p(address))
    return results


def native(argument: Argument, memory: dict[str, int]) -> ctypes._SimpleCData | ctypes.Array:
    """Integers travel as 64 bits, which an `int` parameter reads as well on every 64-bit ABI.

    "x+6" is six bytes into the buffer x; a list is an array on the host, of addresses or of 64-bit integers.
    """
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, str):
        return ctypes.c_void_p(address_of(argument, memory))
    if isinstance(argument, list):
        values = [address_of(each, memory) if isinstance(each, str) else each for each in argument]
        return (ctypes.c_int64 * len(values))(*values)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def address_of(place: str, memory: dict[str, int]) -> int:
    name, _, offset = place.partition("+")
    return memory[name] + int(offset or 0)


def main() -> None:
    path, schedule, programs = pickle.load(sys.stdin.buffer)
    library = ctypes.CDLL(path)
    library.dsc_emulator_schedule(schedule)
    results = [run_program(library, *program) for program in programs]
    counts = (ctypes.c_uint64 * 6)()
    library.dsc_emulator_statistics(counts)
    sys.stdout.buffer.write(pickle.dumps((results, list(counts))))
    sys.stdout.buffer.flush()
    os._exit(0)  # nothing to tear down, and no sanitizer to consult about Python's own memory


if __name__ == "__main__":
    main()
