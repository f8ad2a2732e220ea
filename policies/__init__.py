"""What an operator decides and what must survive: tenants and keys, policy files, the ledger, shared state.

`routing_policy` and `cache_policy` are the frozen structs of a policy file; `load` reads one and says line, column and
remedy of every mistake; `watch` swaps snapshots while requests run. `tenant` says who asks, `store` is the SQL record,
`secrets` derives every subkey from one root secret. `ledger` reserves before a call and settles after it;
`shared_state` is the one connection to Redis, its key grammar and its circuit breaker.

The shipped policies are the YAML files beside this text.
"""
