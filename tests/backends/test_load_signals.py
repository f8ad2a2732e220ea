"""What engines say about their load is read, kept and grows old; what they do not say harms nobody."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress

import anyio
import pytest
from aiohttp import ClientSession, web
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import Load
from backends.llamacpp import LlamaCppBackend
from backends.load_signals import (
    MAX_METRICS_BYTES,
    EngineSignals,
    LoadSignals,
    MetricsPage,
    MetricsPages,
    read_signals,
)
from backends.openai_http import OpenAIBackend, new_session
from tests.engines import SMOLLM2, llamacpp_server

# As documented by each project: vLLM "Production metrics", SGLang "Production metrics", TGI "Metrics", TensorRT-LLM
# "trtllm-serve", Triton "Metrics" and NVIDIA's triton_backend README; llama.cpp's own page stands in a test of its own.
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="llama"} 8.0
vllm:num_requests_running{engine="1",model_name="llama"} 5.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="llama"} 2.0
vllm:num_requests_waiting{engine="1",model_name="llama"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="llama",reason="capacity"} 99.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="llama"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="llama"} 0.5
vllm:e2e_request_latency_seconds_bucket{engine="0",le="0.3",model_name="llama"} 0.0
"""
VLLM_V0 = 'vllm:gpu_cache_usage_perc{model_name="llama"} 0.75\nvllm:num_requests_swapped{model_name="llama"} 9.0\n'
SGLANG = """\
sglang:num_running_reqs{model_name="llama",tp_rank="0",priority=""} 162.0
sglang:num_running_reqs{model_name="llama",tp_rank="0",priority="5"} 100.0
sglang:num_queue_reqs{model_name="llama",tp_rank="0",priority=""} 2826.0
sglang:token_usage{model_name="llama",tp_rank="0"} 0.28
"""
TGI = "# TYPE tgi_queue_size gauge\ntgi_queue_size 7\n# TYPE tgi_batch_current_size gauge\ntgi_batch_current_size 4\n"
TRTLLM_SERVE = """\
trtllm_num_requests_running{engine_type="trtllm",model_name="llama"} 3.0
trtllm_num_requests_waiting{engine_type="trtllm",model_name="llama"} 1.0
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="llama"} 0.62
"""
TRITON = """\
nv_inference_request_success{model="ensemble",version="1"} 500
nv_inference_pending_request_count{model="ensemble",version="1"} 3
nv_inference_pending_request_count{model="ensemble",version="2"} 1
nv_inference_pending_request_count{model="other",version="1"} 50
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 2
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="context",version="1"} 1
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 6
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 9
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 0.4
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 100
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="free",model="tensorrt_llm",version="1"} 300
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 400
"""


def without(text: str, *words: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not any(word in line for word in words))


def signals(queued: int | None, running: int | None, kv_cache_ratio: float | None = None) -> EngineSignals:
    return EngineSignals(queued=queued, running=running, kv_cache_ratio=kv_cache_ratio)


@pytest.mark.parametrize(
    ("text", "model", "said"),
    [
        (VLLM, "llama", signals(3, 13, 0.5)),
        (VLLM, None, signals(3, 13, 0.5)),
        (VLLM_V0, "llama", signals(None, None, 0.75)),
        (SGLANG, "llama", signals(2826, 162, 0.28)),
        (TGI, "llama", signals(7, 4)),
        (TRTLLM_SERVE, "llama", signals(1, 3, 0.62)),
        (TRITON, "ensemble", signals(6, 6, 0.4)),
        (without(TRITON, "scheduled", "fraction"), "ensemble", signals(6, 7, 0.25)),
        (without(TRITON, "scheduled", "fraction", "used"), "ensemble", signals(6, 7, 0.25)),
        (without(TRITON, "nv_trt_llm"), "other", signals(50, None)),
        (without(TRITON, "nv_trt_llm"), "not loaded", signals(None, None)),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_every_engine_is_read_in_its_own_words(text: str, model: str | None, said: EngineSignals) -> None:
    assert read_signals(text.encode(), model=model) == said


def test_of_several_models_only_the_one_asked_for_counts() -> None:
    other = VLLM.replace("llama", "qwen").replace("} 2.0", "} 20.0")

    assert read_signals((VLLM + other).encode(), model="llama") == signals(3, 13, 0.5)
    assert read_signals((VLLM + other).encode(), model="qwen") == signals(21, 13, 0.5)
    assert read_signals((VLLM + other).encode(), model="neither") == signals(None, None)


def test_an_engine_that_serves_one_model_under_another_name_is_read_all_the_same() -> None:
    assert read_signals(VLLM.encode(), model="our name for it") == signals(3, 13, 0.5)


def test_a_model_name_may_hold_whatever_a_label_may() -> None:
    text = VLLM.replace('"llama"', r'"a \"b\", model_name=\"c\" \\ d} 7"') + VLLM
    assert read_signals(text.encode(), model='a "b", model_name="c" \\ d} 7') == signals(3, 13, 0.5)


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1", "1e300", "many", "", '"', "0x10"])
def test_a_value_that_is_no_count_is_passed_over(value: str) -> None:
    text = f'vllm:num_requests_waiting{{model_name="llama"}} {value}\nvllm:num_requests_running 4\n'
    assert read_signals(text.encode(), model="llama") == signals(None, 4)


def test_only_the_first_two_megabytes_are_looked_at() -> None:
    padding = b"# x\n" * (MAX_METRICS_BYTES // 4)
    assert read_signals(VLLM.encode() + padding, model="llama") == signals(3, 13, 0.5)
    assert read_signals(padding + VLLM.encode(), model="llama") == signals(None, None)


NAMES = ["vllm:num_requests_waiting", "nv_trt_llm_request_metrics", "sglang:token_usage", "tgi_queue_size"]


@given(
    st.lists(st.sampled_from([*NAMES, "{", "}", '"', "\\", ",", "=", " ", "\n", 'model="a"', "1", "nan"]) | st.text())
)
def test_nothing_that_an_engine_writes_raises_or_counts_below_nothing(pieces: list[str]) -> None:
    said = read_signals("".join(pieces).encode("utf-8", "replace"), model="a")

    assert said.queued is None or said.queued >= 0
    assert said.kv_cache_ratio is None or 0 <= said.kv_cache_ratio <= 1


class Time:
    """A clock that only sleeping moves, and who sleeps waits for the next turn."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self._turns = asyncio.Semaphore(0)
        self.asleep = asyncio.Event()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, pause_s: float) -> None:
        self.slept.append(pause_s)
        self.asleep.set()
        await self._turns.acquire()
        self.now += pause_s

    async def poll(self) -> None:
        """Let the poller wake, read and sleep again."""
        self.asleep.clear()
        self._turns.release()
        await self.asleep.wait()


class Site:
    """A real HTTP server with one metrics page."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.text = VLLM
        self.status = 200
        self.hangs = False
        self.asked: list[web.Request] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request)
        if self.hangs:
            await asyncio.sleep(60)
        return web.Response(text=self.text, status=self.status)


@asynccontextmanager
async def open_site(port: int) -> AsyncGenerator[Site, None]:
    site = Site(f"http://127.0.0.1:{port}/metrics")
    app = web.Application()
    app.router.add_get("/metrics", site.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield site
    finally:
        await runner.cleanup()


@asynccontextmanager
async def open_session() -> AsyncGenerator[ClientSession, None]:
    session = new_session()
    try:
        yield session
    finally:
        await session.close()


@asynccontextmanager
async def running(work: Callable[[], object]) -> AsyncGenerator[None, None]:
    async with anyio.create_task_group() as group:
        group.start_soon(work)  # type: ignore[arg-type]
        yield
        group.cancel_scope.cancel()


async def test_a_reading_is_kept_with_its_age_and_the_calls_that_were_ours_then(unused_tcp_port: int) -> None:
    time, calls = Time(), [1, 2]
    async with open_site(unused_tcp_port) as site, open_session() as session:
        page = MetricsPage(site.url, lambda: session, clock=time)
        kept = LoadSignals(page, model="llama", in_flight=lambda: len(calls), clock=time, sleep=time.sleep)
        assert kept.load() == Load(in_flight=2)
        async with running(kept.run):
            await time.asleep.wait()
            calls.append(3)
            time.now += 0.25
            first = kept.load()
            site.text = VLLM.replace("} 2.0", "} 7.0")
            await time.poll()
            second = kept.load()

    assert first == Load(in_flight=3, queued=3, running=13, kv_cache_ratio=0.5, age_s=0.25, in_flight_then=2)
    assert second == Load(in_flight=3, queued=8, running=13, kv_cache_ratio=0.5, age_s=0.0, in_flight_then=3)


async def test_a_page_that_fails_makes_the_reading_old_then_unknown_and_is_noted_once(unused_tcp_port: int) -> None:
    time, notes = Time(), []
    async with open_site(unused_tcp_port) as site, open_session() as session:
        kept = LoadSignals(
            MetricsPage(site.url, lambda: session, clock=time, within_s=0.1),
            model="llama",
            in_flight=lambda: 0,
            note=lambda readable, why: notes.append((readable, why)),
            clock=time,
            sleep=time.sleep,
        )
        async with running(kept.run):
            await time.asleep.wait()
            site.status = 503
            await time.poll()
            aged = kept.load()
            site.hangs = True
            for _ in range(3):
                await time.poll()
            time.now += 0.1
            unknown = kept.load()
            site.hangs, site.status, site.text = False, 200, "nothing_we_know 1\n"
            for _ in range(4):
                await time.poll()
            backed_off = list(time.slept)
            site.text = VLLM
            await time.poll()
            again = kept.load()

    assert (aged.queued, aged.age_s) == (3, 0.5)
    assert unknown == Load()
    assert backed_off == [0.5, 1, 2, 4, 8, 10, 10, 10, 10]
    assert (again.queued, again.age_s, time.slept[-1]) == (3, 0.0, 0.5)
    assert notes == [(False, "no answer within 0.1 s"), (True, "")]


async def test_a_page_that_is_larger_than_the_limit_is_read_up_to_its_last_whole_line(unused_tcp_port: int) -> None:
    async with open_site(unused_tcp_port) as site, open_session() as session:
        site.text = VLLM + "# xx\n" * (MAX_METRICS_BYTES // 5) + "tgi_queue_size 12345\n" * 10
        text = await MetricsPage(site.url, lambda: session).text()

    assert len(text) <= MAX_METRICS_BYTES
    assert text.startswith(VLLM.encode())
    assert text.endswith(b"# xx\n")


async def test_two_models_of_one_server_fetch_its_page_once(unused_tcp_port: int) -> None:
    async with open_site(unused_tcp_port) as site, open_session() as session:
        site.text = TRITON
        pages = MetricsPages(lambda: session)
        ours = [
            LoadSignals(pages.page(site.url), model=model, in_flight=lambda: 0, every_s=3600.0)
            for model in ("ensemble", "other")
        ]
        async with running(ours[0].run), running(ours[1].run):
            with anyio.fail_after(5):
                while any(one.load().queued is None for one in ours):
                    await anyio.sleep(0.002)

    assert len(site.asked) == 1
    assert [one.load().queued for one in ours] == [6, 52]


async def test_a_bad_address_is_refused_when_the_backend_is_built() -> None:
    for url in ("metrics", "ftp://host/metrics"):
        with pytest.raises(ValueError):
            OpenAIBackend("a", "http://host/v1", metrics_url=url)


async def test_credentials_go_to_the_engine_and_to_no_other_host(unused_tcp_port: int) -> None:
    async with open_site(unused_tcp_port) as site, open_session() as session:
        for base in (f"http://127.0.0.1:{unused_tcp_port}/v1", "http://127.0.0.2:9/v1"):
            backend = OpenAIBackend("a", base, session=session, api_key="sk-secret", metrics_url=site.url)
            async with running(backend.run):
                with anyio.fail_after(5):
                    while backend.load.running is None:
                        await anyio.sleep(0.002)

    assert [request.headers.get("Authorization") for request in site.asked] == ["Bearer sk-secret", None]


async def test_a_real_llamacpp_says_that_it_is_idle_and_counts_a_call() -> None:
    with llamacpp_server(SMOLLM2, slots=1) as url:
        with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as page:
            said = read_signals(page.read(), model=None)
        async with open_session() as session:
            backend = LlamaCppBackend("a", url, session=session)
            async with running(backend.run):
                with anyio.fail_after(10):
                    while backend.load.running != 0:
                        await anyio.sleep(0.01)
                async with running(lambda: _keep_busy(session, url, 3)):
                    with suppress(TimeoutError), anyio.fail_after(20):
                        while (backend.load.running, backend.load.queued) != (1, 2):
                            await anyio.sleep(0.01)
                    busy = backend.load

    assert said == signals(0, 0)
    assert (busy.running, busy.queued, busy.in_flight) == (1, 2, 0)


async def _keep_busy(session: ClientSession, url: str, calls: int) -> None:
    body = {"prompt": "Count to a thousand: 1, 2, 3,", "max_tokens": 400, "ignore_eos": True}

    async def call() -> None:
        async with session.post(f"{url}/completions", json={**body, "stream": True}) as response:
            await response.read()

    async with anyio.create_task_group() as group:
        for _ in range(calls):
            group.start_soon(call)
