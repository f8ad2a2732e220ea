"""The gateway itself: what faces the outside, and the one place where everything is put together.

Read `pipeline` first: one request from admission to answer. `app` is the composition root, `snapshot` a policy at work,
`context` what is known of a request at the door, `answer` what comes back, `errors` the one table from errors to
responses. `openai/` and `admin/` are the faces, `faces` their routes, `telemetry/` what operators see. `serve` and
`processes` run the process tree, `worker` one process of it, `cli` the command line.

Only this package knows the web framework, the metrics vendor and the environment.
"""
