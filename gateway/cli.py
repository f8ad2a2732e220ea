"""The command line: `forebay serve`, `demo`, `check`, `explain`, `keys`, `config`, `schema`.

Each command is thin: it reads its options, calls one function and prints what that returns. Exit status: 0 done,
1 it did not work, 2 the input is at fault.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import uvloop
from cyclopts import App, Parameter
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from backends.templates import template_fault
from gateway.app import load_root_secret, open_store
from gateway.children import ChildEvent
from gateway.errors import RequestError
from gateway.explain import Explanation, explain_request
from gateway.openai.translate import read_chat
from gateway.processes import AlreadyRunning, CannotListen
from gateway.serve import Announcement, serve
from gateway.settings import SECRET_FIELDS, SUPERVISOR_FIELDS, ResolvedSettings, SettingError, resolve_settings
from gateway.snapshot import UnknownModel
from gateway.worker import run_worker
from policies.load import load_policy
from policies.mistakes import PolicyError
from policies.schema import policy_schema
from policies.secrets import RootSecretTooShort
from policies.store import Store, StoreError
from policies.tenant import NewKey
from routing.decision import NoEligibleModel

T = TypeVar("T")

DEMO_POLICY = Path(__file__).parent.parent / "policies" / "demo.yaml"

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
keys_app = App(name="keys", help="Create, list and revoke API keys.")
app.command(keys_app)

PolicyPath = Annotated[Path, Parameter(help="A policy file (YAML).")]
DataDir = Annotated[str | None, Parameter(help="Where state that must survive is kept. Default: .forebay")]


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
    log_format: Annotated[str | None, Parameter(help="console or json. Default: console")] = None,
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
    port: Annotated[int | None, Parameter(help="Port to listen on; 0 picks a free one. Default: 8080")] = None,
    workers: Annotated[int | None, Parameter(help="Worker processes. Default: 1")] = None,
    data_dir: DataDir = None,
) -> int:
    """Serve two real, tiny models on this machine, with a key and lines to paste. They prove the plumbing only."""
    from gateway import demo_models

    resolved = resolve_settings({"policy": str(DEMO_POLICY), "port": port, "workers": workers, "data_dir": data_dir})
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
        _console().print(f"[yellow]warning[/] {warning}", highlight=False)
    file = loaded.file
    _console().print(
        f"[green]ok[/] {loaded.label}: {len(file.routes)} routes, {len(file.models)} models, "
        f"{len(file.backends)} backends",
        highlight=False,
    )
    return 0


@app.command
def explain(
    policy: PolicyPath,
    /,
    *,
    prompt: Annotated[str | None, Parameter(help="What a user would ask.")] = None,
    request: Annotated[
        Path | None, Parameter(help="A file with the JSON body of a chat completion; - reads stdin.")
    ] = None,
    model: Annotated[str, Parameter(help="Route or model to ask for, with --prompt.")] = "auto",
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> int:
    """Say what a policy would do with a request, and why, without calling a model."""
    if (prompt is None) == (request is None):
        return _fail("give exactly one of --prompt TEXT and --request FILE")
    if prompt is not None:
        body = msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": prompt}]})
    else:
        assert request is not None  # noqa: S101 - one of the two is given
        body = sys.stdin.buffer.read() if str(request) == "-" else request.read_bytes()
    explanation = explain_request(load_policy(policy, os.environ, template_fault), read_chat(body))
    if json:
        print(msgspec.json.format(msgspec.json.encode(explanation)).decode())
    else:
        _print_explanation(explanation)
    return 0


@app.command
def config(
    *, json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False, data_dir: DataDir = None
) -> int:
    """Show every setting in force, and where its value came from."""
    resolved = resolve_settings({"data_dir": data_dir})
    shown = {
        name: "(set, not shown)" if name in SECRET_FIELDS and value else value
        for name, value in msgspec.structs.asdict(resolved.settings).items()
        if name not in SUPERVISOR_FIELDS
    }
    if json:
        rows = {name: {"value": value, "origin": resolved.origins[name]} for name, value in shown.items()}
        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return 0
    table = Table("setting", "value", "from", box=SIMPLE, pad_edge=False)
    for name, value in shown.items():
        table.add_row(name, str(value), resolved.origins[name])
    _print_table(table)
    for variable in resolved.unknown:
        _console().print(f"[yellow]note[/] {variable} names no setting (a policy may use it)", highlight=False)
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


@keys_app.command(name="create")
def create_key(
    *,
    tenant: Annotated[str, Parameter(help="The tenant's name or id. A new name makes a new tenant.")],
    organisation: Annotated[
        str | None, Parameter(help="Organisation of a new tenant. Default: the tenant's name.")
    ] = None,
    name: Annotated[str, Parameter(help="What the key is for.")] = "",
    model: Annotated[list[str] | None, Parameter(help="Allow only this model or route; repeat for more.")] = None,
    debug: Annotated[bool, Parameter(help="Let it ask for x-forebay-debug.", negative="")] = False,
    expires: Annotated[datetime | None, Parameter(help="Day it ends (UTC), like 2027-01-31.")] = None,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
    data_dir: DataDir = None,
) -> int:
    """Create an inference key. It is shown once and cannot be read back."""

    async def create(store: Store) -> NewKey:
        tenant_id = await _tenant_id(store, tenant, organisation)
        return await store.create_key(
            tenant_id,
            name=name,
            allowed_models=frozenset(model) if model else None,
            may_debug=debug,
            expires_at=int(expires.replace(tzinfo=expires.tzinfo or UTC).timestamp()) if expires else None,
        )

    new_key = _with_store(data_dir, create)
    if json:
        print(
            msgspec.json.encode(
                {"key": new_key.key, "id": new_key.record.id, "tenant_id": new_key.record.tenant_id}
            ).decode()
        )
        return 0
    print(new_key.key)
    _errors().print(
        f"Key {new_key.record.id} of tenant {new_key.record.tenant_name}. It is not shown again.", highlight=False
    )
    return 0


@keys_app.command(name="list")
def list_keys(
    *, json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False, data_dir: DataDir = None
) -> int:
    """List keys: what they are for and whether they work, never the keys themselves."""
    records = _with_store(data_dir, lambda store: store.list_keys())
    if json:
        print(msgspec.json.format(msgspec.json.encode(records)).decode())
        return 0
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("id", "key", "role", "tenant", "name", "models", "state"):
        table.add_column(column, no_wrap=column in ("id", "key"))
    now = datetime.now(UTC).timestamp()
    for record in records:
        state = (
            f"revoked {_day(record.revoked_at)}"
            if record.revoked_at is not None
            else f"expired {_day(record.expires_at)}"
            if record.expires_at is not None and record.expires_at <= now
            else f"until {_day(record.expires_at)}"
            if record.expires_at is not None
            else "active"
        )
        models = "all" if record.allowed_models is None else ", ".join(sorted(record.allowed_models))
        table.add_row(record.id, f"{record.prefix}…", record.role, record.tenant_name or "", record.name, models, state)
    _print_table(table)
    return 0


@keys_app.command(name="revoke")
def revoke_key(
    key_id: Annotated[str, Parameter(help="The key's id, see `forebay keys list`.")], /, *, data_dir: DataDir = None
) -> int:
    """Revoke a key: running workers refuse it within a second."""
    record = _with_store(data_dir, lambda store: store.revoke_key(key_id))
    print(f"revoked {record.id} ({record.prefix}…)")
    return 0


def main() -> None:
    """The console script."""
    try:
        sys.exit(app(result_action="return_value"))
    except (
        PolicyError,
        SettingError,
        RequestError,
        UnknownModel,
        NoEligibleModel,
        RootSecretTooShort,
        StoreError,
    ) as error:
        sys.exit(_fail(str(error), status=2))
    except (CannotListen, AlreadyRunning, OSError) as error:
        sys.exit(_fail(str(error), status=1))


def _serve(
    resolved: ResolvedSettings,
    environment: dict[str, str],
    on_serving: Callable[[Announcement], None],
    prepare: Callable[[Store], Coroutine[Any, Any, None]] | None = None,
) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(
            serve(resolved.settings, environment, on_event=_print_child_event, on_serving=on_serving, prepare=prepare)
        )


def _with_store(data_dir: str | None, work: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
    settings = resolve_settings({"data_dir": data_dir}).settings

    async def run() -> T:
        async with open_store(settings, load_root_secret(settings)) as store:
            return await work(store)

    return asyncio.run(run())


async def _tenant_id(store: Store, tenant: str, organisation: str | None) -> str:
    for known in await store.list_tenants():
        if tenant in (known.id, known.name):
            return known.id
    wanted = organisation or tenant
    for owner in await store.list_organisations():
        if wanted in (owner.id, owner.name):
            return (await store.create_tenant(owner.id, tenant)).id
    return (await store.create_tenant((await store.create_organisation(wanted)).id, tenant)).id


def _print_child_event(event: ChildEvent) -> None:
    style = {"died": "yellow", "failed": "red", "killed": "red", "ready": "green"}.get(event.kind, "dim")
    _errors().print(f"  process  [{style}]{event}[/]", highlight=False)


def _announce_serving(announcement: Announcement) -> None:
    console = _errors()
    for warning in announcement.policy.warnings:
        console.print(f"  [yellow]warning[/]  {warning}", highlight=False)
    console.print(f"\nServing [bold]{announcement.policy.label}[/] on [bold]{announcement.url}[/]", highlight=False)
    if announcement.owner_key is not None:
        console.print(
            f"First start: the owner's admin key, shown only this once:\n  [bold]{announcement.owner_key.key}[/]",
            highlight=False,
        )


def _print_first_steps(url: str, key: str) -> None:
    print(
        f"""
Two tiny models answer (135 and 270 million parameters): they prove the plumbing, not quality.
Local models may take a few seconds to load; until then the gateway answers 503.

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

Models: auto (the policy decides), fast, smart. Health: {url}/readyz  Metrics: {url}/metrics
Stop with Ctrl-C.
""",
        flush=True,
    )


def _print_explanation(explanation: Explanation) -> None:
    console = _console()
    console.print(f"policy     {explanation.policy}", highlight=False)
    console.print(f"asked for  {explanation.asked_for}" + ("" if explanation.route else " (a model)"), highlight=False)
    if explanation.score is not None:
        console.print(
            f"difficulty {explanation.score.value:.4f} by {explanation.score.scorer}"
            + (f", threshold {explanation.threshold:g}" if explanation.threshold is not None else ""),
            highlight=False,
        )
        for name, value in explanation.score.features.items():
            if value:
                console.print(f"           {name} {value:g}", highlight=False)
    console.print(f"decision   [bold]{explanation.candidates[0].model}[/] ({explanation.reason})", highlight=False)
    table = Table("candidate", "backends", "reserves tokens", "reserves USD", box=SIMPLE, pad_edge=False)
    for candidate in explanation.candidates:
        table.add_row(
            candidate.model, ", ".join(candidate.backends), str(candidate.reserved_tokens), candidate.reserved_usd
        )
    _print_table(table)
    for rejection in explanation.rejected:
        console.print(f"not        {rejection.model}: {rejection.reason}", highlight=False)
    console.print(f"cache      {explanation.cache}", highlight=False)
    console.print(f"prompt     about {explanation.prompt_tokens} tokens", highlight=False)


def _print_table(table: Table) -> None:
    """As wide as its content: an id that is cut off cannot be pasted."""
    Console(width=1000).print(table)


def _day(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).date().isoformat()


def _fail(message: str, status: int = 2) -> int:
    _errors().print(f"[red]error[/] {message}" if "\n" not in message else message, highlight=False, soft_wrap=True)
    return status


def _console() -> Console:
    return Console(soft_wrap=True)


def _errors() -> Console:
    return Console(stderr=True)
