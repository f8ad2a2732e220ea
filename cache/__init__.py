"""What is answered without a model: exact answers, identical requests in flight, and (a later chapter) near ones.

`key` says which requests are the same request, `entry` what is kept of an answer and what must never be, `exact` where
it is kept, `inflight` how identical requests share one upstream call, `replay` how a kept answer is told again in the
shape that is asked for. `control` reads the client's `Cache-Control`; `semantic` is the seam of the approximate tier.

Cache trouble is a miss and a reason, never an error: no function here raises because a cache is away.
"""
