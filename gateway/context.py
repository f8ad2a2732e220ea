"""What is known about a request at the door. Made once, never changed: later steps return what they learn."""

from __future__ import annotations

from dataclasses import dataclass

from cache.control import CacheControl
from gateway.snapshot import Snapshot
from policies.tenant import Tenant


@dataclass(frozen=True, slots=True)
class RequestContext:
    request_id: str
    tenant: Tenant
    snapshot: Snapshot
    """The policy this request lives under, from start to end, whatever is reloaded meanwhile."""
    started_at: float
    """When its head was read; `time.monotonic`, which is also the event loop's clock, seconds."""
    deadline: float
    """Until when everything must be over; event-loop clock, seconds."""
    cache_control: CacheControl
