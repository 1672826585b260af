"""INFO lines are seen without anybody's asking: once, from process 0, on standard error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SAY = "import logging; logger = logging.getLogger('ds_compress'); "


def stderr_of(code: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert "said" not in done.stdout
    return [line for line in done.stderr.splitlines() if "said" in line]


SET_UP = f"from ds_compress import log; log.set_up(); log.set_up(); {SAY}"


@pytest.fixture(scope="module")
def package() -> str:
    """Without the rest of the package, whose imports take seconds."""
    return (
        "import sys, types, pathlib; package = types.ModuleType('ds_compress'); "
        f"package.__path__ = [{os.path.dirname(__import__('ds_compress').__file__)!r}]; "
        "sys.modules['ds_compress'] = package; "
    )


def test_info_is_shown_once(package: str) -> None:
    assert stderr_of(package + SET_UP + "logger.info('ds_compress: said %d', 3)") == ["ds_compress: said 3"]


def test_a_warning_is_called_one(package: str) -> None:
    assert stderr_of(package + SET_UP + "logger.warning('said')") == ["ds_compress: warning: said"]


def test_other_processes_are_silent_but_for_errors(package: str) -> None:
    code = package + SET_UP + "logger.warning('said 1'); logger.error('said 2'); "
    code += "logger.warning('said 3', extra={'every_process': True})"
    assert stderr_of(code, RANK="1") == ["ds_compress: error: said 2", "ds_compress: warning: said 3"]


def test_the_environment_sets_the_level(package: str) -> None:
    code = (
        package
        + SET_UP
        + "logger.debug('said debug'); logger.info('said info'); logger.warning('said warning')"
    )
    assert len(stderr_of(code, DS_COMPRESS_LOG_LEVEL="debug")) == 3
    assert len(stderr_of(code, DS_COMPRESS_LOG_LEVEL="WARNING")) == 1


def test_an_application_that_configured_logging_gets_them_its_way_and_once(package: str) -> None:
    code = (
        package
        + "import logging; logging.basicConfig(format='app %(message)s'); "
        + SET_UP
        + "logger.info('said')"
    )
    assert stderr_of(code) == ["app said"]


def test_the_package_sets_it_up() -> None:
    assert stderr_of("import ds_compress; " + SAY + "logger.info('said')") == ["ds_compress: said"]


FAILS = (
    "import ds_compress; from ds_compress.errors import ConfigError, Problem; "
    "raise ConfigError([Problem('a.b', 'said', 'c')])"
)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_prints_the_traceback(rank: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RANK": rank},
    )
    assert done.returncode == 1
    if rank == "0":
        assert "Traceback" in done.stderr and "got:     said" in done.stderr
    else:
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("ds_compress")]
        assert line.endswith("(1 problem, the first at a.b)")
