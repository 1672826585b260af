"""`python -m ds_compress.config.schema`: writes the JSON schema that the package ships, or checks it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ds_compress.config.schema import compression_training as schema


def main(arguments: Sequence[str]) -> int:
    """Writes the schema file; with --check says whether it is current instead (exit status 1 if not)."""
    if list(arguments) not in ([], ["--check"]):
        print("usage: python -m ds_compress.config.schema [--check]", file=sys.stderr)
        return 2
    if not arguments:
        schema.write_schema()
        print(schema.SCHEMA_FILE)
        return 0
    is_current = (
        schema.SCHEMA_FILE.is_file()
        and schema.SCHEMA_FILE.read_text(encoding="utf-8") == schema.schema_text()
    )
    if not is_current:
        print(
            f"{schema.SCHEMA_FILE} is stale: run python -m ds_compress.config.schema",
            file=sys.stderr,
        )
    return 0 if is_current else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
