"""What is particular to the scripted backend; the rest is in `tests/contract/test_backends.py`."""

from __future__ import annotations

import json
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import Timeouts
from backends.chat import Usage
from backends.errors import BackendTimeout, BackendUnreachable
from backends.scripted import Script, ScriptedBackend, tokens_of
from tests.calls import collect, make_call, texts_of, whole_of

CALL: dict[str, object] = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}


@given(st.text())
def test_the_tokens_of_an_answer_are_the_answer(answer: str) -> None:
    assert "".join(tokens_of(answer)) == answer


@pytest.mark.parametrize("stream", [True, False])
async def test_tool_calls_reasoning_and_log_probabilities_are_played(stream: bool) -> None:
    script = Script(
        tokens=("a", "b"),
        reasoning=("hm", "m"),
        tool_calls=(CALL, CALL),
        logprobs=True,
        prompt_tokens=9,
        cached_tokens=4,
    )
    events = await collect(ScriptedBackend("a", script), make_call(stream=stream))
    [choice] = whole_of(events)["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": "ab", "reasoning_content": "hmm", "tool_calls": [CALL, CALL],
    }  # fmt: skip
    assert choice["finish_reason"] == "tool_calls"
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["a", "b"]
    assert events[-1].usage == Usage(prompt_tokens=9, completion_tokens=4, cached_tokens=4, reasoning_tokens=2)


async def test_max_tokens_cuts_the_answer_and_says_so() -> None:
    events = await collect(ScriptedBackend("a"), make_call(stream=True, max_tokens=2))
    assert texts_of(events) == ["This is "]
    assert whole_of(events)["choices"][0]["finish_reason"] == "length"


async def test_an_echo_answers_with_the_request() -> None:
    events = await collect(ScriptedBackend("a", Script(echo=True)), make_call(odd=[1]))
    assert json.loads(texts_of(events)[0])["odd"] == [1]


async def test_a_script_can_be_made_for_each_call_and_usage_left_out() -> None:
    backend = ScriptedBackend("a", lambda call: Script(tokens=(call.model,), reports_usage=False))
    events = await collect(backend, make_call())
    assert texts_of(events) == ["small"]
    assert events[0].usage is None


async def test_it_counts_what_happened_to_it() -> None:
    backend = ScriptedBackend("a")
    await collect(backend, make_call())
    async with aclosing(backend.answer(make_call(stream=True))) as events:
        await anext(events)
        assert backend.in_flight == 1
    assert (backend.calls, backend.cancelled, backend.events, backend.in_flight) == (2, 1, 2, 0)


async def test_a_check_fails_where_the_script_says_unreachable() -> None:
    await ScriptedBackend("a").check(within_s=1)
    with pytest.raises(BackendUnreachable):
        await ScriptedBackend("a", Script(fault="unreachable")).check(within_s=1)


async def test_a_delay_without_a_fraction_is_a_delay_like_any_other() -> None:
    call = make_call(stream=True, timeouts=Timeouts(first_token_s=0.01))
    with pytest.raises(BackendTimeout) as late:
        await collect(ScriptedBackend("a", Script(first_token_delay_s=1)), call)
    assert late.value.phase == "first_token"
