"""Which backends to ask last, and how many retries the traffic can afford."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from backends.errors import BackendError


@dataclass(slots=True)
class _Record:
    failures: int = 0
    ejections: int = 0
    ejected_until: float = 0.0
    probes: int = 0
    """Attempts under way that decide: where nobody else is left there may be several."""


@dataclass(slots=True)
class Ejections:
    """Backends that failed `threshold` times in a row are *ejected*: asked only when nobody else is left.

    Only faults of the upstream count, never a client's. What counts as well is an answer that breaks off: the row ends
    with an answer that came to its end, not with one that began. An ejection lasts `base_s`, doubled each time
    up to `cap_s`; when it is over, one request probes the backend (`probe_due`, `began`) while the others still prefer
    the rest. Since an ejected backend is asked last rather than never, the last one standing is never out of reach.
    """

    now: Callable[[], float]
    threshold: int = 5
    base_s: float = 5.0
    cap_s: float = 60.0
    _records: dict[str, _Record] = field(default_factory=dict)

    def order(self, names: Sequence[str]) -> list[int]:
        """Indices of `names`, ejected ones last, otherwise in the order given."""
        return sorted(range(len(names)), key=lambda index: self.is_ejected(names[index]))

    def is_ejected(self, name: str) -> bool:
        record = self._records.get(name)
        if record is None or record.ejections == 0:
            return False
        return record.probes > 0 or self.now() < record.ejected_until

    def among(self, names: Sequence[str]) -> set[int]:
        """Indices of the ejected of `names`."""
        if not self._records:
            return set()
        return {index for index, name in enumerate(names) if self.is_ejected(name)}

    def probe_due(self, names: Sequence[str]) -> int | None:
        """The index of a backend whose ejection is over and that nobody probes yet; None where there is none."""
        if not self._records:
            return None
        for index, name in enumerate(names):
            record = self._records.get(name)
            if record is not None and record.ejections and not self.is_ejected(name):
                return index
        return None

    def began(self, name: str) -> None:
        """An attempt begins; after an ejection it is the probe that decides."""
        record = self._records.get(name)
        if record is not None and record.ejections and self.now() >= record.ejected_until:
            record.probes += 1

    def committed(self, name: str) -> None:
        """An attempt began to answer, which ends an ejection."""
        record = self._records.get(name)
        if record is not None:
            record.probes = 0
            record.ejections = 0
            record.ejected_until = 0.0

    def completed(self, name: str) -> None:
        """An answer came to its end."""
        self._records.pop(name, None)

    def failed(self, name: str, error: BackendError) -> bool:
        """An attempt failed. Returns whether this ejected the backend."""
        if not error.upstream_fault:
            self.abandoned(name)
            return False
        record = self._records.setdefault(name, _Record())
        if not record.probes:
            if self.now() < record.ejected_until:
                return False  # one of many that were under way: a single outage is a single ejection
            record.failures += 1
            if record.failures < self.threshold:
                return False
        record.probes = 0
        record.failures = 0
        record.ejections += 1
        record.ejected_until = self.now() + min(self.base_s * 2 ** (record.ejections - 1), self.cap_s)
        return True

    def forget(self, name: str) -> None:
        """Another backend goes by this name from now on."""
        self._records.pop(name, None)

    def abandoned(self, name: str) -> None:
        """An attempt ended without saying anything about the backend, such as by its client leaving."""
        record = self._records.get(name)
        if record is not None and record.probes:
            record.probes -= 1


@dataclass(slots=True)
class RetryBudget:
    """Retries as a share of requests, so that a failing engine is not stormed by its own clients.

    Every request earns `ratio` of a retry, up to `cap`; every retry spends one.
    """

    ratio: float
    cap: float = 10.0
    _saved: float = field(default=10.0)

    def earn(self) -> None:
        self._saved = min(self._saved + self.ratio, self.cap)

    def spend(self) -> bool:
        """Whether one more retry may be made; it is paid for then."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
