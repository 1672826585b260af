"""Whatever README, docs or a message of ours calls `ds_compress.something` is there after `import ds_compress`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ds_compress
from ds_compress import public

PACKAGE = Path(ds_compress.__file__).parent
REPOSITORY = Path(__file__).parents[2]
NAME = re.compile(r"(?<![\w./])ds_compress((?:\.[A-Za-z_]\w*)+)(?=\()")
RUN_AS_MODULE = re.compile(r"-m ds_compress[\w.]*|--module ds_compress[\w.]*|python -m [\w.]+")


def named_in(text: str) -> Iterator[str]:
    yield from (match[1][1:] for match in NAME.finditer(RUN_AS_MODULE.sub("", text)))


def texts() -> Iterator[tuple[str, str]]:
    for page in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md")]:
        yield page.name, page.read_text()
    for source in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield str(source.relative_to(PACKAGE)), node.value


def test_the_package_and_what_fills_it_have_the_same_names() -> None:
    by_themselves = {"CompressionCallback", "DistillationTrainer", "__version__"}
    assert set(ds_compress.__all__) - by_themselves == set(public.__all__)


def test_every_function_that_is_named_is_there_after_one_import() -> None:
    names = {name: where for where, text in texts() for name in named_in(text)}
    assert {"export", "initialize", "hf.merge_and_unload", "plan"} <= set(names)
    program = (
        "import ds_compress, operator, sys\nfor name in sys.argv[1:]: operator.attrgetter(name)(ds_compress)"
    )
    every = [*names, "run.leave_process_group", "ops.functional.mask_pack", "compat.init_compression"]
    done = subprocess.run(
        [sys.executable, "-c", program, *every], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_each_alone() -> None:
    """The order of access does not matter: hf and run in processes of their own."""
    for name in (
        "hf.merge_and_unload",
        "run.leave_process_group",
        "compat.init_compression",
        "ops.functional",
    ):
        program = f"import ds_compress; ds_compress.{name}"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-500:]


def test_dir_lists_them() -> None:
    assert {"hf", "run", "compat", "export", "CompressionCallback"} <= set(dir(ds_compress))
