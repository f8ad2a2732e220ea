"""Where a policy's backends stand: a URL that no call could ever be made to is a mistake of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies.load import load_policy
from policies.mistakes import PolicyError

POLICY = """\
name: there
backends:
  far: {kind: openai, url: "${URL}"}
  near:
    kind: llamacpp
    url: %s
models:
  m: {backends: [far, near], context_window: 2048, price: {input: 1, output: 1}}
routes:
  auto: {strategy: fixed, model: m}
"""
GOOD = "http://127.0.0.1:8000/v1"
NOWHERE = [
    "http://h:99999/v1",
    "http://h:0/v1",
    "http://h:port/v1",
    "http://[h/v1",
    "http://[zz]/v1",
    "http:///v1",
    "http://:80/v1",
    "http://ä..x/v1",
]


def load(folder: Path, near: str, far: str) -> None:
    path = folder / "policy.yaml"
    path.write_text(POLICY % f'"{near}"')
    load_policy(path, {"URL": far})


@pytest.mark.parametrize("end", ["?api-version=1", "#x", "?"])
def test_a_url_that_no_path_can_follow_is_a_mistake(tmp_path: Path, end: str) -> None:
    with pytest.raises(PolicyError) as refused:
        load(tmp_path, GOOD, GOOD + end)
    [mistake] = refused.value.mistakes
    assert (mistake.path, mistake.line) == ("backends.far.url", 3)
    assert "write the rest as query" in mistake.remedy


TRITON = """\
name: triton
backends:
  t: {kind: triton, url: "grpcs://h:8001", model: ensemble, tls: {server_name: h}}
models:
  m: {backends: [t], context_window: 2048}
"""


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        (("h:8001", "h"), "backends.t.url", "names no server"),
        (("h:8001", "h:0"), "backends.t.url", "names no server"),
        (("h:8001", "user@h:8001"), "backends.t.url", "names no server"),
        (("h:8001", "h:8001?x"), "backends.t.url", "names no server"),
        (("grpcs:", "grpc:"), "backends.t.tls", "the URL is not a grpcs:// one"),
        (('url: "grpcs://h:8001"', "repository: ."), "backends.t.tls", "without TLS"),
        (("model: ensemble", 'model: ""'), "backends.t.model", "folder"),
    ],
)
def test_a_triton_that_could_not_be_spoken_to_is_a_mistake(
    tmp_path: Path, change: tuple[str, str], path: str, message: str
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(TRITON)
    load_policy(policy, {})
    assert change[0] in TRITON
    policy.write_text(TRITON.replace(*change, 1))
    with pytest.raises(PolicyError) as refused:
        load_policy(policy, {})
    [mistake] = refused.value.mistakes
    assert (mistake.path, message in mistake.message) == (path, True), mistake


TASKS = """\
name: tasks
backends:
  any: {kind: openai, url: "http://127.0.0.1:8000/v1"}
  own: {kind: embedder}
  far: {kind: llamacpp, url: "http://127.0.0.1:8001/v1"}
  near: {kind: llamacpp, weights: w.gguf}
  triton: {kind: triton, url: "grpc://h:8001", model: ensemble}
models:
  chat: {backends: [any, far, near, triton], context_window: 2048}
  vectors: {backends: [any, own, far], context_window: 256, task: embeddings}
  others: {backends: [any], context_window: 256, task: embeddings}
routes:
  r: {strategy: fixed, model: vectors}
"""


def load_tasks(folder: Path, *changes: tuple[str, str]) -> tuple[str, ...]:
    """The warnings of that policy, changed."""
    text = TASKS
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "w.gguf").touch()
    (folder / "policy.yaml").write_text(text)
    warnings = load_policy(folder / "policy.yaml", {}).warnings
    return tuple(f"{warning.path}: {warning.message}" for warning in warnings)


def test_models_for_embeddings_stand_on_engines_that_make_them(tmp_path: Path) -> None:
    assert load_tasks(tmp_path) == ()


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        (("far, near, triton]", "far, near, triton, own]"), "models.chat.backends[4]", "'own' makes embeddings only"),
        (("[any, own, far]", "[any, near]"), "models.vectors.backends[1]", "answers chat only"),
        (("[any, own, far]", "[triton]"), "models.vectors.backends[0]", "'triton' answers chat only"),
        (
            ("model: vectors", "model: chat, fallbacks: [vectors]"),
            "routes.r.fallbacks[0]",
            "'vectors' is for embeddings",
        ),
        (("model: vectors", "model: vectors, fallbacks: [chat]"), "routes.r.fallbacks[0]", "'chat' is for chat, 'vec"),
        (
            ("{strategy: fixed, model: vectors}", "{strategy: threshold, small: chat, large: others}"),
            "routes.r.large",
            "'others' is for embeddings, 'chat' for chat",
        ),
    ],
)
def test_a_model_and_a_route_are_for_one_task(tmp_path: Path, change: tuple[str, str], path: str, message: str) -> None:
    with pytest.raises(PolicyError) as refused:
        load_tasks(tmp_path, change)

    (mistake,) = refused.value.mistakes
    assert mistake.path == path
    assert message in mistake.message
    assert mistake.remedy


def test_falling_back_to_another_models_vectors_is_warned_of(tmp_path: Path) -> None:
    [warning] = load_tasks(tmp_path, ("model: vectors", "model: vectors, fallbacks: [others]"))
    assert warning == "routes.r.fallbacks[0]: vectors of two models cannot be compared with each other"


@pytest.mark.parametrize("url", NOWHERE)
def test_a_url_that_names_no_server_is_a_mistake_with_its_place(tmp_path: Path, url: str) -> None:
    with pytest.raises(PolicyError) as refused:
        load(tmp_path, near=url, far=GOOD)

    (mistake,) = refused.value.mistakes
    assert (mistake.line, mistake.column, mistake.path) == (6, 10, "backends.near.url")
    assert f"'{url}' names no server" in mistake.message


def test_what_the_environment_gave_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as refused:
        load(tmp_path, near=GOOD, far="http://user:hunter2@h:99999/v1")

    assert "policy.yaml:3:28: backends.far.url: '${URL}' names no server" in str(refused.value)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [GOOD, "https://api.example.com", "http://[::1]:8080/v1", "http://a_b/v1", "http://h:/v1", "http://bücher.de"],
)
def test_a_url_that_names_a_server_is_taken(tmp_path: Path, url: str) -> None:
    load(tmp_path, near=url, far=url)


@pytest.mark.parametrize(
    ("engine", "where", "message"),
    [
        ("{kind: openai, url: 'http://h/v1', tls: {}}", "backends.near.tls", "the URL is not an https:// one"),
        (
            "{kind: openai, url: 'https://h/v1', api_key_header: api-key}",
            "backends.near.api_key_header",
            "there is no 'api_key' to send in it",
        ),
        ("{kind: openai, url: 'https://h/v1', tls: {ca: nowhere.pem}}", "backends.near.tls.ca", "no such file"),
        ("{kind: openai, url: 'https://h/v1', tls: {certificate: policy.yaml}}", "backends.near.tls", "has no 'key'"),
    ],
)
def test_settings_towards_an_engine_that_can_not_mean_anything_are_mistakes(
    tmp_path: Path, engine: str, where: str, message: str
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY.replace("\n    kind: llamacpp\n    url: %s", f" {engine}"))
    with pytest.raises(PolicyError) as refused:
        load_policy(path, {"URL": GOOD})

    (mistake,) = refused.value.mistakes
    assert mistake.path == where
    assert message in mistake.message
