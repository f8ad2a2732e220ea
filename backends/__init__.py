"""What answers: the domain types of a chat, the `Backend` protocol and everything that speaks to an engine.

Read `chat` first (a request, the events of an answer, usage), then `backend` (the protocol), then `attempts`
(how one call becomes several: deadline, retry, fallback). `catalog` holds model cards: prices, windows, capabilities.

    openai_http   any OpenAI-compatible engine; openai_quirks puts right what they do otherwise, embeddings vectors
    llamacpp      a local llama.cpp                 triton/      Triton Inference Server, natively
    embedder      our own embedding model           scripted     plays whatever a test writes down
    fan_out       several choices from an engine that gives one at a time
    templates, tokenizer, model_folder              how a model reads a conversation, from its own files
    tool_calls/   reads tool calls out of what a model writes
    health, latency, load_signals, slots            how well a backend does, how fast, how busy, and who may use it
    fold          turns the frames of a stream into the completion they add up to, and back

This package knows no tenant, no policy and no web framework.
"""
