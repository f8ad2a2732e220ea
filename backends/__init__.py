"""What answers: the domain types of a chat, the `Backend` protocol and everything that speaks to an engine.

Read `chat` first (a request, the events of an answer, usage), then `backend` (the protocol), then `attempts`
(how one call becomes several: deadline, retry, fallback, ejection). `openai_http` speaks to any OpenAI-compatible
engine, `llamacpp` to a local llama.cpp, `scripted` plays whatever a test writes down. `fold` turns the frames of a
stream into the completion they add up to, and back. `catalog` holds model cards: prices, windows, capabilities.

This package knows no tenant, no policy and no web framework.
"""
