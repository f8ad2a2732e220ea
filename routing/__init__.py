"""Which model answers: difficulty, eligibility, cost, and the decision with its reasons.

`decision` holds what a decision is; `router` makes one, top to bottom, from a compiled policy; `difficulty` scores a
request behind the `Scorer` protocol; `eligibility` says which models can answer at all; `cost` estimates what an answer
may take; `balance` orders the replicas of a model. Nothing here performs I/O.
"""
