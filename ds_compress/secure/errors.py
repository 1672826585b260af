"""What goes wrong with signed and encrypted folders. No message holds a key or a password."""

from __future__ import annotations


class SecurityError(RuntimeError):
    """Nothing of the folder was used; the message names the folder, the file and what to do."""


class NotInstalledError(ImportError):
    """The extra `secure` is not installed, or not all of it; nothing was verified. The commands exit with 2."""


class TamperedError(SecurityError):
    """A folder is not what its signer signed, or not signed by whom it should be. The commands exit with 1."""


class KeyUnavailableError(SecurityError):
    """A key is missing, cannot be read, or does not open what it should. The commands exit with 3."""


class KeyLockedError(KeyUnavailableError):
    """A key is locked by a password, which was not given."""
