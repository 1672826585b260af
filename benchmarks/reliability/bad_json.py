"""R5: configs that nobody should write, some 60 by hand and 10,000 by chance.

Each is given to `parse_config`, to `plan` on a tiny model, and as a JSON file: it is accepted, or refused by a
`ConfigError` whose every problem names a place in it, and that can be printed. The seeded mutations start from the
block with every key that the tests have, from the blocks of the documentation and from `ds_configs`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import ds_compress
from benchmarks.reliability.trial import Trial, Verdict
from ds_compress.config.schema.compression_training import config_model
from ds_compress.errors import ROOT, shown

NAME = "R5"
WHAT = "bad JSON: about 60 by hand, 10,000 mutations, hostile regexes"
PASS = "success or our error with its path; none over 1 s"
MUTATIONS = 10_000
LONGEST_S = 1.0
"""Of the processor: a busy machine is not slow code."""
_DEEPEST = 32
_REPOSITORY = Path(__file__).resolve().parents[2]

HOSTILE_REGEXES = (
    r"(a+)+$",
    r"(a|a)*$b",
    r"(.*)*x$",
    r"(\w+\.?)+!x",
    r"([a-z]+)*\d$",
    r"((a*)*)*b",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"(?:a|aa)+$",
    r"(.*?,){25}P",
    r"(\w+\s?)*q$",
    r"(.*?){20}(\w+\s?)*q$",
    r"(?:(?:[a-z.]+)+)+\d\d\d$",
    r"(?=(\w+)\1)+x",
    r"((.*)(.*)(.*)(.*))*!",
    "(" * 5000,
    "(" * 3000 + "a" + ")" * 3000,
    "a{1000000}",
    "((a{1,300}){1,300}){1,300}",
    "(?P<a>x)(?P<a>y)",
    "(?<=a+)b",
    "[",
    "*",
    "**",
    "\\",
    "(?i",
    "a" * 100_000,
    "|".join(f"layer{i}" for i in range(5000)),
)

HOSTILE_TEXTS = (
    "",
    " ",
    "\0",
    "\n",
    "\ud800",
    "a\udfff",
    "\u202e",
    "nan",
    "NaN",
    "Infinity",
    "1e999",
    "\uff11\uff12",
    "true",
    "null",
    "auto",
    "auto ",
    "*",
    "2:4",
    "0:0",
    "4:2",
    "99999999999999999999:1",
    "0x0",
    "1x" + "9" * 5000,
    "4x1",
    "l1",
    "{}",
    "[]",
    "__class__",
    "../../etc/passwd",
    "x" * 200_000,
    "'; drop table",
    "%s%n{0}{0.__class__}",
)

HOSTILE_NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    -0.0,
    0.5,
    1.5,
    1e-320,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    10**400,
    10**5000,
)


def nested(depth: int, kind: str = "list") -> Any:
    """`depth` lists or objects in one another."""
    value: Any = "x"
    for _ in range(depth):
        value = [value] if kind == "list" else {"modules": value}
    return value


class _Odd:
    """What no JSON gives, but a caller in Python may."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


HOSTILE_OBJECTS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [{}],
    [None],
    [1, "a", None],
    {"": {}},
    {"a": {"b": {"c": {}}}},
    {"different_groups": {"different_groups": {}}},
    partial(nested, 50),
    partial(nested, 50, "object"),
    partial(nested, 5000),
    partial(nested, 5000, "object"),
    ["encoder"] * 20_000,
    {f"k{i}": i for i in range(5000)},
)
PYTHON_OBJECTS: tuple[Any, ...] = ((), {1, 2}, b"\xff", 1j, _Odd(), len, {1: 2}, {None: None}, {(1,): 1})


# -- what is asked of the answer -----------------------------------------------------------------------


@functools.cache
def _model() -> nn.Module:
    from tests.models import tiny_bert

    model = tiny_bert()
    for number in range(2):  # what is imported at first use is no cost of a config
        ds_compress.plan(model, {ROOT: {"scheme": "W4A16"}} if number else {ROOT: _groups()})
    return model


def judged(calls: Sequence[Callable[[], Any]], is_place: Callable[[str], bool]) -> Verdict:
    """Of the first call that ends in an error, or of all. is_place: whether a problem's path says where it is."""
    kind = "accepted"
    for call in calls:
        begin = time.thread_time()
        refused = _refusal(call)
        seconds = time.thread_time() - begin
        if seconds > LONGEST_S:
            return Verdict(False, "slow", f"{seconds:.1f} s")
        if isinstance(refused, Verdict):
            return refused
        if refused is not None:
            text = str(refused)
            try:
                text.encode("utf-8")
            except UnicodeError as error:
                return Verdict(False, "cannot be printed", str(error))
            lost = [problem.path for problem in refused.problems if not is_place(problem.path)]
            told = all(p.path[:200] in text for p in refused.problems[:10] if _is_plain(p.path))
            if lost or not refused.problems or not told:
                return Verdict(False, "refused without a place", text[:500])
            kind = "refused"
            break
    return Verdict(True, kind)


def _refusal(call: Callable[[], Any]) -> ds_compress.ConfigError | Verdict | None:
    try:
        call()
    except ds_compress.ConfigError as error:
        return error
    except Exception as error:
        return Verdict(False, "another error", f"{type(error).__name__}: {str(error)[:300]!r}")
    return None


def _is_plain(path: str) -> bool:
    return path.isprintable() and path.isascii()


def _below_root(path: str, block: Any) -> bool:
    """Whether the path leads to a key of the block, or to the block itself where that is what is wrong."""
    if path == ROOT:
        return not isinstance(block, Mapping) or not set(block) <= set(config_model().model_fields)
    return path.startswith((f"{ROOT}.", f"{ROOT}["))


# -- by hand -------------------------------------------------------------------------------------------


def _groups(pattern: Any = "encoder", **shared: Any) -> dict[str, Any]:
    """A block of sparse_pruning with one group."""
    group = {"params": {"dense_ratio": 0.5}, "modules": [pattern]}
    return {
        "sparse_pruning": {"shared_parameters": {"enabled": True, **shared}, "different_groups": {"g": group}}
    }


def _blocks_by_hand() -> Iterator[tuple[str, Any, str]]:
    """(name, block, the path that its refusal names; "": it may be accepted)."""
    shared = f"{ROOT}.sparse_pruning.shared_parameters"
    modules = f"{ROOT}.sparse_pruning.different_groups.g.modules[0]"
    odd: Any
    value: Any
    for odd in (None, 5, "text", [], True, math.nan):
        yield f"the block is {odd!r}", odd, ROOT
    yield "an unknown block", {"sparse_prunning": {}}, f"{ROOT}.sparse_prunning"
    yield "an unknown key", _groups(methods="l1"), f"{shared}.methods"
    yield "a lone surrogate", _groups(method="\ud800"), f"{shared}.method"
    yield "a lone surrogate as a key", {"\ud800": {}}, ""
    yield (
        "a number for true",
        _groups() | {"row_pruning": {"shared_parameters": {"enabled": 1}}},
        (f"{ROOT}.row_pruning.shared_parameters.enabled"),
    )
    for number in (math.nan, math.inf, 10**400, -1, 2):
        yield f"dense_ratio {str(number)[:8]}", _groups(dense_ratio=number), f"{shared}.dense_ratio"
    for number in (math.nan, math.inf, 1.5, -1):
        yield f"schedule_offset {number}", _groups(schedule_offset=number), f"{shared}.schedule_offset"
    yield "a seed of 5,000 digits", _groups(method="random", seed=10**5000), f"{shared}.seed"
    yield "a pattern of 5,000 digits", _groups(pattern="1x" + "9" * 5000), ""
    for text in ("0:0", "4:2", "2:0", "x", ":"):
        yield (
            f"pattern {text}",
            _groups() | {"sparse_pruning": {"shared_parameters": {"enabled": True, "pattern": text}}},
            f"{shared}.pattern",
        )
    yield (
        "groups that are a list",
        {"sparse_pruning": {"different_groups": []}},
        (f"{ROOT}.sparse_pruning.different_groups"),
    )
    for value in (None, 5, {}, [], [None], [5], [[]], nested(5000)):
        group = {"params": {"dense_ratio": 0.5}, "modules": value}
        block = {"sparse_pruning": {"shared_parameters": {"enabled": True}, "different_groups": {"g": group}}}
        yield f"modules {shown(value)[:12]}", block, f"{ROOT}.sparse_pruning.different_groups.g.modules"
    for pattern in (r"(a+)+$", "(" * 5000, "[", "a{99999999999}", "no such layer", "a" * 100_000):
        expected = "" if pattern == r"(a+)+$" else modules
        yield f"modules [{pattern[:14]}]", _groups(pattern), expected
    many = {
        f"g{i}": {"params": {"dense_ratio": 0.5}, "modules": [rf"(.*?){{{20 + i}}}(\w+\s?)*q$"]}
        for i in range(50)
    }
    slow = {"sparse_pruning": {"shared_parameters": {"enabled": True}, "different_groups": many}}
    yield "50 slow regexes", slow, f"{ROOT}.sparse_pruning.different_groups.g0.modules[0]"
    excluded = [r"(.*?){20}(\w+\s?)*q$"]
    yield "a slow regex that excludes", _groups(excluded_modules=excluded), f"{shared}.excluded_modules[0]"
    yield "a key that is no text", {5: {}}, ""
    yield "an object that cannot be shown", _groups(method=_Odd()), f"{shared}.method"
    inside_itself: dict[str, Any] = _groups()
    inside_itself["sparse_pruning"]["shared_parameters"]["method"] = inside_itself
    yield "a block inside itself", inside_itself, f"{shared}.method"
    yield (
        "20,000 groups",
        {
            "sparse_pruning": {
                "shared_parameters": {"enabled": True},
                "different_groups": {f"g{i}": {"params": {"dense_ratio": 2}} for i in range(20_000)},
            }
        },
        f"{ROOT}.sparse_pruning.different_groups.g0",
    )


def _texts_by_hand() -> Iterator[tuple[str, bytes, bool]]:
    """(name, content of the file, whether it may be accepted)."""
    good = json.dumps({"train_batch_size": 8, ROOT: _groups()})
    yield "an empty file", b"", False
    yield "blanks only", b" \n\t ", False
    yield "null", b"null", False
    yield "a list", b"[1]", False
    yield "half a file", good[: len(good) // 2].encode(), False
    yield "two files", (good + good).encode(), False
    yield "100,000 lists in one another", b"[" * 100_000, False
    yield "100,000 objects in one another", b'{"a":' * 100_000, False
    yield "a byte order mark", b"\xef\xbb\xbf" + good.encode(), True
    yield "UTF-16", good.encode("utf-16"), False
    yield "UTF-32", good.encode("utf-32"), False
    yield "Latin-1", good.replace("encoder", "enc\xf6der").encode("latin-1"), False
    yield "zero bytes", good.encode() + b"\0" * 1000, True
    yield "random bytes", random.Random(0).randbytes(5000), False
    yield (
        "a key twice",
        good.replace('"method"', '"enabled": false, "method"')
        .replace('"enabled": true', '"enabled": true, "enabled": true')
        .encode(),
        False,
    )
    yield "comments and trailing commas", good.replace("{", "{ // comment\n", 1).encode(), True
    yield "NaN", good.replace("0.5", "NaN").encode(), False
    yield "Infinity", good.replace("0.5", "-Infinity").encode(), False
    yield "1e999", good.replace("0.5", "1e999").encode(), False
    yield "5,000 digits", good.replace("0.5", "9" * 5000).encode(), False
    yield "a lone surrogate", good.replace("encoder", "\\ud800").encode(), False
    yield "ten megabytes of blanks", b" " * 10_000_000 + good.encode(), True
    yield "a megabyte in one name", good.replace('"g"', f'"{"g" * 1_000_000}"').encode(), True


# -- by chance -----------------------------------------------------------------------------------------


@functools.cache
def sources() -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """(name, block) of valid configs, the one with every key first."""
    from tests.complete_block import COMPLETE

    found: list[tuple[str, Mapping[str, Any]]] = [("complete", COMPLETE)]
    texts = [(path.stem, [path.read_text()]) for path in sorted((_REPOSITORY / "ds_configs").rglob("*.json"))]
    for page in sorted((_REPOSITORY / "docs").rglob("*.md")):
        texts.append((page.stem, re.findall(r"```json[^\n]*\n(.*?)```", page.read_text(), re.DOTALL)))
    for place, examples in texts:
        for number, text in enumerate(examples):
            try:
                config = json.loads(text)
            except ValueError:
                continue
            block = config.get(ROOT, config) if isinstance(config, dict) else None
            if isinstance(block, dict) and set(block) & set(config_model().model_fields):
                found.append((f"{place} {number}", block))
    return tuple(found)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of what is below `value`, as deep as the schema goes; of long lists, their first entries."""
    if len(path) > _DEEPEST:
        return
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, item in itertools.islice(items, _DEEPEST):
        yield (*path, key)
        yield from places(item, (*path, key))


def _owner(block: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        block = block[key]
    return block


@dataclass(frozen=True)
class _Mutation:
    """One seeded change; made when it runs, because 10,000 of them would fill the memory."""

    number: int
    seed: int

    def __call__(self, folder: Path) -> Verdict:
        rng = random.Random(self.seed)
        name, source = rng.choice(sources()) if rng.random() < 0.7 else sources()[0]
        block = copy.deepcopy(dict(source))
        changes = [_change(block, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        verdict = _as_text(block, folder, rng) if rng.random() < 0.4 else _as_object(block, rng)
        if verdict.passed:
            return verdict
        return Verdict(False, verdict.kind, f"{name}: {'; '.join(changes)}: {verdict.detail}")


def _change(block: dict[Any, Any], rng: random.Random) -> str:
    """Damages the block in one place; returns what was done."""
    path = rng.choice(list(places(block)) or [("sparse_pruning",)])
    owner, key = _owner(block, path), path[-1]
    what = rng.choice(
        ("value", "value", "value", "value", "delete", "rename", "unknown", "wrap", "swap", "regex", "list")
    )
    if what == "value":
        owner[key] = _hostile(rng)
    elif what == "delete":
        owner.pop(key, None) if isinstance(owner, dict) else owner.pop(key)
    elif what == "rename" and isinstance(owner, dict):
        owner[_renamed(key, rng)] = owner.pop(key, None)
    elif what == "unknown" and isinstance(owner, dict):
        owner[rng.choice(HOSTILE_TEXTS)] = _hostile(rng)
    elif what == "wrap":
        owner[key] = [owner.get(key)] if isinstance(owner, dict) else {"a": owner[key]}
    elif what == "swap":
        other = rng.choice(list(places(block)) or [path])
        if other[: len(path)] != path and path[: len(other)] != other:
            theirs = _owner(block, other)
            owner[key], theirs[other[-1]] = theirs[other[-1]], owner[key]
    elif what == "regex":
        owner[key] = rng.choice(HOSTILE_REGEXES)
    else:
        owner[key] = [rng.choice(HOSTILE_REGEXES) for _ in range(rng.randint(1, 8))]
    return f"{what} at {'.'.join(map(repr, path))[:200]}"


def _hostile(rng: random.Random) -> Any:
    pools: tuple[tuple[Any, ...], ...] = (HOSTILE_TEXTS, HOSTILE_NUMBERS, HOSTILE_OBJECTS, HOSTILE_REGEXES)
    value = rng.choice(rng.choice(pools))
    return _copied(value)


def _copied(value: Any) -> Any:
    """Another one, because a later mutation may change it; what is too deep to be copied is made anew."""
    return value() if isinstance(value, partial) else copy.deepcopy(value)


def _renamed(key: Any, rng: random.Random) -> Any:
    if not isinstance(key, str) or not key:
        return rng.choice(HOSTILE_TEXTS)
    at = rng.randrange(len(key))
    return rng.choice(
        (key[:at] + key[at + 1 :], key.upper(), f"{key} ", key[:at] + "\ud800" + key[at:], "auto")
    )


def _as_object(block: dict[Any, Any], rng: random.Random) -> Verdict:
    if rng.random() < 0.1:
        path = rng.choice(list(places(block)) or [("a",)])
        _owner(block, path)[path[-1]] = rng.choice(PYTHON_OBJECTS)
    model = _model()
    calls = [lambda: ds_compress.parse_config(block), lambda: ds_compress.plan(model, {ROOT: block})]
    return judged(calls, lambda path: _below_root(path, block))


def _as_text(block: Any, folder: Path, rng: random.Random) -> Verdict:
    config = {ROOT: block} if rng.random() < 0.5 else {"train_batch_size": 8, ROOT: block}
    try:
        text = json.dumps(config, ensure_ascii=rng.random() < 0.8)
    except (ValueError, RecursionError):  # too deep for Python's own writer, too long for its numbers
        return _as_object(block, rng)
    content = _damaged(text.encode("utf-8", "surrogatepass"), rng)
    path = folder / "config.json"
    path.write_bytes(content)
    return judged([partial(ds_compress.plan, _model(), path)], lambda place: _in_file(place, path))


def _in_file(place: str, path: Path) -> bool:
    """Whether it is below the block, a place in the file, or a key that stands there beside the block."""
    if place == ROOT or place.startswith((f"{ROOT}.", f"{ROOT}[", str(path))):
        return True
    key, text = place.split(".")[0], path.read_bytes().decode("utf-8", "replace")
    return f'"{key}' in text or json.dumps(key)[:-1] in text


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """The file as it is, or with an accident."""
    at = rng.randrange(len(content) + 1)
    what = rng.choice(("none", "none", "truncate", "flip", "insert", "double", "encoding", "number"))
    if what == "truncate":
        return content[:at]
    if what == "flip" and at < len(content):
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if what == "insert":
        bits = (
            b"\0",
            b"{",
            b"}",
            b"]",
            b'"',
            b",",
            b"\\u",
            b"\\ud800",
            b"\xff",
            b"NaN",
            b"//",
            b"/*",
            b"[" * 3000,
        )
        return content[:at] + rng.choice(bits) + content[at:]
    if what == "double":
        end = rng.randrange(at, len(content) + 1)
        return content[:end] + content[at:end] + content[end:]
    if what == "encoding":
        text = content.decode("utf-8", "replace")
        return text.encode(
            rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7", "cp037", "utf-16-le")), "replace"
        )
    numbers = list(re.finditer(rb"\b\d+(\.\d+)?\b", content))
    if what == "number" and numbers:
        found = rng.choice(numbers)
        odd = rng.choice(
            (b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 5000, b"0x10", b"01", b".5", b"1_000")
        )
        return content[: found.start()] + odd + content[found.end() :]
    return content


# -- the row -------------------------------------------------------------------------------------------


def trials(rng: random.Random) -> list[Trial]:
    """Those by hand, then the mutations."""
    made = [
        Trial(f"block: {name}", partial(_try_block, block, path)) for name, block, path in _blocks_by_hand()
    ]
    made += [Trial(f"file: {name}", partial(_try_text, text, ok)) for name, text, ok in _texts_by_hand()]
    made += [Trial(f"file: {name}", partial(_try_path, name)) for name in ("a folder", "missing", "a\0b")]
    return [*made, *(Trial(f"mutation {n}", _Mutation(n, rng.getrandbits(64))) for n in range(MUTATIONS))]


def _try_block(block: Any, expected: str, folder: Path) -> Verdict:
    model = _model()
    calls = [lambda: ds_compress.parse_config(block), lambda: ds_compress.plan(model, {ROOT: block})]
    seen: list[str] = []

    def is_place(path: str) -> bool:
        seen.append(path)
        return _below_root(path, block)

    verdict = judged(calls, is_place)
    if verdict.passed and expected and not any(path.startswith(expected) for path in seen):
        return Verdict(False, f"{verdict.kind}, not at its place", f"{expected} is not among {seen[:5]}")
    return verdict


def _try_text(content: bytes, may_be_accepted: bool, folder: Path) -> Verdict:
    path = folder / "config.json"
    path.write_bytes(content)
    verdict = judged([partial(ds_compress.plan, _model(), path)], lambda place: _in_file(place, path))
    if verdict.kind == "accepted" and not may_be_accepted:
        return Verdict(False, "accepted a broken file", repr(content[:80]))
    return verdict


def _try_path(name: str, folder: Path) -> Verdict:
    path = str(folder) if name == "a folder" else f"{folder}/{name}"
    return judged([partial(ds_compress.plan, _model(), path)], lambda place: place.startswith(path))
