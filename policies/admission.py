"""The first gate: how often a tenant may ask at all, cache hits included.

`Admission` is the seam; `Unlimited` lets everybody in. Request-rate limits will stand behind it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Protocol

import msgspec

from policies.tenant import Tenant


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """A request that may go on, and what is left of its tenant's request rate (None: unlimited)."""

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_s: float | None = None


class Admission(Protocol):
    def admit(self, tenant: Tenant) -> Awaitable[Admitted]:
        """Begin: the question is on its way when this returns, so that it shares a tick with the cache lookup.

        Awaiting it raises `QuotaExceeded` for a tenant that asks too often.
        """


class Unlimited:
    def admit(self, tenant: Tenant) -> Awaitable[Admitted]:
        return _ADMITTED


class _AtOnce:
    """An awaitable that is done already."""

    def __await__(self) -> Generator[None, None, Admitted]:
        yield from ()
        return Admitted()


_ADMITTED = _AtOnce()
