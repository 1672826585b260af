"""`ds_compress.ops.functional`: every op, typed and documented, with an example that runs on both implementations."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator

import pytest
import torch

from ds_compress.ops import Preference, functional, library, prefer, reference, schemas


@pytest.fixture(autouse=True, params=[Preference.REFERENCE, Preference.NATIVE])
def preference(request: pytest.FixtureRequest) -> Iterator[None]:
    before = library._default
    prefer(request.param)
    yield
    library._default = before


def test_it_has_every_op_and_dir_lists_them() -> None:
    assert set(functional.__all__) == {*schemas.SCHEMAS, "payload_bytes"}
    assert dir(functional) == sorted(functional.__all__)


@pytest.mark.parametrize("name", sorted(schemas.SCHEMAS))
def test_its_example_runs(name: str) -> None:
    function = getattr(functional, name)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(function, name, globs={"torch": torch, "F": functional})
    assert example.examples, "no example"
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(schemas.SCHEMAS))
def test_it_is_typed_and_takes_what_the_op_takes(name: str) -> None:
    signature = inspect.signature(getattr(functional, name))
    assert signature == inspect.signature(reference.IMPLEMENTATIONS[name])
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    schema = getattr(torch.ops.ds_compress, name).default._schema
    assert list(signature.parameters) == [argument.name for argument in schema.arguments]


def test_the_module_example_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(functional, "functional", globs={})
    assert doctest.DocTestRunner().run(example).failed == 0


def test_it_follows_the_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(library._reference, "mask_pack", lambda keep: called.append(keep))
    prefer(Preference.REFERENCE)
    functional.mask_pack(torch.ones(3, dtype=torch.bool))
    assert len(called) == 1
