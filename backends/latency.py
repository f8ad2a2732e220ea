"""How long each backend takes to its first token, as its answers of late have shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

HALF_LIFE_S = 10.0
LEAST_WEIGHT = 0.1
FAILED_S = 1.0
FORGOTTEN_BELOW_S = 0.0005


@dataclass(slots=True)
class FirstTokenTimes:
    """The average time to the first content token by backend, seconds, in which what is newer weighs more.

    An average halves in `half_life_s` that bring no reading, and what is left of it is what a new reading is averaged
    with (the reading weighs a tenth at least): so a backend that was slow is tried again in time. A failed attempt
    makes the average a second at least, so that a backend that fails fast does not look fast.

    Why so: with replicas of uneven speed, 10 s gave the shortest p99 of 5, 10 and 20 s, and an average that jumps to
    each peak (Finagle's peak EWMA) a longer one, since one long prompt is enough to make a peak.
    """

    now: Callable[[], float]
    half_life_s: float = HALF_LIFE_S
    _averages: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By backend: the average in seconds, and when it was that."""

    def of(self, name: str) -> float | None:
        """The average now; None where nothing is known, or what was known has faded away."""
        return self.among((name,))[0]

    def among(self, names: Sequence[str]) -> list[float | None]:
        """The averages of several backends."""
        if not self._averages:
            return [None] * len(names)
        now, get = self.now(), self._averages.get
        return [_faded(known, now, self.half_life_s) if (known := get(name)) is not None else None for name in names]

    def committed(self, name: str, elapsed_s: float) -> None:
        """A stream brought its first content after `elapsed_s`. Whole answers are not told here: they say nothing."""
        now = self.now()
        known = self._averages.get(name)
        if known is not None:
            left = 2.0 ** ((known[1] - now) / self.half_life_s)
            weight = max(1.0 - left, LEAST_WEIGHT)
            elapsed_s = weight * elapsed_s + (1.0 - weight) * known[0]
        self._averages[name] = (elapsed_s, now)

    def failed(self, name: str, elapsed_s: float) -> None:
        """An attempt failed, or was given up, after `elapsed_s` without a first token."""
        self._averages[name] = (max(elapsed_s, FAILED_S, self.of(name) or 0.0), self.now())

    def abandoned(self, name: str, elapsed_s: float) -> None:
        """A client did not wait any longer, after `elapsed_s`: news only where that is longer than the average."""
        if elapsed_s > (self.of(name) or 0.0):
            self.committed(name, elapsed_s)

    def forget(self, name: str) -> None:
        """Another backend goes by this name from now on."""
        self._averages.pop(name, None)


def _faded(known: tuple[float, float], now: float, half_life_s: float) -> float | None:
    average_s = known[0] * 2.0 ** ((known[1] - now) / half_life_s)
    return average_s if average_s >= FORGOTTEN_BELOW_S else None
