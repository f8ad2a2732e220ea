"""Triton Inference Server, spoken to natively: typed tensors over gRPC, one decoupled stream a request.

    dialect   which tensors a model takes and gives, read from its metadata: current, older, llmapi
    sampling  an OpenAI request as the values of those tensors, every field mapped or refused by name
    prompt    a conversation as the text that the model was trained on, images beside it
    server    the gRPC channel to one server: metadata, load and unload, streams, errors by cause
    reading   what comes back: text by pieces or as a whole so far, counts, log probabilities, the end
    model     what is known of a model as it is loaded now, and the watch over it
    backend   `TritonBackend`, which puts them together

Read `backend` first. Nothing outside this package knows a tensor's name.
"""
