"""A policy file in which everything is used, and what the tests do to it."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import msgspec

from policies.duration import Duration
from policies.load import parse_policy
from policies.mistakes import Place, PolicyError, PolicyMistake
from policies.money import UsdPer1M

SECRET = "sk-very-secret-4711"
ENV = {"API_KEY": SECRET, "SLOTS": "4", "EMPTY": ""}

GOOD = """\
name: everything
x-shared: &timeouts {first_token: 10s, total: 60s}
backends:
  tiny:
    kind: llamacpp
    weights: tiny.gguf
    slots: ${SLOTS}
    chat_template: "$${not a variable}"
    stop: ["\\n\\n", Q]
  vllm:
    kind: openai
    url: http://127.0.0.1:8000/v1
    api_key: ${API_KEY}
    headers: {X-Team: "${TEAM:-core}"}
    timeouts:
      <<: *timeouts
      total: 90
  played:
    kind: scripted
    answer: no
    token_delay: 5ms
    fault: none
models:
  small-1:
    backends: [tiny, played]
    context_window: 2048
    price: {input: 0.0375, output: 1}
    capabilities: [tools, logprobs]
  "1e3":
    backends: [vllm]
    context_window: 8192
    max_output_tokens: 1024
routes:
  auto:
    strategy: threshold
    small: small-1
    large: 1e3
    threshold: 0.5
  fast:
    strategy: fixed
    model: small-1
    fallbacks: [1e3]
cache:
  exact: {enabled: true, ttl: 1h, ttl_jitter: 0.2}
timeouts:
  first_token: 20s
  total: 5m
retries:
  max_attempts: 2
  budget: 0.1
"""


def write(folder: Path, text: str, name: str = "policy.yaml") -> Path:
    (folder / "tiny.gguf").touch()
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def edited(old: str, new: str) -> tuple[str, Place]:
    """GOOD with `old` replaced by `new`, and the place of the mark `»` in `new`, which is taken out."""
    assert GOOD.count(old) == 1, f"{old!r} stands {GOOD.count(old)} times"
    marked = GOOD.replace(old, new)
    before = marked[: marked.index("»")].split("\n")
    return marked.replace("»", ""), Place(len(before), len(before[-1]) + 1)


def mistakes_in(content: bytes, folder: Path) -> tuple[PolicyMistake, ...]:
    """What is wrong with a policy file that holds `content`; nothing where it loads."""
    try:
        parse_policy(content, folder / "policy.yaml", ENV)
    except PolicyError as error:
        return error.mistakes
    return ()


def first_place(error: PolicyError) -> Place:
    return Place(error.mistakes[0].line, error.mistakes[0].column)


def dump(value: object, *, sort_keys: bool = False) -> str:
    """A struct of a policy as YAML (of the JSON kind), every field written out."""
    text = json.dumps(_written(value), ensure_ascii=False, sort_keys=sort_keys)
    # YAML takes fewer characters as they are than JSON does.
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _written(value: object) -> object:
    match value:
        case Duration():
            return float(value)
        case UsdPer1M():
            return str(Decimal(int(value)).scaleb(-9))
        case msgspec.Struct():
            config = value.__struct_config__
            tag = {config.tag_field: config.tag} if config.tag_field else {}
            return tag | {name: _written(getattr(value, name)) for name in value.__struct_fields__}
        case dict():
            return {name: _written(part) for name, part in value.items()}
        case tuple():
            return [_written(part) for part in value]
        case str():
            # As an operator would: `${` in a text is not a variable.
            return value.replace("${", "$${")
    return value
