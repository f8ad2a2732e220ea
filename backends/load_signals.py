"""What an engine says about its load: read from its Prometheus metrics, kept fresh by polling them.

Nothing here ever fails a request: a metrics page that is away, slow or nonsense makes a reading grow old, and then
unknown.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from weakref import WeakValueDictionary

import aiohttp
import msgspec
import yarl

from backends.backend import Load
from backends.tls import ClientTls, ConnectionSettings

MAX_METRICS_BYTES = 2 * 1024 * 1024
"""How much of a page is read. vLLM with two data-parallel ranks writes some 450 kB."""

POLL_EVERY_S = 0.5
POLL_AT_MOST_EVERY_S = 10.0
"""How far a page that fails is left alone: each failure doubles the pause."""
READ_WITHIN_S = 1.0
STALE_AFTER_S = 5.0
"""When a reading counts as unknown. Above a poll that came late because the engine was busy, below a restart."""

_PENDING = b"nv_inference_pending_request_count"
_TRT_REQUESTS = b"nv_trt_llm_request_metrics"
_TRT_KV = b"nv_trt_llm_kv_cache_block_metrics"

_QUEUED = (
    b"llamacpp:requests_deferred",
    b"vllm:num_requests_waiting",
    b"trtllm_num_requests_waiting",
    b"sglang:num_queue_reqs",
    b"tgi_queue_size",
)
_RUNNING = (
    b"llamacpp:requests_processing",
    b"vllm:num_requests_running",
    b"trtllm_num_requests_running",
    b"sglang:num_running_reqs",
    b"tgi_batch_current_size",
)
_KV_RATIO = (
    b"llamacpp:kv_cache_usage_ratio",
    b"vllm:kv_cache_usage_perc",
    b"vllm:gpu_cache_usage_perc",
    b"trtllm_kv_cache_utilization",
    b"sglang:token_usage",
)
_NAMES = (_PENDING, _TRT_REQUESTS, _TRT_KV, *_QUEUED, *_RUNNING, *_KV_RATIO)

# The newline in front is what makes it fast: the engine of `re` jumps from line to line by it (460 µs for 450 kB of
# vLLM's, a fifth of what `^` takes).
_SERIES = re.compile(rb"\n(" + b"|".join(map(re.escape, _NAMES)) + rb")(?=[{ \t])([^\n]*)")
_LABEL = re.compile(rb'([A-Za-z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?\s*')
_MODEL_LABELS = (b"model", b"model_name")
_KIND_LABELS = {_TRT_REQUESTS: b"request_type", _TRT_KV: b"kv_cache_block_type"}

_MOST = 1e9
"""A count above this is no count."""


class EngineSignals(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's load in its own words. None where it does not say."""

    queued: int | None = None
    """Requests that wait, of everybody."""
    running: int | None = None
    """Requests that it works on, of everybody."""
    kv_cache_ratio: float | None = None
    """How full its KV cache is, 0 to 1."""

    @property
    def says_anything(self) -> bool:
        return self != _SILENT


_SILENT = EngineSignals()


def read_signals(text: bytes, *, model: str | None) -> EngineSignals:
    """The load in a page of Prometheus text: of Triton, TensorRT-LLM, trtllm-serve, vLLM, SGLang, TGI or llama.cpp.

    Of a page with several models only `model`'s series count (every one with None). Where no series of a metric names
    it and all of them name one other model, that one's count: an ensemble's engine, or a model served under an alias.
    The series of one engine (versions, data-parallel ranks) are added up; of ratios the highest counts. What cannot be
    read is passed over. Only the first `MAX_METRICS_BYTES` are looked at. Never raises.

    Names and meanings: docs of Triton, TensorRT-LLM, vLLM, SGLang, TGI and llama.cpp; which of TensorRT-LLM's stand for
    queue, running and KV cache: the Kubernetes Gateway API inference extension's model server protocol.
    """
    series = _Series(text[:MAX_METRICS_BYTES], model)
    waiting = series.total(_TRT_REQUESTS, b"waiting")
    queued = [series.total(_PENDING, exact=True), waiting, *map(series.total, _QUEUED)]
    running = [_trt_running(series, waiting), *map(series.total, _RUNNING)]
    ratios = [ratio for ratio in (_trt_kv_ratio(series), *map(series.highest, _KV_RATIO)) if ratio is not None]
    return EngineSignals(
        queued=_sum(queued), running=_sum(running), kv_cache_ratio=min(max(ratios), 1.0) if ratios else None
    )


def _trt_running(series: _Series, waiting: float | None) -> float | None:
    scheduled, active = series.total(_TRT_REQUESTS, b"scheduled"), series.total(_TRT_REQUESTS, b"active")
    if scheduled is not None or active is None:
        return scheduled
    return max(active - (waiting or 0.0), 0.0)


def _trt_kv_ratio(series: _Series) -> float | None:
    fraction = series.highest(_TRT_KV, b"fraction")
    if fraction is not None:
        return fraction
    blocks, used, free = (series.total(_TRT_KV, kind) for kind in (b"max", b"used", b"free"))
    if not blocks:
        return None
    if used is not None:
        return used / blocks
    return None if free is None else max(1.0 - free / blocks, 0.0)


def _sum(counts: Sequence[float | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return round(sum(known)) if known else None


class _Series:
    """The series of interest of one page: values by metric (and kind, where one holds several) and by model."""

    def __init__(self, text: bytes, model: str | None) -> None:
        self._model = None if model is None else _escaped(model)
        self._values: dict[tuple[bytes, bytes], dict[bytes, list[float]]] = defaultdict(lambda: defaultdict(list))
        for name, rest in _SERIES.findall(b"\n" + text):
            labels, value = _labels_and_value(rest.strip())
            if value is not None and not labels.get(b"priority"):  # SGLang: parts of a total that it gives as well
                of = next((labels[label] for label in _MODEL_LABELS if label in labels), b"")
                self._values[name, labels.get(_KIND_LABELS.get(name, b""), b"")][of].append(value)

    def total(self, name: bytes, kind: bytes = b"", *, exact: bool = False) -> float | None:
        values = self._of_model(name, kind, exact)
        return sum(values) if values else None

    def highest(self, name: bytes, kind: bytes = b"") -> float | None:
        return max(self._of_model(name, kind, exact=False), default=None)

    def _of_model(self, name: bytes, kind: bytes, exact: bool) -> list[float]:
        by_model: Mapping[bytes, list[float]] = self._values.get((name, kind), {})
        if self._model is None:
            return [value for values in by_model.values() for value in values]
        if self._model in by_model or exact:
            return by_model.get(self._model, [])
        return next(iter(by_model.values())) if len(by_model) == 1 else []


def _labels_and_value(rest: bytes) -> tuple[dict[bytes, bytes], float | None]:
    """What stands behind a metric's name: `{label="value",...} 3.0 timestamp`, the labels and the time optional."""
    labels: dict[bytes, bytes] = {}
    if rest.startswith(b"{"):
        at = 1
        while (label := _LABEL.match(rest, at)) is not None:
            labels[label[1]] = label[2]
            at = label.end()
        if rest[at : at + 1] != b"}":
            return labels, None
        rest = rest[at + 1 :]
    words = rest.split(None, 1)
    try:
        value = float(words[0]) if words else math.nan
    except ValueError:
        return labels, None
    return labels, value if 0.0 <= value <= _MOST else None


def _escaped(label: str) -> bytes:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").encode("utf-8", "replace")


class MetricsUnreadable(Exception):
    """A metrics page could not be had; the message says why."""


class MetricsPage:
    """The metrics page at one URL, fetched once for all who read it. Raises ValueError for a bad URL.

    `session` gives the session to fetch with, `headers` go with every request, `tls` is how the engine is known.
    `clock` is in seconds, monotonic.
    """

    def __init__(
        self,
        url: str,
        session: Callable[[], aiohttp.ClientSession],
        *,
        headers: Mapping[str, str] | None = None,
        tls: ClientTls | None = None,
        within_s: float = READ_WITHIN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = yarl.URL(url)
        if not self.url.is_absolute() or self.url.scheme not in ("http", "https"):
            raise ValueError(f"{url!r} is no http(s) URL")
        self._session = session
        # Compressing a page costs the engine more than sending it costs the network.
        self._headers = {"User-Agent": "forebay", "Accept-Encoding": "identity", **(headers or {})}
        self._tls = tls
        self._within_s = within_s
        self._clock = clock
        self._turn = asyncio.Lock()
        self._fetched: tuple[float, bytes | MetricsUnreadable] | None = None

    async def text(self, *, max_age_s: float = 0.0) -> bytes:
        """The page as it was at most `max_age_s` ago, cut off after `MAX_METRICS_BYTES`. Raises `MetricsUnreadable`."""
        async with self._turn:
            if self._fetched is None or self._clock() - self._fetched[0] >= max_age_s:
                self._fetched = (self._clock(), await self._fetch())
            found = self._fetched[1]
        if isinstance(found, MetricsUnreadable):
            raise found
        return found

    async def _fetch(self) -> bytes | MetricsUnreadable:
        try:
            async with (
                asyncio.timeout(self._within_s),
                self._session().get(
                    self.url, headers=self._headers, allow_redirects=False, **await self._tls_settings()
                ) as response,
            ):
                if response.status != 200:
                    return MetricsUnreadable(f"HTTP {response.status}")
                return await _read(response)
        except TimeoutError:
            return MetricsUnreadable(f"no answer within {self._within_s:g} s")
        except Exception as error:  # noqa: BLE001 - a page that cannot be had is a fact, whatever the reason
            return MetricsUnreadable(str(error) or type(error).__name__)

    async def _tls_settings(self) -> ConnectionSettings:
        return {} if self._tls is None else await self._tls.settings()


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, up to the last line that is whole within the limit."""
    text = bytearray()
    while piece := await response.content.readany():
        text += piece
        if len(text) > MAX_METRICS_BYTES:
            response.close()
            return bytes(text[: text.rfind(b"\n", 0, MAX_METRICS_BYTES) + 1])
    return bytes(text)


class MetricsPages:
    """Pages by URL, so that two backends of one server fetch its page once. A page that nobody reads any more goes."""

    def __init__(self, session: Callable[[], aiohttp.ClientSession]) -> None:
        self._session = session
        self._pages: WeakValueDictionary[str, MetricsPage] = WeakValueDictionary()

    def page(self, url: str) -> MetricsPage:
        page = self._pages.get(url)
        if page is None:
            page = self._pages[url] = MetricsPage(url, self._session)
        return page


class LoadSignals:
    """Keeps the newest reading of one engine, and how old it is.

    `run` polls `page` every `every_s` seconds, a page that fails less and less often; `load` says what is known then
    and there. A reading is unknown once it is `stale_after_s` old. `in_flight` counts the calls of this worker that the
    engine may know of. `note` is told once per change whether the load is known, and why not; at first it counts as if
    it were.
    """

    def __init__(
        self,
        page: MetricsPage,
        *,
        model: str | None,
        in_flight: Callable[[], int],
        every_s: float = POLL_EVERY_S,
        stale_after_s: float = STALE_AFTER_S,
        note: Callable[[bool, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._page = page
        self._model = model
        self._in_flight = in_flight
        self._every_s = every_s
        self._stale_after_s = stale_after_s
        self._note = note
        self._clock = clock
        self._sleep = sleep
        self._signals = _SILENT
        self._read_at = -math.inf
        self._in_flight_then = 0
        self._readable = True

    def load(self) -> Load:
        """What is known now."""
        age_s = self._clock() - self._read_at
        if age_s >= self._stale_after_s:
            return Load(in_flight=self._in_flight())
        signals = self._signals
        return Load(
            in_flight=self._in_flight(),
            queued=signals.queued,
            running=signals.running,
            kv_cache_ratio=signals.kv_cache_ratio,
            age_s=age_s,
            in_flight_then=self._in_flight_then,
        )

    async def run(self) -> None:
        """Poll until cancelled."""
        failures, known_at = 0, self._clock()
        while True:
            try:
                await self._poll()
                failures, known_at = 0, self._clock()
                self._changed(True, "")
            except MetricsUnreadable as error:
                failures = min(failures + 1, 16)
                if self._clock() - known_at >= self._stale_after_s:
                    self._changed(False, str(error))
            await self._sleep(max(self._every_s, min(self._every_s * 2**failures, POLL_AT_MOST_EVERY_S)))

    async def _poll(self) -> None:
        # Half a turn: who shares the page finds what the other has just fetched.
        signals = read_signals(await self._page.text(max_age_s=self._every_s / 2), model=self._model)
        if not signals.says_anything:
            raise MetricsUnreadable("it has no metric of a load that we know")
        self._signals = signals
        self._read_at = self._clock()
        self._in_flight_then = self._in_flight()

    def _changed(self, readable: bool, why: str) -> None:
        if readable is not self._readable:
            self._readable = readable
            if self._note is not None:
                self._note(readable, why)
