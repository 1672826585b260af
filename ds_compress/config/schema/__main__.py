"""`python -m ds_compress.config.schema`: writes the JSON schema that the package ships, or checks it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ds_compress.config.schema.compression_training import SCHEMA_FILE, schema_text, write_schema


def main(arguments: Sequence[str]) -> int:
    """Writes the schema file; with --check says whether it is current instead (exit status 1 if not)."""
    if list(arguments) not in ([], ["--check"]):
        print("usage: python -m ds_compress.config.schema.compression_training [--check]", file=sys.stderr)
        return 2
    if not arguments:
        write_schema()
        print(SCHEMA_FILE)
        return 0
    is_current = SCHEMA_FILE.is_file() and SCHEMA_FILE.read_text(encoding="utf-8") == schema_text()
    if not is_current:
        print(
            f"{SCHEMA_FILE} is stale: run python -m ds_compress.config.schema.compression_training",
            file=sys.stderr,
        )
    return 0 if is_current else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
