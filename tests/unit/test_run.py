from __future__ import annotations

import pytest

from ds_compress.run import split_arguments


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--local_rank=1", "train.py", "--lr", "1"], ("train.py", False, ["--local_rank=1", "--lr", "1"])),
        (["--local_rank", "1", "train.py"], ("train.py", False, ["--local_rank", "1"])),
        (["train.py", "--local_rank=9"], ("train.py", False, ["--local_rank=9"])),
        (
            ["--local-rank=0", "-m", "pkg.train", "-m", "x"],
            ("pkg.train", True, ["--local-rank=0", "-m", "x"]),
        ),
    ],
)
def test_the_rank_is_handed_on_behind_the_script(
    argv: list[str], expected: tuple[str, bool, list[str]]
) -> None:
    assert split_arguments(argv) == expected


@pytest.mark.parametrize("argv", [[], ["--local_rank=0"], ["-m"]])
def test_no_script_is_a_usage_error(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="usage"):
        split_arguments(argv)
