"""Tool calls in a model's own words, read while they stream: for engines that return plain text.

Read `parser` first: what a parser promises, which formats there are, the schema that forces a call. `pieces` are what
comes out; `source` is the text as far as it has come, less the `ending` that a model stops with; `json_scanner` finds
where a JSON value ends; `call_object` reads one `{"name": ..., "arguments": ...}`, `python_calls` one `f(city="Rome")`.
`hermes`, `llama3` and `mistral` are the formats, each from top to bottom in the order in which a model writes.
"""
