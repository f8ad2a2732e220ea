"""Reading policy files: what is understood, and every mistake named with its line, column and remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from policies.load import MAX_BYTES, load_policy
from policies.mistakes import MAX_MISTAKES, Place, PolicyError, nearest
from policies.money import UsdPer1M
from policies.routing_policy import LlamaCppBackendSpec, OpenAIBackendSpec, ScriptedBackendSpec, ThresholdRouteSpec
from tests.policies.policy_text import ENV, GOOD, SECRET, edited, first_place, write


def refused(folder: Path, text: str) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        load_policy(write(folder, text), ENV)
    return caught.value


def test_a_good_file_loads_as_written(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, GOOD), ENV)
    tiny, vllm = policy.file.backends["tiny"], policy.file.backends["vllm"]

    assert policy.warnings == ()
    assert policy.label == f"everything@{policy.version}"
    assert len(policy.version) == 12
    assert policy.names == ("auto", "fast", "small-1", "1e3")
    assert isinstance(tiny, LlamaCppBackendSpec)
    assert tiny.slots == 4
    assert tiny.chat_template == "${not a variable}"
    assert tiny.weights == str(tmp_path / "tiny.gguf")
    assert isinstance(vllm, OpenAIBackendSpec)
    assert vllm.api_key == SECRET
    assert vllm.headers == {"X-Team": "core"}
    assert vllm.timeouts is not None
    assert (vllm.timeouts.first_token, vllm.timeouts.total) == (10.0, 90.0)
    assert policy.file.models["small-1"].price.input == UsdPer1M(37_500_000)


def test_a_model_keeps_conversations_together_unless_it_says_otherwise(tmp_path: Path) -> None:
    text = GOOD.replace("    max_output_tokens: 1024\n", "    balance: {affinity: false}\n")
    models = load_policy(write(tmp_path, text), ENV).file.models

    assert models["small-1"].balance.affinity
    assert not models["1e3"].balance.affinity


def test_words_that_look_like_something_else_are_what_was_written(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, GOOD.replace("answer: no", "answer: 2024-01-01")), ENV)
    played, auto = policy.file.backends["played"], policy.file.routes["auto"]

    assert isinstance(played, ScriptedBackendSpec)
    assert played.answer == "2024-01-01"
    assert isinstance(auto, ThresholdRouteSpec)
    assert auto.large == "1e3"


@pytest.mark.parametrize("word", ["no", "on", "off", "yes", "0o17", "0x1F", "1_000", "12:30:45", "1e3", ".5", "true"])
def test_a_model_may_have_any_name_without_quotes(tmp_path: Path, word: str) -> None:
    text = GOOD.replace("model: small-1\n    fallbacks: [1e3]", f"model: {word}").replace('"1e3"', word)
    text = text.replace("large: 1e3", f"large: {word}")
    if word[0] in "._":
        assert f"got '{word}'" in str(refused(tmp_path, text))  # a name begins with a letter or digit
    else:
        assert word in load_policy(write(tmp_path, text.replace("1_000:", '"1_000":')), ENV).file.models


MISTAKES = {
    # old text, new text with » before the mistake, what is said of it
    "unknown key near a known one": ("small: small-1", "»smal: small-1", "routes.auto.smal: unknown key; did you mean"),
    "unknown key like no other": ("fault: none", "»colour: red", "unknown key; known: kind, answer, first_token_delay"),
    "unknown key at the top": ("retries:", "»retrys:", "retrys: unknown key; did you mean 'retries'?"),
    "duplicate key": (
        "fault: none",
        "fault: none\n    »answer: x",
        "answer: duplicate key, first on line 20; keep one",
    ),
    "duplicate model": ('"1e3":', "»small-1:", "models.small-1: duplicate key, first on line 24"),
    "missing key": ("    context_window: 2048\n", "", "models.small-1: missing 'context_window'"),
    "missing section": ("name: everything\n", "", "missing 'name'"),
    "missing kind": (
        "    kind: scripted\n",
        "",
        "backends.played: missing 'kind'; it is one of openai, llamacpp, triton",
    ),
    "misspelt kind": ("kind: scripted", "»knd: scripted", "backends.played.knd: unknown key; did you mean 'kind'?"),
    "unknown kind": ("kind: openai", "kind: »opnai", "unknown kind 'opnai'; did you mean 'openai'?"),
    "unknown kind like no other": (
        "kind: openai",
        "kind: »ollama",
        "known: openai, llamacpp, triton, embedder, scripted",
    ),
    "unknown strategy": ("strategy: fixed", "strategy: »fixd", "unknown strategy 'fixd'; did you mean 'fixed'?"),
    "text for a number": ("context_window: 2048", "context_window: »many", "expected a whole number of 1 or more, got"),
    "zero": ("context_window: 2048", "context_window: »0", "expected a whole number of 1 or more, got '0'"),
    "fraction": ("max_attempts: 2", "max_attempts: »2.5", "retries.max_attempts: expected a whole number"),
    "quoted number": ("max_attempts: 2", 'max_attempts: »"2"', "expected a whole number of 1 or more, got '2'"),
    "above the range": ("threshold: 0.5", "threshold: »1.5", "expected a number from 0 to 1, got '1.5'"),
    "not a number": ("threshold: 0.5", "threshold: ».nan", "expected a number from 0 to 1, got '.nan'"),
    "infinite": ("threshold: 0.5", "threshold: »1e999", "expected a number from 0 to 1, got '1e999'"),
    "huge": (
        "context_window: 2048",
        "context_window: »" + "9" * 5000,
        "expected a whole number of 1 or more, got '999",
    ),
    "yes is no bool": ("enabled: true", "enabled: »yes", "expected true or false, got 'yes'; write true or false"),
    "nothing": ("model: small-1", "model:»", "routes.fast.model: expected text, got nothing"),
    "empty section": (
        "cache:\n  exact: {enabled: true, ttl: 1h, ttl_jitter: 0.2}",
        "cache:»",
        "expected a mapping, got",
    ),
    "list for text": ("model: small-1", "model: »[small-1]", "expected text, got a list"),
    "text for a list": ("fallbacks: [1e3]", "fallbacks: »1e3", "expected a list, got '1e3'; write [1e3]"),
    "empty list": ("backends: [vllm]", "backends: »[]", "models.1e3.backends: needs at least one item"),
    "list for a mapping": ("{input: 0.0375, output: 1}", "»[0.0375, 1]", "price: expected a mapping, got a list"),
    "no such choice": ("fault: none", "fault: »hangs", "got 'hangs'; did you mean 'hang'?"),
    "no such capability": (
        "[tools, logprobs]",
        "[tools, »logprob]",
        "capabilities[1]: expected one of json_schema, log",
    ),
    "bad duration": ("token_delay: 5ms", "token_delay: »5 minutes", "expected a duration such as 250ms, 30s"),
    "negative duration": ("token_delay: 5ms", "token_delay: »-5", "expected a duration such as 250ms, 30s"),
    "endless duration": ("total: 5m", "total: ».inf", "timeouts.total: expected a duration"),
    "too fine a price": ("input: 0.0375", "input: »0.00000000001", "at most 9 decimals, got '0.00000000001'"),
    "bad URL": ("http://127.0.0.1:8000/v1", "»127.0.0.1:8000", "expected an http:// or https:// URL, got '127.0.0.1"),
    "bad name": ("name: everything", 'name: »"every thing"', "expected a name of at most 100 letters"),
    "name with a newline": ('"1e3":', '»"1e3\\n":', "expected a name of at most 100 letters"),
    "bad header": ('X-Team: "${TEAM:-core}"', '»"X Team": core', "expected the name of an HTTP header as the key"),
    "header on two lines": ('"${TEAM:-core}"', '»"a\\r\\nB: c"', "expected the value of an HTTP header"),
    "NUL": ("answer: no", 'answer: »"a\\0b"', "expected text"),
    "half a character": ("answer: no", 'answer: "\\ud800"', "policy.yaml:20:"),
    "unset variable": ("${API_KEY}", "»${API_KEYS}", "environment variable API_KEYS is not set; set it, or write ${"),
    "broken reference": ("${API_KEY}", "»${API KEY}", "write $${ for a literal ${"),
    "variable as a key": ('"1e3":', "»${API_KEY}:", "environment variables are read in values, not in keys"),
    "empty variable": ("${SLOTS}", "»${EMPTY}", "expected a whole number of 1 or more, got what '${EMPTY}' stands for"),
    "unknown backend": (
        "backends: [vllm]",
        "backends: [vllm, »tinny]",
        "backends[1]: unknown backend 'tinny'; did you",
    ),
    "unknown model": (
        "model: small-1",
        "model: »smal-1",
        "routes.fast.model: unknown model 'smal-1'; did you mean 'sm",
    ),
    "unknown fallback": ("fallbacks: [1e3]", "fallbacks: [»gpt]", "unknown model 'gpt'; known models: small-1, 1e3"),
    "route as a model": ("model: small-1", "model: »auto", "unknown model 'auto'; this is a route; name a model"),
    "route with a model's name": ("  fast:", "  »small-1:", "routes.small-1: a model has this name"),
    "twice the same model": ("large: 1e3", "large: »small-1", "the same model as 'small'; name two models, or use"),
    "url and weights": (
        "    weights: tiny",
        "    url: http://x\n    weights: tiny",
        "exactly one of 'url' and 'weights'",
    ),
    "neither url nor weights": (
        "    weights: tiny.gguf\n",
        "",
        "needs exactly one of 'url' and 'weights', has neither",
    ),
    "no such weights": ("weights: tiny.gguf", "weights: »tinny.gguf", "no such file: 'tinny.gguf'; a path is relative"),
    "phase beyond the total": ("first_token: 20s", "first_token: »10m", "is longer than total (300s)"),
    "merged phase beyond the total": ("first_token: 10s,", "first_token: »91s,", "longer than total (90s)"),
    "no time": ("total: 5m", "total: »0", "timeouts.total: is zero"),
    "more output than context": (
        "max_output_tokens: 1024",
        "max_output_tokens: »9000",
        "exceeds the context window of 8",
    ),
    "tag": ("answer: no", "answer: »!!python/name:os.system x", "tag '!!python/name:os.system' is not read here"),
    "alias of nothing": ("<<: *timeouts", "<<: »*timeout", "alias *timeout names no anchor above it"),
    "merge of text": ("<<: *timeouts", "»<<: fast", "<< takes a mapping or a list of mappings"),
    "two merges": ("<<: *timeouts", "<<: *timeouts\n      »<<: *timeouts", "merge several as <<: [*a, *b]"),
    "list as a key": ("  fast:", "  »[fast]:", "a key must be text"),
    "second document": ("retries:", "»---\nretries:", "a second document begins here; one file is one policy"),
    "unclosed list": ("backends: [vllm]", "backends: [vllm", "not YAML: "),
    "variable in braces": ("{input: 0.0375", "{input: ${SLOTS}", "inside { } and [ ] a ${NAME} needs quotes"),
    "tab": ("    token_delay", "»\ttoken_delay", "not YAML: "),
    "control character": ("answer: no", "answer: n»\x07o", "character \\x07 is not allowed in YAML"),
}
"""Where `»` is missing the place is that of the key around: tested on its own, or by its words alone."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_line_column_and_remedy(tmp_path: Path, mistake: str) -> None:
    old, new, said = MISTAKES[mistake]
    text, place = edited(old, new) if "»" in new else (GOOD.replace(old, new), None)
    assert text != GOOD

    error = refused(tmp_path, text)

    assert said in str(error)
    assert error.mistakes[0].file == str(tmp_path / "policy.yaml")
    assert place is None or first_place(error) == place
    assert SECRET not in str(error)


@pytest.mark.parametrize(
    ("old", "place"),
    [
        ("name: everything\n", Place(1, 1)),
        ("    context_window: 2048\n", Place(24, 3)),
        ("    kind: scripted\n", Place(18, 3)),
        ("    weights: tiny.gguf\n", Place(4, 3)),
    ],
)
def test_what_is_missing_is_missed_at_the_key_that_lacks_it(tmp_path: Path, old: str, place: Place) -> None:
    assert first_place(refused(tmp_path, GOOD.replace(old, ""))) == place


def test_an_unknown_way_of_balancing_is_refused_at_its_place(tmp_path: Path) -> None:
    text, place = edited("    max_output_tokens: 1024\n", "    balance: {»afinity: false}\n")
    assert first_place(refused(tmp_path, text)) == place


def test_a_mistake_reads_as_one_line_that_an_editor_can_follow(tmp_path: Path) -> None:
    text, _ = edited("small: small-1", "»smal: small-1")

    (line,) = str(refused(tmp_path, text)).splitlines()

    assert line == f"{tmp_path}/policy.yaml:36:5: routes.auto.smal: unknown key; did you mean 'small'?"


def test_all_mistakes_are_found_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD
    changes = (
        ("tiny.gguf", "gone.gguf"),
        ("fault: none", "falt: none"),
        ("[vllm]", "[vlm]"),
        ("d: 0.5", "d: 5"),
        ("total: 5m", "total: 1x"),
    )
    for old, new in changes:
        text = text.replace(old, new)

    mistakes = refused(tmp_path, text).mistakes

    assert [(mistake.line, mistake.path) for mistake in mistakes] == [
        (6, "backends.tiny.weights"),
        (22, "backends.played.falt"),
        (30, "models.1e3.backends[0]"),
        (38, "routes.auto.threshold"),
        (47, "timeouts.total"),
    ]


def test_a_broken_part_still_has_its_name_and_is_no_ground_for_more_mistakes(tmp_path: Path) -> None:
    text = GOOD.replace("url: http://127.0.0.1:8000/v1", "url: 5").replace("context_window: 8192", "context_window: x")

    assert [mistake.path for mistake in refused(tmp_path, text).mistakes] == [
        "backends.vllm.url",
        "models.1e3.context_window",
    ]


MISPLACED_SECRETS = [
    ("name: everything", 'name: " ${API_KEY}"'),
    ("slots: ${SLOTS}", "slots: ${API_KEY}"),
    ("weights: tiny.gguf", "weights: ${API_KEY}"),
    ("stop: [", "stop: [{a: '${API_KEY}'}, "),
    ("kind: openai", "kind: ${API_KEY}"),
    ("url: http://127.0.0.1:8000/v1", "url: ${API_KEY}"),
    ('"${TEAM:-core}"', '"${API_KEY}\\n"'),
    ("token_delay: 5ms", "token_delay: ${API_KEY}"),
    ("fault: none", "fault: ${API_KEY}"),
    ("[tiny, played]", '[tiny, "${API_KEY}"]'),
    ("[tools, logprobs]", "${API_KEY}"),
    ("input: 0.0375", 'input: "${API_KEY}"'),
    ("small: small-1", "small: ${API_KEY}"),
    ("threshold: 0.5", "threshold: ${API_KEY}"),
    ("fallbacks: [1e3]", 'fallbacks: ["${API_KEY}"]'),
    ("enabled: true", 'enabled: "${API_KEY}"'),
]


@pytest.mark.parametrize(("old", "new"), MISPLACED_SECRETS)
def test_no_message_shows_what_came_from_the_environment(tmp_path: Path, old: str, new: str) -> None:
    assert GOOD.count(old) == 1

    error = refused(tmp_path, GOOD.replace(old, new))

    assert "${API_KEY}" in str(error) or "got a mapping" in str(error)
    assert SECRET not in str(error)
    assert SECRET not in repr(error.mistakes)


def test_a_default_stands_in_for_a_variable_that_is_unset_or_empty(tmp_path: Path) -> None:
    text = GOOD.replace("${SLOTS}", "${EMPTY:-3}").replace("${API_KEY}", "${GONE:-}")

    backends = load_policy(write(tmp_path, text), ENV).file.backends

    assert isinstance(backends["tiny"], LlamaCppBackendSpec)
    assert backends["tiny"].slots == 3
    assert isinstance(backends["vllm"], OpenAIBackendSpec)
    assert backends["vllm"].api_key is None


def test_a_variable_brings_a_value_and_never_structure(tmp_path: Path) -> None:
    env = {**ENV, "TEAM": "a}, evil: {b: ${API_KEY}"}

    backend = load_policy(write(tmp_path, GOOD), env).file.backends["vllm"]

    assert isinstance(backend, OpenAIBackendSpec)
    assert backend.headers == {"X-Team": "a}, evil: {b: ${API_KEY}"}


def test_bytes_of_the_environment_that_are_no_text_are_refused(tmp_path: Path) -> None:
    text, place = edited("answer: no", "answer: »${BYTES}")

    with pytest.raises(PolicyError, match="expected text, got what") as caught:
        load_policy(write(tmp_path, text), {**ENV, "BYTES": "\udcff"})

    assert first_place(caught.value) == place


def test_what_is_odd_but_works_is_a_warning(tmp_path: Path) -> None:
    text = (
        GOOD.replace("[tiny, played]", "[tiny]")
        .replace("context_window: 2048", "context_window: 4096")
        .replace("fallbacks: [1e3]", "fallbacks: [1e3, small-1]")
    )

    warnings = load_policy(write(tmp_path, text), ENV).warnings

    assert [(warning.line, warning.column, warning.path) for warning in warnings] == [
        (18, 3, "backends.played"),
        (25, 16, "models.small-1.backends[0]"),
        (42, 22, "routes.fast.fallbacks[1]"),
    ]


def test_the_version_is_that_of_what_the_file_says(tmp_path: Path) -> None:
    def version(text: str, env: dict[str, str] = ENV) -> str:
        return load_policy(write(tmp_path, text), env).version

    reordered = GOOD.replace("  max_attempts: 2\n  budget: 0.1", "  budget: 0.10  # spare\n  max_attempts: 2")
    assert reordered != GOOD
    assert version(reordered) == version(GOOD)
    assert version(GOOD.replace("total: 5m", "total: 300")) == version(GOOD)
    assert version(GOOD.replace("0.0375", "0.0376")) != version(GOOD)
    assert version(GOOD, {**ENV, "API_KEY": "another"}) != version(GOOD)


def test_the_version_does_not_depend_on_where_the_file_stands(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    assert load_policy(write(elsewhere, GOOD), ENV).version == load_policy(write(tmp_path, GOOD), ENV).version


@pytest.mark.parametrize(
    ("content", "place", "said"),
    [
        (b"", (1, 1), "the file is empty"),
        (b"# only words\n", (1, 1), "the file is empty"),
        (b"---\n", (1, 1), "the file is empty"),
        (b"just words", (1, 1), "expected a mapping, got 'just words'"),
        (b"- a\n- b\n", (1, 1), "expected a mapping, got a list"),
        (b"name: x\nbackends: \xff\n", (2, 11), "not UTF-8"),
        ("name: x".encode("utf-16"), (1, 1), "not UTF-8"),
        (b"name: " + b"x" * MAX_BYTES, (1, 1), "larger than 1048576 bytes"),
        (b"[" * 1000, (1, 33), "nested deeper than 32 levels"),
        (b"a: &a [*a]", (1, 8), "alias *a stands inside what it names"),
    ],
)
def test_what_is_no_policy_at_all_is_said_so(tmp_path: Path, content: bytes, place: tuple[int, int], said: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(content)

    with pytest.raises(PolicyError) as caught:
        load_policy(path, ENV)

    assert first_place(caught.value) == place
    assert said in str(caught.value)


def test_a_file_that_can_not_be_read_is_said_so(tmp_path: Path) -> None:
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    for path, said in (
        (tmp_path / "none.yaml", "none.yaml:1:1: no such file"),
        (tmp_path, "is a directory"),
        (loop, "can not be read: Too many levels of symbolic links"),
        (tmp_path / "a\0b", "can not be read: not a path"),
        (tmp_path / ("x" * 300), "can not be read: File name too long"),
    ):
        with pytest.raises(PolicyError, match=said):
            load_policy(path, ENV)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert load_policy(write(tmp_path, "\ufeff" + GOOD), ENV).file.name == "everything"


def test_windows_line_ends_are_line_ends(tmp_path: Path) -> None:
    text, place = edited("threshold: 0.5", "threshold: »1.5")

    assert first_place(refused(tmp_path, text.replace("\n", "\r\n"))) == place


def bomb_of_aliases() -> str:
    """Ten thousand models of ten thousand backends each, in a hundred thousand letters."""
    words = ",".join(["b"] * 10_000)
    models = "\n".join(f"  m{i}: *m" for i in range(10_000))
    model = f"m: &m {{context_window: 1, backends: [{words}]}}"
    return f"name: x\nbackends: {{b: {{kind: scripted}}}}\nmodels:\n  {model}\n{models}\n"


def bomb_of_merges() -> str:
    keys = ",".join(f"k{i}: 1" for i in range(1_000))
    merges = ",".join(["*a"] * 10_000)
    return f"name: x\nx-a: &a {{{keys}}}\nx-b: {{<<: [{merges}]}}\n"


@pytest.mark.parametrize(("bomb", "said"), [(bomb_of_aliases, "aliases expand to"), (bomb_of_merges, "<< merges more")])
def test_aliases_can_not_grow_without_bound(tmp_path: Path, bomb: object, said: str) -> None:
    assert callable(bomb)

    assert said in str(refused(tmp_path, bomb()))


def test_a_file_of_another_kind_is_not_judged_to_its_end(tmp_path: Path) -> None:
    error = refused(tmp_path, "\n".join(f"key{i}: x" for i in range(5_000)))

    assert len(error.mistakes) == MAX_MISTAKES + 1
    assert "stopped after 100 mistakes" in str(error)


def test_the_shipped_policies_load_without_a_warning(tmp_path: Path) -> None:
    for weights in ("smollm2-135m-instruct.gguf", "gemma-3-270m.gguf"):
        (tmp_path / weights).touch()
    env = {"FOREBAY_MODELS": str(tmp_path), "OPENAI_API_KEY": SECRET}
    shipped = sorted(Path("policies").glob("*.yaml"))
    assert {path.name for path in shipped} >= {"demo.yaml", "openai.yaml"}

    for path in shipped:
        assert load_policy(path, env).warnings == ()


def test_the_demo_prices_the_large_model_ten_times_the_small_one(tmp_path: Path) -> None:
    for weights in ("smollm2-135m-instruct.gguf", "gemma-3-270m.gguf"):
        (tmp_path / weights).touch()
    models = load_policy(Path("policies/demo.yaml"), {"FOREBAY_MODELS": str(tmp_path)}).file.models

    small, large = models["smollm2-135m"].price, models["gemma-3-270m"].price

    assert (large.input, large.output) == (10 * small.input, 10 * small.output)


@pytest.mark.parametrize(
    ("word", "near"),
    [("smal", "small"), ("samll", "small"), ("SMALL", "small"), ("smaller", "small"), ("lrage", "large"), ("x", None),
     ("medium", None), ("", None)],
)  # fmt: skip
def test_a_suggestion_is_the_fewest_edits_away_or_none(word: str, near: str | None) -> None:
    assert nearest(word, ["small", "large", "threshold"]) == near


def test_of_names_equally_near_the_first_is_suggested() -> None:
    assert nearest("ab", ["aa", "bb"]) == "aa"


def test_a_total_below_the_default_of_a_phase_cuts_it_short_and_is_no_mistake(tmp_path: Path) -> None:
    text = GOOD.replace("    token_delay: 5ms", "    timeouts: {total: 5s}")
    assert text != GOOD

    backend = load_policy(write(tmp_path, text), ENV).file.backends["played"]

    assert backend.timeouts is not None
    assert (backend.timeouts.first_token, backend.timeouts.total) == (None, 5.0)


def test_loading_reads_no_environment_but_the_one_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "API_KEYS", "ambient")
    text, _ = edited("${API_KEY}", "»${API_KEYS}")

    assert "API_KEYS is not set" in str(refused(tmp_path, text))
