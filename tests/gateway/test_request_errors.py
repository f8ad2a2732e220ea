"""What a client is told when its request cannot be served: one envelope, the right status, the field that is wrong."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.scripted import Script
from tests.gateway.wire import chunks_of, error_of, raw_client
from tests.world import World, open_world

HELLO = b'"messages":[{"role":"user","content":"hello"}]'


async def post(world: World, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    return await world.client.post(path, content=body, headers={**world.headers(), **headers})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b'{"model":"fast",' + HELLO + b"} trailing",
        b'{"model":"fast","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"fast",' + HELLO + b',"x":"\xff"}',
        b'{"model":"fast",' + HELLO + b',"x":"\xed\xa0\x80"}',
        b'{"model":"fast","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"fast",' + HELLO + b',"x":"\\ud800"}',
        b'{"model":"fast",' + HELLO + b',"temperature":NaN}',
        b'{"model":"fast",' + HELLO + b',"x":[Infinity]}',
        b'{"model":"fast",' + HELLO + b",'x':1}",
        b'{"model":"fast",' + HELLO + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"fast",' + HELLO + b',"x":' + b'{"a":' * 100_000,
        '{"model":"fast"}'.encode("utf-16"),
    ],
    ids=range(15),
)
async def test_a_body_that_is_not_json_is_refused_and_says_so(world: World, body: bytes) -> None:
    began_at = time.monotonic()
    response = await post(world, body)

    assert response.status_code == 400
    error = error_of(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_json")
    assert time.monotonic() - began_at < 1.0


@pytest.mark.parametrize("body", [b"[" * 100_000, b"[" * 99_999 + b"]" * 99_999, b"1", b"null", b'"text"'])
async def test_a_body_that_is_no_object_is_refused(world: World, body: bytes) -> None:
    response = await post(world, body)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 1}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [1]}, "stop[0]"),
        ({"tools": {}}, "tools"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
async def test_a_field_that_is_wrong_is_named(world: World, fields: dict[str, Any], param: str) -> None:
    response = await post(world, msgspec.json.encode(world.body(**fields)))

    assert response.status_code == 400
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param.split("[")[0].split(".")[0] in error["message"]


@pytest.mark.parametrize("name", ["model", "messages"])
async def test_a_field_that_is_missing_is_named(world: World, name: str) -> None:
    body = world.body()
    del body[name]
    assert error_of(await post(world, msgspec.json.encode(body)))["param"] == name


async def test_a_number_that_no_float_can_hold_is_named_wherever_it_stands(world: World) -> None:
    response = await post(world, b'{"model":"fast",' + HELLO + b',"x_vendor":{"a":[1e999]}}')
    assert response.status_code == 400
    assert error_of(response)["param"] == "x_vendor"


async def test_a_text_completion_without_a_prompt_names_it(world: World) -> None:
    response = await post(world, b'{"model":"fast"}', "/v1/completions")
    assert error_of(response)["param"] == "prompt"


VALID = msgspec.json.encode(
    {
        "model": "fast",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "né 日"}, {"type": "image_url", "image_url": {}}]}
        ],
        "temperature": 1.5e-3,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [True, None, -0.0]}}}],
        "x_vendor": {"k": "\\ud83d\\ude00 \n", "big": 12345678901234567890},
    }
)


@settings(max_examples=250, deadline=None)
@given(
    at=st.integers(0, len(VALID)),
    cut=st.integers(0, 12),
    put=st.binary(max_size=4)
    | st.sampled_from([b"\\", b'"', b"\\ud800", b"1e400", b"\x00", b"\xc3", b"}", b"]", b"-", b"null", b",", b"\x7f"]),
)
async def test_no_body_whatever_is_an_error_of_ours_and_no_engine_gets_what_is_not_json(
    world_that_echoes: World, at: int, cut: int, put: bytes
) -> None:
    response = await post(world_that_echoes, VALID[:at] + put + VALID[at + cut :])

    if response.status_code == 200:
        json.loads(response.json()["choices"][0]["message"]["content"], parse_constant=pytest.fail)
    else:
        assert response.status_code in (400, 404), response.text
        error_of(response)


@pytest.fixture(scope="module")
async def world_that_echoes() -> Any:
    async with open_world(small=Script(echo=True), large=Script(echo=True)) as world:
        yield world


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Basic Zm9v", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Bearer sk-nonsense", "invalid_api_key"),
        ("Bearer \xfcmlaut", "invalid_api_key"),
    ],
)
async def test_a_key_that_is_missing_or_wrong_is_refused_before_the_body_is_read(
    world: World, authorization: str | None, code: str
) -> None:
    headers = httpx.Headers({} if authorization is None else {b"authorization": authorization.encode("latin-1")})
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = await world.client.post(path, content=b"not json", headers=headers)
        assert response.status_code == 401
        assert error_of(response)["code"] == code
    response = await world.client.get("/v1/models", headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (401, code)


async def test_a_key_that_looks_right_is_refused_without_being_repeated(world: World) -> None:
    key = world.key.key[:-4] + "AAAA"
    response = await world.ask(key=key)
    assert response.status_code == 401
    assert key not in response.text
    assert not any(key in str(line) for line in world.log)


async def test_a_revoked_key_is_refused(world: World) -> None:
    store, keys = world.gateway.store, world.gateway.keys
    tenant, _ = await store.ensure_demo_tenant()
    new_key = await store.create_key(tenant.id)
    await keys.poll_once()
    assert (await world.ask("before", key=new_key.key)).status_code == 200

    await store.revoke_key(new_key.record.id)
    await keys.poll_once()
    response = await world.ask("before", key=new_key.key)

    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"


async def test_an_expired_key_is_refused_and_the_client_told_why(world: World) -> None:
    key = await world.new_tenant("expired", expires_at=int(time.time()) - 1)
    response = await world.ask(key=key)
    assert response.status_code == 401
    assert error_of(response)["code"] == "expired_api_key"


async def test_a_key_may_use_only_the_models_it_was_given(world: World) -> None:
    key = await world.new_tenant("limited", allowed_models=frozenset({"small"}))

    allowed = await world.ask("limited", key=key, model="small")
    refused = await world.ask("limited", key=key, model="large")
    routed = await world.ask("limited", key=key, model="fast")
    unknown = await world.ask("limited", key=key, model="nope")

    assert allowed.status_code == 200
    assert refused.status_code == routed.status_code == 403
    assert error_of(refused)["param"] == "model"
    assert unknown.status_code == 404
    assert "small" in error_of(unknown)["message"]
    assert "large" not in error_of(unknown)["message"]


async def test_an_unknown_model_is_answered_with_the_known_ones(world: World) -> None:
    response = await world.ask(model="gpt-5")
    error = error_of(response)
    assert response.status_code == 404
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert all(name in error["message"] for name in ("auto", "fast", "smart", "small", "large"))


async def test_a_request_no_model_can_hold_is_refused_with_the_code_that_clients_know(world: World) -> None:
    response = await world.ask("word " * 60_000)
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"


async def test_a_capability_that_no_candidate_has_is_named(world: World) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    response = await world.ask(messages=[{"role": "user", "content": picture}], model="small")
    assert response.status_code == 400
    assert error_of(response)["code"] == "unsupported_by_model"
    assert "vision" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/no", "/v1/moderations", "/v1/responses", "/v1/chat", "/admin/v1/x"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_unknown_address_has_the_envelope_too(world: World, method: str, path: str) -> None:
    response = await world.client.request(method, path, headers=world.headers())
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"
    assert path in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[(method, "/v1/chat/completions") for method in ("GET", "PUT", "PATCH", "DELETE", "TRACE")],
        ("GET", "/v1/completions"),
        *[(method, "/v1/models") for method in ("POST", "PUT", "DELETE")],
    ],
)
async def test_a_method_that_is_not_for_this_address_has_the_envelope_too(world: World, method: str, path: str) -> None:
    response = await world.client.request(method, path)
    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_allowed"
    assert ("POST" if "completions" in path else "GET") in response.headers["allow"].split(", ")


async def test_head_is_answered_without_a_body(world: World) -> None:
    async with raw_client(world) as client:
        await client.write(b"HEAD /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\n\r\n")
        head = await client.read_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 405")
        await client.ask("after HEAD")
        assert (await client.read_answer())[0] == 200


async def test_every_answer_has_a_request_id_of_its_own(world: World) -> None:
    responses = [
        await world.ask("id"),
        await world.ask("id"),
        await world.ask("id", stream=True),
        await world.ask("id", key="wrong"),
        await world.ask("id", model="nope"),
        await world.client.get("/v1/models", headers=world.headers()),
        await world.client.get("/v1/models"),
        await world.client.get("/healthz"),
        await world.client.get("/readyz"),
        await world.client.get("/metrics"),
        await world.client.get("/nowhere"),
        await world.client.get("/admin/v1/whoami"),
    ]
    ids = [response.headers["x-request-id"] for response in responses]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", request_id) for request_id in ids)
    assert all(len(response.headers.get_list("x-request-id")) == 1 for response in responses)
    assert {response.headers["cache-control"] for response in responses} == {"private, no-store"}


async def test_a_clients_own_request_id_is_echoed_beside_ours(world: World) -> None:
    good = await world.ask("own id", headers={"x-client-request-id": "trace:1.2_3-A"})
    assert good.headers["x-client-request-id"] == "trace:1.2_3-A"
    assert good.headers["x-request-id"].startswith("req_")
    asked = await world.ask("own id", headers={"x-request-id": "mine"})
    assert asked.headers["x-request-id"] != "mine"


@pytest.mark.parametrize("value", [b"", b"a b", b"a\tb", b"\xff", b"x" * 129, b"<script>", b"a,b"])
async def test_a_request_id_that_could_do_harm_is_not_echoed(world: World, value: bytes) -> None:
    response = await world.client.post(
        "/v1/chat/completions",
        content=msgspec.json.encode(world.body("odd id")),
        headers={**{k: v.encode() for k, v in world.headers().items()}, "x-client-request-id": value},  # type: ignore[arg-type]
    )
    assert response.status_code == 200
    assert "x-client-request-id" not in response.headers


async def test_a_line_break_in_a_header_makes_no_header_of_its_own(world: World) -> None:
    async with raw_client(world) as client:
        await client.send(msgspec.json.encode(world.body("split")), headers={"x-client-request-id": "a\r\n evil: 1"})
        head = await client.read_until(b"\r\n\r\n")
    assert b"evil" not in head


async def test_what_is_no_http_is_refused(world: World) -> None:
    async with raw_client(world) as client:
        await client.write(b"\x16\x03\x01 this is a TLS hello\r\n\r\n")
        assert (await client.read_until(b"\r\n")).startswith(b"HTTP/1.1 400")


async def test_an_error_that_no_one_foresaw_says_nothing_of_its_cause_but_its_id_is_in_the_log() -> None:
    def broken(call: object) -> Script:
        raise ZeroDivisionError("secret detail")

    async with open_world(small=broken) as world:
        response = await world.ask()
        streamed = await world.ask(stream=True)
        large = await world.ask(model="large")

    assert response.status_code == streamed.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["code"] == "internal_error"
    assert response.headers["x-request-id"] in [line.get("request_id") for line in world.log.about("unexpected error")]
    assert large.status_code == 200


async def test_a_stream_that_is_refused_before_it_begins_is_no_stream(world: World) -> None:
    response = await world.ask(stream=True, model="nope")
    assert error_of(response)["code"] == "model_not_found"
    assert chunks_of(await world.ask("a stream", stream=True))
