"""`security`: what has to be signed before it is read, and whether pickles are trusted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from ds_compress.config.schema.fields import Conflict, Description, StrictBool, StrictModel, without_effect


def _no_key_itself(value: Any) -> Any:
    if "\n" in value or "PRIVATE KEY" in value.upper() or "AGE-SECRET-KEY" in value.upper():
        raise PydanticCustomError("key_itself", "a path or env:NAME, not a key")
    return value


KeySource = Annotated[
    str,
    Field(min_length=1),
    AfterValidator(_no_key_itself),
    Description("the path of a key file, or env:NAME; never a key itself"),
]


class SecurityConfig(StrictModel):
    """Refuses what nobody has signed before anything of it is read: teachers, checkpoints, teacher caches."""

    verify: Literal["require", "off"] = Field(
        default="require",
        description=(
            "require: teachers, teacher caches and checkpoints are verified before anything of them is read, and "
            "refused unless public_key's owner has signed them; off: they are not looked at."
        ),
    )
    public_key: KeySource | None = Field(
        default=None,
        description="Whose signatures are accepted: the path of a public key (PEM), or env:NAME.",
    )
    trust_pickle: StrictBool = Field(
        default=False,
        description=(
            "Whether the pickles of a DeepSpeed checkpoint may name any Python object, and so run any code. Without it "
            "they may name those of a short list only."
        ),
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.verify == "require" and self.public_key is None:
            yield Conflict(
                ("public_key",),
                None,
                "a path or env:NAME",
                'add the signer\'s "public_key", or say "verify": "off"',
            )
        yield from without_effect(self, "public_key", self.verify == "off", '"verify" is "require"')
