"""Records what a real llama.cpp answers into `llamacpp/`: `python -m tests.cassettes.record`, then look at the diff."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.engines import SMOLLM2, llamacpp_server

FOLDER = Path(__file__).parent / "llamacpp"

CHAT: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Say hello in French, then in German: äöü."}],
    "max_tokens": 12,
    "temperature": 0,
    "seed": 1,
}
TEXT: dict[str, Any] = {"model": "smollm2", "prompt": "One, two,", "max_tokens": 6, "temperature": 0, "seed": 1}
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
LONG = [{"role": "user", "content": "word " * 2000}]

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat.sse": ("chat/completions", CHAT | STREAM),
    "chat.json": ("chat/completions", CHAT),
    "chat_logprobs.sse": ("chat/completions", CHAT | STREAM | {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}),
    "text.sse": ("completions", TEXT | STREAM),
    "text.json": ("completions", TEXT),
    "error_context.json": ("chat/completions", CHAT | STREAM | {"messages": LONG}),
}


def record() -> None:
    with llamacpp_server(SMOLLM2) as url:
        for name, (path, body) in REQUESTS.items():
            request = urllib.request.Request(
                f"{url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = response.read()
            except urllib.error.HTTPError as error:
                with error:
                    answer = error.read()
            # The engine calls its model by the path of the weights, which is nobody's business.
            (FOLDER / name).write_bytes(answer.replace(f"{SMOLLM2.parent}/".encode(), b"/models/"))


if __name__ == "__main__":
    record()
