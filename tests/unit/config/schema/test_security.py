"""`security`: what may stand there; and a key itself, anywhere in the JSON, is not shown."""

from __future__ import annotations

import pytest

from ds_compress import ConfigError, parse_config
from ds_compress.config.schema.enabled import idle_lines
from ds_compress.secure.required import requires_signatures, trusts_pickle

PEM = "-----BEGIN PRIVATE KEY-----\nAbCdEfKhIjKlMnOpQrSt\n-----END PRIVATE KEY-----\n"
IDENTITY = "AGE-SECRET-KEY-1QQPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"


def test_defaults() -> None:
    config = parse_config({"security": {"public_key": "release.pub"}})
    assert config.security is not None and config.security.verify == "require"
    assert requires_signatures(config) and not trusts_pickle(config)
    assert not requires_signatures(parse_config({})) and not trusts_pickle(parse_config({}))
    off = parse_config({"security": {"verify": "off", "trust_pickle": True}})
    assert not requires_signatures(off) and trusts_pickle(off)


@pytest.mark.parametrize(
    ("block", "path", "allowed"),
    [
        ({}, "public_key", "a path or env:NAME"),
        ({"verify": "require"}, "public_key", "a path or env:NAME"),
        ({"verify": "off", "public_key": "a"}, "public_key", 'nothing, unless "verify" is "require"'),
        ({"verify": "warn", "public_key": "a"}, "verify", '"require" or "off"'),
        ({"public_key": ""}, "public_key", "the path of a key file, or env:NAME; never a key itself"),
        ({"public_key": "a", "trust_pickle": "yes"}, "trust_pickle", "true or false"),
    ],
)
def test_what_is_refused(block: dict[str, object], path: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"security": block})
    (problem,) = caught.value.problems
    assert (problem.path, problem.allowed) == (f"compression_training.security.{path}", allowed)


@pytest.mark.parametrize("secret", [PEM, IDENTITY, IDENTITY.lower()])
@pytest.mark.parametrize(
    "place", ["public_key", "verify", "private_key", "trust_pickle", "block", "seed", "deep"]
)
def test_a_key_is_never_shown(secret: str, place: str) -> None:
    security = {"public_key": "release.pub"}
    block: dict[str, object] = {"security": security}
    if place == "block":
        block = {"security": secret}
    elif place == "seed":
        block = {"seed": {"keys": [secret]}}
    elif place == "deep":
        block = {"sparse_pruning": {"shared_parameters": {"excluded_modules": secret}}}
    else:
        security[place] = secret
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    for part in ("AbCdEfKhIj", IDENTITY[16:30], IDENTITY[16:30].lower()):
        assert part not in str(caught.value)


def test_alone_it_trains_a_model_that_is_not_compressed() -> None:
    (line,) = idle_lines(parse_config({"security": {"public_key": "a"}}))
    assert "nothing but security is in it, and the model trains uncompressed" in line
