"""One root secret, and everything derived from it: key hashes, each tenant's cache secret, what later purposes need.

Subkeys are HKDF-SHA256 of the root secret, one per purpose and version, so that none tells anything about another. A
root secret is replaced with an overlap: the new one becomes `current`, the old one stays in `previous` until no key
hashed with it is in use (`KeyRecord.root_secret_id` says which are). Cache secrets follow `current` alone: after a
rotation the caches refill.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

MIN_ROOT_SECRET_BYTES = 32
KEY_PREFIX_CHARS = 10

_SUBKEY_BYTES = 32
_KEY_BYTES = 20
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_KEY_TEXT = re.compile(rb"fb-(?:admin-)?[0-9A-Za-z]{27}")


class RootSecretTooShort(ValueError):
    """A root secret has fewer than `MIN_ROOT_SECRET_BYTES` bytes, or there is none."""


class Purpose(StrEnum):
    """What a subkey is for. A changed use of a subkey is a new version, and thereby another subkey."""

    KEY_HASHING = "key-hashing/v1"
    TENANT_CACHE = "tenant-cache/v1"
    ROOT_SECRET_ID = "root-secret-id/v1"  # noqa: S105  the name of a purpose, not a secret


class RootSecret:
    """The secret this gateway makes keys with, and those it still recognises keys of.

    Each at least `MIN_ROOT_SECRET_BYTES` long, else `RootSecretTooShort`, and random: HKDF stretches nothing.
    """

    __slots__ = ("_current", "_key_hashing", "id")

    def __init__(self, current: bytes, previous: tuple[bytes, ...] = ()) -> None:
        if any(len(root) < MIN_ROOT_SECRET_BYTES for root in (current, *previous)):
            raise RootSecretTooShort(f"a root secret needs at least {MIN_ROOT_SECRET_BYTES} bytes")
        self._current = current
        self._key_hashing = tuple(_derive(root, Purpose.KEY_HASHING) for root in (current, *previous))
        self.id = _derive(current, Purpose.ROOT_SECRET_ID)[:8].hex()
        """16 hex digits that name the current secret and tell nothing about it."""

    @classmethod
    def parse(cls, text: bytes) -> RootSecret:
        """Secrets as a file or a variable holds them: separated by white space, the current one first."""
        roots = text.split()
        if not roots:
            raise RootSecretTooShort("the root secret is empty")
        return cls(roots[0], tuple(roots[1:]))

    def subkey(self, purpose: Purpose, context: bytes = b"") -> bytes:
        """32 bytes that only the current root secret, `purpose` and `context` together yield."""
        return _derive(self._current, purpose, context)

    def tenant_cache_secret(self, tenant_id: str) -> bytes:
        """The HMAC key of one tenant's cache keys, 32 bytes."""
        return self.subkey(Purpose.TENANT_CACHE, tenant_id.encode())

    def key_hash(self, key: bytes) -> bytes:
        """What is stored of a new key: HMAC-SHA256, 32 bytes."""
        return hmac.digest(self._key_hashing[0], key, "sha256")

    def key_hashes(self, key: bytes) -> tuple[bytes, ...]:
        """Every hash a presented key may be stored under, the current secret's first."""
        return tuple(hmac.digest(subkey, key, "sha256") for subkey in self._key_hashing)

    def __repr__(self) -> str:
        return f"RootSecret(id={self.id!r}, previous={len(self._key_hashing) - 1})"


def _derive(root: bytes, purpose: Purpose, context: bytes = b"") -> bytes:
    # No purpose contains a NUL, so no two pairs of purpose and context join to the same bytes.
    label = b"forebay/" + purpose.encode() + b"\0" + context
    return HKDF(algorithm=SHA256(), length=_SUBKEY_BYTES, salt=None, info=label).derive(root)


def root_secret_file(path: Path, *, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> RootSecret:
    """The root secret in the file at `path`; one that is not there yet is made first, readable by its owner only.

    Processes that start at once agree on one secret, and none ever reads half of it. Blocks on the disk; raises OSError
    where the file cannot be read or made (making it takes a file system with hard links), `RootSecretTooShort` where
    there is less in it than a secret.
    """
    if not path.exists():
        _create_exclusively(path, random_bytes(MIN_ROOT_SECRET_BYTES).hex().encode() + b"\n")
    return RootSecret.parse(path.read_bytes())


def _create_exclusively(path: Path, content: bytes) -> None:
    """Give `path` this content, complete and on disk before it has that name; leave one that exists as it is."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(draft)
    except FileExistsError:
        return  # another process was first: its secret is the secret
    finally:
        Path(draft).unlink()


def new_key(*, admin: bool, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> str:
    """A new API key: `fb-` or `fb-admin-`, then 160 random bits in base62 (27 characters)."""
    return ("fb-admin-" if admin else "fb-") + base62(random_bytes(_KEY_BYTES))


def looks_like_key(presented: bytes) -> bool:
    """Whether `new_key` could have made this. What it could not have made need not be looked up anywhere."""
    return _KEY_TEXT.fullmatch(presented) is not None


def base62(data: bytes) -> str:
    """Digits and letters for `data`: all texts for one length are equally long, and no two data share one."""
    number, text = int.from_bytes(data, "big"), ""
    for _ in range(_base62_chars(len(data))):
        number, digit = divmod(number, 62)
        text = _BASE62[digit] + text
    return text


def _base62_chars(length_bytes: int) -> int:
    chars = 0
    while 62**chars < 256**length_bytes:
        chars += 1
    return chars
