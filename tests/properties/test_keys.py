"""Equal keys, exactly where a request asks for the same answer of the same tenant under the same settings."""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_left
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backends.chat import ChatRequest
from cache.key import EXCLUDED, AnswerScope, UnreadableField, canonical_request, exact_key
from gateway.openai.translate import read_chat, read_completion, read_embeddings
from policies.tenant import Tenant
from tests.calls import make_request

Json = Any
Body = dict[str, Json]

TENANT = Tenant(id="t1", organisation_id="o1", key_id="k1", cache_secret=b"1" * 32)
SCOPE = AnswerScope(name="fast", settings_digest="d1")

IRRELEVANT = (
    "stream",
    "stream_options",
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)

TEXT = st.sampled_from(["", "1", "é", "e\u0301", "Ω", "\u2126", "a\nb", '"', "\\u00e9", "🎉", "null"]) | st.text(
    max_size=4
)
SCALARS = (
    None,
    True,
    False,
    0,
    1,
    -1,
    1.0,
    0.0,
    -0.0,
    0.5,
    1e30,
    1e-7,
    2**63,
    -(2**70),
    "",
    "1",
    "é",
    "e\u0301",
    "null",
)
VALUES: st.SearchStrategy[Json] = st.sampled_from(
    (
        *SCALARS,
        *([scalar] for scalar in SCALARS),
        *({"a": scalar} for scalar in SCALARS),
        [],
        {},
        [[]],
        [1, 2],
        [2, 1],
        {"a": 1, "b": 2},
        {"a": {"b": 2}},
        {"é": 1},
        {"e\u0301": 1},
        {"é": 1, "e\u0301": 2},
        {"é": 2},
    )
)
CONTENT = TEXT | st.builds(lambda text: [{"type": "text", "text": text}], TEXT)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENT}),
    min_size=1,
    max_size=3,
)
SCHEMA = st.fixed_dictionaries({"type": st.sampled_from(["object", "array"])}, optional={"properties": VALUES})
TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT, "parameters": SCHEMA})}
)
RELEVANT: dict[str, st.SearchStrategy[Json]] = {
    "messages": MESSAGES,
    "tools": st.none() | st.lists(TOOL, min_size=1, max_size=2),
    "response_format": st.none()
    | st.fixed_dictionaries({"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"schema": SCHEMA})}),
    "temperature": st.sampled_from([None, 0, 0.0, 0.7, 1, 1.0, 2]),
    "top_p": st.sampled_from([None, 0.5, 1]),
    "seed": st.sampled_from([None, 0, 1, -1, 2**63 - 1, 2**63 - 2]),
    "max_tokens": st.sampled_from([None, 1, 2]),
    "n": st.sampled_from([None, 1, 2]),
    "stop": st.none() | TEXT | st.lists(TEXT, max_size=2),
    "logit_bias": st.sampled_from([None, {}, {"1": 1}, {"1": 1.0}, {"1": -1, "2": 1}]),
    "x_unheard_of": VALUES,
    "é": VALUES,
}
NOT_RELEVANT: dict[str, st.SearchStrategy[Json]] = {
    "model": st.sampled_from(["fast", "smart"]),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "user": TEXT,
    "metadata": VALUES,
    "safety_identifier": VALUES,
    "prompt_cache_key": VALUES,
    "prompt_cache_retention": VALUES,
}
BODIES = st.fixed_dictionaries(
    {"model": st.just("fast"), "messages": MESSAGES},
    optional={
        name: values for name, values in {**RELEVANT, **NOT_RELEVANT}.items() if name not in ("model", "messages")
    },
)
EDITS = st.lists(
    st.one_of(
        *(
            st.tuples(st.just(name), values | (st.just(...) if name not in ("model", "messages") else st.nothing()))
            for name, values in {**RELEVANT, **NOT_RELEVANT}.items()
        )
    ),
    max_size=3,
)


def relevant(body: Body) -> Json:
    """What of a body can change the answer, in a form that is equal where the answer is: the law, spelt anew."""
    told = {}
    for name, value in body.items():
        if name in (*IRRELEVANT, "model") or value is None:
            continue
        told[name] = exactly(int(value) if isinstance(value, float) and value.is_integer() else value)
    return told


def exactly(value: Json) -> Json:
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [exactly(item) for item in value]
    if isinstance(value, dict):
        return {name: exactly(item) for name, item in value.items()}
    return type(value).__name__, repr(value)


def spelt(value: Json, random: Random) -> str:
    """`value` as one of the many JSON texts that mean it: order, white space, escapes, Unicode form."""
    if isinstance(value, str):
        forms = (value, unicodedata.normalize("NFC", value), unicodedata.normalize("NFD", value))
        return spelt_text(random.choice(forms), random)
    if isinstance(value, list):
        return "[" + ",".join(space(random) + spelt(item, random) + space(random) for item in value) + "]"
    if isinstance(value, dict):
        items = list(value.items())
        random.shuffle(items)
        return (
            "{"
            + ",".join(f"{spelt_text(name, random)}{space(random)}:{spelt(item, random)}" for name, item in items)
            + "}"
        )
    return json.dumps(value)


def space(random: Random) -> str:
    return random.choice(["", "", " ", "\n", "\t "])


def spelt_text(text: str, random: Random) -> str:
    if random.random() < 0.5:
        return json.dumps(text, ensure_ascii=random.random() < 0.5)
    escaped = text.encode("utf-16-be", "surrogatepass").hex()
    return '"' + "".join(f"\\u{escaped[at : at + 4]}" for at in range(0, len(escaped), 4)) + '"'


def key_of(body: Body, random: Random) -> str:
    return exact_key(TENANT, canonical_request(read_chat(spelt(body, random).encode())), SCOPE)


def check_law(first: Body, edits: list[tuple[str, Json]], random: Random) -> None:
    second = dict(first)
    for name, value in edits:
        if value is ...:
            second.pop(name, None)
        else:
            second[name] = value

    same_key = key_of(first, random) == key_of(second, random)

    assert same_key == (relevant(first) == relevant(second))


@settings(max_examples=200, deadline=None)
@given(first=BODIES, edits=EDITS, random=st.randoms(use_true_random=False))
@example(
    first={"model": "fast", "messages": [{"role": "user", "content": "a"}], "x": {"é": 1, "e\u0301": 2}},
    edits=[("x", {"é": 2})],
    random=Random(0),
)
def test_keys_are_equal_exactly_where_the_answer_relevant_fields_are(
    first: Body, edits: list[tuple[str, Json]], random: Random
) -> None:
    check_law(first, edits, random)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(first=BODIES, edits=EDITS, random=st.randoms(use_true_random=False))
def test_the_law_of_keys_holds_for_ten_thousand_pairs(
    first: Body, edits: list[tuple[str, Json]], random: Random
) -> None:
    check_law(first, edits, random)


def test_nothing_else_is_excluded_from_the_key() -> None:
    assert {*IRRELEVANT, "model"} == EXCLUDED


SCOPES = st.builds(
    AnswerScope,
    name=st.sampled_from(["fast", "smart", ""]),
    settings_digest=st.sampled_from(["d1", "d2", ""]),
    epoch=st.integers(0, 2),
    arm=st.sampled_from(["", "canary", "d1"]),
)
SECRETS = st.sampled_from([b"1" * 32, b"2" * 32, b"1" * 31 + b"2", b"1" * 16])


@given(st.tuples(SECRETS, SCOPES), st.tuples(SECRETS, SCOPES))
def test_a_key_belongs_to_one_secret_and_one_scope(
    one: tuple[bytes, AnswerScope], other: tuple[bytes, AnswerScope]
) -> None:
    canonical = canonical_request(make_request())

    keys = [
        exact_key(msgspec.structs.replace(TENANT, cache_secret=secret), canonical, scope)
        for secret, scope in (one, other)
    ]

    assert (keys[0] == keys[1]) == (one == other)


@given(TEXT, TEXT)
def test_what_stands_in_the_scope_cannot_be_moved_into_the_request(name: str, text: str) -> None:
    scopes = [AnswerScope(name=name + text, settings_digest=""), AnswerScope(name=name, settings_digest=text)]

    assert len({exact_key(TENANT, b"[]", scope) for scope in scopes}) == (2 if text else 1)


def test_how_vectors_are_written_and_how_long_they_are_makes_another_answer() -> None:
    bodies = [
        b'{"model":"m","input":"a"}',
        b'{"model":"m","input":["a"]}',
        b'{"model":"m","input":"a","encoding_format":"base64"}',
        b'{"model":"m","input":"a","dimensions":3}',
        b'{"model":"m","input":[1]}',
        b'{"model":"m","input":"b"}',
    ]
    assert len({canonical_request(read_embeddings(body)) for body in bodies}) == len(bodies)
    assert canonical_request(read_embeddings(bodies[0][:-1] + b',"user":"u"}')) == canonical_request(
        read_embeddings(bodies[0])
    )


def test_a_chat_is_no_text_completion() -> None:
    body = b'{"model":"m","prompt":"a","messages":[{"role":"user","content":"a"}]}'

    assert canonical_request(read_chat(body)) != canonical_request(read_completion(body))


@pytest.mark.parametrize("secret", [b"", b"short", b"1" * 15])
def test_a_tenant_without_a_secret_gets_no_key(secret: bytes) -> None:
    with pytest.raises(ValueError, match="no cache secret"):
        exact_key(msgspec.structs.replace(TENANT, cache_secret=secret), b"[]", SCOPE)


@pytest.mark.parametrize("number", [b"1e400", b"[-1e999]"])
def test_a_field_that_no_value_stands_for_is_refused_by_its_name(number: bytes) -> None:
    request = read_chat(b'{"model":"m","messages":[{"role":"user","content":"a"}],"x_odd":%s}' % number)

    with pytest.raises(UnreadableField) as refused:
        canonical_request(request)

    assert refused.value.field == "x_odd"


def test_large_numbers_keep_their_last_digit() -> None:
    def request(seed: bytes) -> ChatRequest:
        return read_chat(b'{"model":"m","messages":[{"role":"user","content":"a"}],"x_seed":%s}' % seed)

    keys = {canonical_request(request(seed)) for seed in (b"18446744073709551617", b"18446744073709551618", b"1e30")}

    assert len(keys) == 3


def refused_field(levels: int, text: str) -> str | None:
    """The field that is refused of a request with one nested that deep, and one beside it; None where none is."""
    nested = b"[" * levels + msgspec.json.encode(text) + b"]" * levels
    fields = {"x_flat": msgspec.Raw(b'"x"'), "x_deep": msgspec.Raw(nested)}
    try:
        canonical_request(msgspec.structs.replace(make_request(), fields=fields))
    except UnreadableField as error:
        return error.field
    return None


@pytest.mark.parametrize("text", ["a", "ä"])
def test_a_field_nested_too_deeply_is_refused_by_its_name(text: str) -> None:
    first = bisect_left(range(200_000), 1, key=lambda levels: int(refused_field(levels, text) is not None))

    # Not at the same level here: the stack is less deep.
    around = [refused_field(levels, text) for levels in range(first - 20, first + 20)]

    accepted = around.count(None)
    assert 0 < accepted < 40
    assert around == [None] * accepted + ["x_deep"] * (40 - accepted)
