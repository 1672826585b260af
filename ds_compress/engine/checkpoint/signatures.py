"""Checkpoints of a run whose JSON says `"security": {"verify": "require"}`: signed, or nothing of them is read."""

from __future__ import annotations

from pathlib import Path

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.engine.checkpoint import tags
from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.manifest import FILE_NAME
from ds_compress.secure import required
from ds_compress.secure.errors import SecurityError, TamperedError
from ds_compress.secure.signing import SIGNATURE

_OF_A_TRAINER = "trainer_state.json"


def signed_tag(
    root: Path, tag: str | None, config: CompressionConfig, processes: Processes, pointer: str = tags.LATEST
) -> str | None:
    """The tag to load, whose signature is good; `tag` itself where the JSON asks for none. A collective.

    Only the file `pointer` is read before. No other tag is taken where this one is refused: whoever can damage the
    newest checkpoint would choose an older one so.

    Raises:
        TamperedError: in every process: the tag is not what the owner of `security.public_key` signed.
        KeyUnavailableError: likewise, where that key is missing.
    """
    if not required.requires_signatures(config):
        return tag
    own: str | Exception | None = None
    if processes.leads:
        try:
            own = _checked(root, tag, config, pointer)
        except (SecurityError, tags.CheckpointError) as error:
            own = error
    everyone = processes.gather(own)
    failure = next((told for told in everyone if isinstance(told, Exception)), None)
    if failure is not None:
        raise failure
    found: str | None = everyone[0]
    return found


def _checked(root: Path, tag: str | None, config: CompressionConfig, pointer: str) -> str | None:
    named = tag if tag is not None else tags.tag_named_in(root, pointer)
    if not named:
        if any(next(root.glob(files), None) for files in ("*/*model_states.pt", f"*/{FILE_NAME}", "*/zero")):
            raise TamperedError(
                f"{root / pointer} names no checkpoint, and security.verify lets no other be chosen"
            )
        return None
    required.require(_signed_part(root, named), config)
    return named


def _signed_part(root: Path, tag: str) -> Path:
    """What has the signature that covers the tag: the tag's folder, or else the whole folder of checkpoints.

    A Trainer reads files of its own beside the tag: its folder is signed whole.
    """
    whole = not (root / tag / SIGNATURE).exists() and (root / SIGNATURE).exists()
    return root if whole or (root / _OF_A_TRAINER).exists() else root / tag
