"""The command line: `forebay serve`, `demo`, `check`, `explain`, `keys`, `config`, `schema`.

Each command is thin: it reads its options, calls one function and prints what that returns. Exit status: 0 done,
1 it did not work, 2 the input is at fault.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import uvloop
from cyclopts import App, Parameter
from rich.box import SIMPLE
from rich.table import Table

from backends.templates import template_fault
from gateway.children import ChildEvent
from gateway.cli_keys import AsJson, DataDir, UnclearRequest, keys_app
from gateway.errors import RequestError
from gateway.explain import Explanation, explain_request, prompt_body, read_request
from gateway.processes import AlreadyRunning, CannotListen
from gateway.serve import Announcement, serve
from gateway.settings import ENVIRONMENT_PREFIX, ResolvedSettings, SettingError, Settings, resolve_settings, shown
from gateway.snapshot import UnknownModel
from gateway.terminal import report, say, say_table
from gateway.triton_install import TritonUnavailable
from gateway.worker import run_worker
from policies.interpolation import referenced
from policies.load import load_policy, read_policy
from policies.mistakes import PolicyError, nearest
from policies.schema import policy_schema
from policies.secrets import RootSecretTooShort
from policies.store import Store, StoreError
from routing.decision import NoEligibleModel

_POLICIES = Path(__file__).parent.parent / "policies"
DEMO_POLICIES = {"llamacpp": _POLICIES / "demo.yaml", "triton": _POLICIES / "demo-triton.yaml"}
"""By the engine that serves the demo's two models."""

app = App(
    name="forebay",
    help_format="plaintext",
    version=lambda: version("forebay"),
    help="""An LLM gateway: small or large model as the policy decides, exact answers from the cache.

    First steps:

        forebay demo                       two small local models behind a gateway, nothing else needed
        forebay check my-policy.yaml       every mistake in a policy, with line and remedy
        forebay serve --policy my-policy.yaml
        forebay keys create --tenant acme  a key for a client

    Every option of `serve` can be given as FOREBAY_<NAME> too; `forebay config` shows what is in force and from where.
    """,
)
app.command(keys_app)

PolicyPath = Annotated[Path, Parameter(help="A policy file (YAML).")]


@app.command(name="serve")
def serve_command(
    *,
    policy: Annotated[
        str | None, Parameter(help="The policy file to serve by; changes to it take effect at once.")
    ] = None,
    host: Annotated[str | None, Parameter(help="Address to listen on. Default: 127.0.0.1")] = None,
    port: Annotated[int | None, Parameter(help="Port to listen on; 0 picks a free one. Default: 8080")] = None,
    workers: Annotated[int | None, Parameter(help="Worker processes; one per core is right. Default: 1")] = None,
    data_dir: DataDir = None,
    log_format: Annotated[Literal["console", "json"] | None, Parameter(help="Default: console")] = None,
) -> int:
    """Serve a policy: workers, embedded Valkeys, and the local models that the policy names."""
    options = {
        "policy": policy,
        "host": host,
        "port": port,
        "workers": workers,
        "data_dir": data_dir,
        "log_format": log_format,
    }
    resolved = resolve_settings(options)
    if not resolved.settings.policy:
        return _fail("no policy: give one with --policy FILE, or try `forebay demo`")
    return _serve(resolved, os.environ.copy(), _announce_serving)


@app.command
def demo(
    *,
    backend: Annotated[
        Literal["llamacpp", "triton"], Parameter(help="What serves the models; triton is a real Triton on the CPU.")
    ] = "llamacpp",
    port: Annotated[int | None, Parameter(help="Port to listen on; 0 picks a free one. Default: 8080")] = None,
    workers: Annotated[int | None, Parameter(help="Worker processes. Default: 1")] = None,
    data_dir: DataDir = None,
) -> int:
    """Serve two real, tiny models on this machine, with a key and lines to paste. They prove the plumbing only."""
    from gateway import demo_models

    resolved = resolve_settings(
        {"policy": str(DEMO_POLICIES[backend]), "port": port, "workers": workers, "data_dir": data_dir}
    )
    models = resolved.settings.data_path.absolute() / "models"
    if status := demo_models.main([str(models)]):
        return status
    key_file = resolved.settings.data_path / "demo-key"
    environment = {**os.environ, "FOREBAY_MODELS": str(models)}

    async def prepare(store: Store) -> None:
        """The demo tenant is made once; its key is kept in a file, since a demo's key is there to be pasted."""
        tenant, new_key = await store.ensure_demo_tenant()
        if new_key is None and not key_file.exists():
            new_key = await store.create_key(tenant.id, name="demo", may_debug=True)
        if new_key is not None:
            key_file.touch(mode=0o600)
            key_file.write_text(new_key.key)

    def announce(announcement: Announcement) -> None:
        _announce_serving(announcement)
        _print_first_steps(announcement.url, key_file.read_text())

    return _serve(resolved, environment, announce, prepare)


@app.command
def check(policy: PolicyPath, /) -> int:
    """Read a policy and name every mistake with its line, column and remedy. Exit status 2 where there is one."""
    loaded = load_policy(policy, os.environ, template_fault)
    for warning in loaded.warnings:
        say(("warning", "yellow"), f" {warning}")
    file = loaded.file
    counted = f"{len(file.routes)} routes, {len(file.models)} models, {len(file.backends)} backends"
    say(("ok", "green"), f" {loaded.label}: {counted}")
    return 0


@app.command
def explain(
    policy: PolicyPath,
    /,
    *,
    prompt: Annotated[str | None, Parameter(help="What a user would ask.")] = None,
    request: Annotated[
        Path | None, Parameter(help="A file with the JSON body of a request; - reads stdin.", allow_leading_hyphen=True)
    ] = None,
    model: Annotated[str, Parameter(help="Route or model to ask for, with --prompt.")] = "auto",
    json: AsJson = False,
) -> int:
    """Say what a policy would do with a request, and why, without calling a model."""
    if (prompt is None) == (request is None):
        return _fail("give exactly one of --prompt TEXT and --request FILE")
    loaded = load_policy(policy, os.environ, template_fault)
    if prompt is not None:
        body = prompt_body(loaded, model, prompt)
    else:
        assert request is not None  # noqa: S101 - one of the two is given
        body = sys.stdin.buffer.read() if str(request) == "-" else request.read_bytes()
    explanation = explain_request(loaded, read_request(loaded, body))
    if json:
        print(msgspec.json.format(msgspec.json.encode(explanation)).decode())
    else:
        _print_explanation(explanation)
    return 0


@app.command
def config(*, json: AsJson = False, data_dir: DataDir = None) -> int:
    """Show every setting in force, and where its value came from. No secret and no password is shown."""
    resolved = resolve_settings({"data_dir": data_dir})
    settings = shown(resolved.settings)
    if json:
        rows = {name: {"value": value, "origin": resolved.origins[name]} for name, value in settings.items()}
        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return 0
    table = Table("setting", "value", "from", box=SIMPLE, pad_edge=False)
    for name, value in settings.items():
        table.add_row(name, str(value), resolved.origins[name])
    say_table(table)
    _note_unknown(resolved)
    return 0


@app.command
def schema() -> int:
    """Print the JSON Schema of policy files, for editors."""
    print(msgspec.json.format(msgspec.json.encode(policy_schema())).decode())
    return 0


@app.command(show=False)
def worker(*, fd: int) -> int:
    """A worker of `forebay serve`; started by it, never by hand."""
    run_worker(resolve_settings({}).settings, fd, os.environ.copy())
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script, on `arguments` or those of the process. Raises SystemExit."""
    try:
        sys.exit(app(arguments, result_action="return_value"))
    except (
        PolicyError,
        SettingError,
        UnclearRequest,
        RequestError,
        UnknownModel,
        NoEligibleModel,
        RootSecretTooShort,
        StoreError,
    ) as error:
        sys.exit(_fail(str(error), status=2))
    except (CannotListen, AlreadyRunning, TritonUnavailable, OSError) as error:
        sys.exit(_fail(str(error), status=1))


def _serve(
    resolved: ResolvedSettings,
    environment: dict[str, str],
    on_serving: Callable[[Announcement], None],
    prepare: Callable[[Store], Coroutine[Any, Any, None]] | None = None,
) -> int:
    _note_unknown(resolved)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(
            serve(
                resolved.settings,
                environment,
                on_event=_print_child_event,
                on_serving=on_serving,
                on_progress=lambda line: report(f"  triton   {line}"),
                prepare=prepare,
            )
        )


def _print_child_event(event: ChildEvent) -> None:
    style = {"died": "yellow", "failed": "red", "killed": "red", "ready": "green"}.get(event.kind, "dim")
    report("  process  ", (str(event), style))


def _announce_serving(announcement: Announcement) -> None:
    for warning in announcement.policy.warnings:
        report("  ", ("warning", "yellow"), f"  {warning}")
    report("\nServing ", (announcement.policy.label, "bold"), " on ", (announcement.url, "bold"))
    if announcement.owner_key is not None:
        report("First start: the owner's admin key, shown only this once:\n  ", (announcement.owner_key.key, "bold"))
    if announcement.owner_key_trouble:
        remedy = "where there is none yet, `forebay keys create --admin owner` makes one"
        report("  ", ("warning", "yellow"), f"  no owner's key was made: {announcement.owner_key_trouble}; {remedy}")


def _print_first_steps(url: str, key: str) -> None:
    print(
        f"""
Two tiny models answer (135 and 270 million parameters): they prove the plumbing, not quality.
Local models may take a few seconds to load; until then they answer 502 or 503, and /readyz says what is missing.

Try it:

  curl -i {url}/v1/chat/completions \\
    -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\
    -d '{{"model": "auto", "messages": [{{"role": "user", "content": "Name three colors."}}], "temperature": 0}}'

Ask again: `x-forebay-cache` turns from miss to exact. From Python (`pip install openai`):

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="{key}")
  for chunk in client.chat.completions.create(
      model="auto", stream=True, messages=[{{"role": "user", "content": "Tell me a story."}}], max_tokens=60
  ):
      print(chunk.choices[0].delta.content or "", end="", flush=True)

Models: auto (the policy decides), fast, smart; minilm at /v1/embeddings. Health: {url}/readyz  Metrics: {url}/metrics
Stop with Ctrl-C.
""",
        flush=True,
    )


def _print_explanation(explanation: Explanation) -> None:
    say(f"policy     {explanation.policy}")
    say(f"asked for  {explanation.asked_for}", "" if explanation.route else " (a model)")
    if explanation.score is not None:
        threshold = f", threshold {explanation.threshold:g}" if explanation.threshold is not None else ""
        say(f"difficulty {explanation.score.value:.4f} by {explanation.score.scorer}{threshold}")
        for name, value in explanation.score.features.items():
            if value:
                say(f"           {name} {value:g}")
    say("decision   ", (explanation.candidates[0].model, "bold"), f" ({explanation.reason})")
    table = Table("candidate", "backends", "reserves tokens", "reserves USD", box=SIMPLE, pad_edge=False)
    for candidate in explanation.candidates:
        table.add_row(
            candidate.model, ", ".join(candidate.backends), str(candidate.reserved_tokens), candidate.reserved_usd
        )
    say_table(table)
    for rejection in explanation.rejected:
        say(f"not        {rejection.model}: {rejection.reason}")
    say(f"cache      {explanation.cache}")
    say(f"prompt     about {explanation.prompt_tokens} tokens")


def _note_unknown(resolved: ResolvedSettings) -> None:
    """Say which variables look like settings and are none, nor used by the policy."""
    used: frozenset[str] = frozenset()
    with suppress(PolicyError):  # whoever needs the policy says why it can not be read
        used = referenced(read_policy(Path(resolved.settings.policy)).decode(errors="replace"))
    for variable in resolved.unknown:
        if variable not in used:
            near = nearest(variable, (f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in Settings.__struct_fields__))
            report(("note", "dim"), f" {variable} names no setting", f"; did you mean {near}?" if near else "")


def _fail(message: str, status: int = 2) -> int:
    report(("error ", "red") if "\n" not in message else "", message)
    return status
