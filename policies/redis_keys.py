"""Every key Forebay writes to Redis, in one place.

    fb1:t:<tenant>:exact:<digest>                one exact answer               (cache)
    fb1:t:<tenant>:epoch                         raised to forget a tenant's answers
    fb1:{qNN}:<organisation>:<kind>[:<part>]...  a counter or lease of the ledger (state)
    fb1:generation                               missing after the state was lost

`fb1` is the version of this grammar: releases that differ in it share a Redis without meeting in a key. Whatever
an id holds is %-escaped, so `:`, `{` and `}` only ever mean what they mean above and two different keys cannot be spelt
alike. A tenant is a required argument wherever a tenant owns the key.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from urllib.parse import quote

_VERSION = "fb1"
_LEDGER_SLOTS = 64
_PLAIN = re.compile(r"[A-Za-z0-9._~-]+")


def exact_entry_key(tenant_id: str, digest_hex: str) -> str:
    """The entry of one tenant's request in the exact cache."""
    return f"{_VERSION}:t:{_escape(tenant_id)}:exact:{_escape(digest_hex)}"


def epoch_key(tenant_id: str) -> str:
    """The tenant's cache epoch: what was stored under another value is never found again."""
    return f"{_VERSION}:t:{_escape(tenant_id)}:epoch"


def ledger_key(organisation_id: str, kind: str, *parts: str) -> str:
    """A counter or lease of an organisation, its tenants and their keys; all of them share one Cluster slot."""
    rest = ":".join(_escape(part) for part in (organisation_id, kind, *parts))
    return f"{_VERSION}:{{q{ledger_slot(organisation_id):02d}}}:{rest}"


def generation_key() -> str:
    """Set once the counters have been rebuilt from the record; missing after a restart or a FLUSHALL."""
    return f"{_VERSION}:generation"


def ledger_slot(organisation_id: str) -> int:
    """The organisation's hash tag number in [0, 64), the same in every process and release of this grammar."""
    return int.from_bytes(blake2b(organisation_id.encode(), digest_size=8).digest(), "big") % _LEDGER_SLOTS


def _escape(part: str) -> str:
    """`part` without separators. Raises ValueError for an empty one, and for one that UTF-8 cannot write."""
    if _PLAIN.fullmatch(part):
        return part  # on the hot path, and six times faster than finding out by quoting
    if not part:
        raise ValueError("an id in a key must not be empty")
    return quote(part, safe="")
