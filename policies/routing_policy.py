"""The frozen structs of a policy file: backends, models, routes, clocks, retries. Prices are USD per 1M tokens here.

Every field that YAML may hold is declared in this module or in `cache_policy`, with its default, unit and meaning; the
JSON Schema for editors is generated from these declarations and `load` refuses whatever they do not name.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from policies.cache_policy import CachePolicy
from policies.duration import Duration
from policies.mistakes import PolicyMistake
from policies.money import UsdPer1M

# `(?!\n)$` is the very end of a text in every dialect of regular expressions; Python's `$` alone lets a newline follow.
Name = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}(?!\n)$",
        description="a name of at most 100 letters, digits and . _ : / - that begins with a letter or digit",
    ),
]
Url = Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s]+(?!\n)$", description="an http:// or https:// URL")]
GrpcUrl = Annotated[
    str, msgspec.Meta(pattern=r"^grpcs?://[^\s/]+/?(?!\n)$", description="a grpc:// or grpcs:// URL of host and port")
]
TritonModelName = Annotated[
    str, msgspec.Meta(pattern=r"^[^/\x00-\x1f]+(?!\n)$", description="the name of a folder in Triton's repository")
]
HeaderName = Annotated[
    str, msgspec.Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+(?!\n)$", description="the name of an HTTP header")
]
HeaderValue = Annotated[
    str,
    msgspec.Meta(pattern=r"^[\t\x20-\x7e]*(?!\n)$", description="the value of an HTTP header, in ASCII on one line"),
]
ApiKey = Annotated[
    str,
    msgspec.Meta(pattern=r"^[\x21-\x7e]+(?!\n)$", description="a key of ASCII letters, digits and signs, no spaces"),
]
Ratio = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class _Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class TlsSpec(_Spec, frozen=True):
    """How the engine proves who it is, and how we do. Paths of PEM files, relative to the policy file."""

    ca: str | None = None
    """The authorities that may have signed the engine's certificate; default: the system's."""
    certificate: str | None = None
    """Our own certificate (with the chain behind it), for an engine that asks for one."""
    key: str | None = None
    """The private key of `certificate`."""
    server_name: str | None = None
    """The name the engine's certificate must be for; default: the host of the URL."""


class OpenAIBackendSpec(_Spec, frozen=True, tag_field="kind", tag="openai"):
    """Any engine or hosted API that speaks OpenAI's protocol."""

    url: Url
    """Base URL up to and including `/v1`."""
    model: str | None = None
    """What the engine calls the model; default: the name it has here."""
    api_key: ApiKey | None = None
    """Sent as a bearer token. Write `${NAME}` and keep the key in the environment."""
    api_key_header: HeaderName | None = None
    """Sends the key bare in this header instead, as `api-key` for Azure."""
    headers: dict[HeaderName, HeaderValue] = {}
    query: dict[str, str] = {}
    """Added to every URL, as `api-version` for Azure."""
    tls: TlsSpec | None = None
    metrics_url: Url | None = None
    """Prometheus metrics of the engine (vLLM, TGI, SGLang, llama.cpp, trtllm-serve), read for balancing."""
    max_connections: Count | None = None
    """Connections per worker that calls use; one that finds none free waits for it within its connect time."""
    max_concurrent: Count | None = None
    """Calls in flight per worker; more are refused at once (and fall back where the route says so)."""
    max_n: Count | None = None
    """The largest `n` the engine takes; a larger one is fanned out into calls of at most that, four at a time."""
    timeouts: BackendTimeoutsSpec | None = None
    """Clocks of this backend's own, in the place of the policy's."""


class LlamaCppBackendSpec(_Spec, frozen=True, tag_field="kind", tag="llamacpp"):
    """A llama.cpp server: at `url`, or started by Forebay from `weights` on a free loopback port."""

    url: Url | None = None
    weights: str | None = None
    """Path of a GGUF file, relative to the policy file (`load` makes it absolute). Exactly one of `url`, `weights`."""
    threads: Count = 1
    slots: Count = 2
    """Requests answered at once."""
    context_tokens: Count = 2048
    """Context window per slot."""
    chat_template: str | None = None
    """A Jinja template that renders `messages` into a plain prompt, for a model without a chat template of its own."""
    stop: tuple[str, ...] = ()
    """Added to the client's stop sequences where `chat_template` is used."""
    max_concurrent: Count | None = None
    timeouts: BackendTimeoutsSpec | None = None
    """Clocks of this backend's own, in the place of the policy's."""


class TritonBackendSpec(_Spec, frozen=True, tag_field="kind", tag="triton"):
    """A model of a Triton Inference Server: TensorRT-LLM's (ensemble, BLS or llmapi) or one with the same tensors.

    What the model takes is read from its metadata. Chat is rendered and tool calls are read here, since the engine
    takes and gives plain text.
    """

    model: TritonModelName
    """The model's name in Triton's repository, such as `ensemble` or `tensorrt_llm_bls`."""
    url: GrpcUrl | None = None
    """Address of the gRPC endpoint, `grpc://host:8001`, or `grpcs://` for TLS."""
    repository: str | None = None
    """Folder of a model repository that Forebay serves itself with a Triton on this machine, relative to the policy
    file. Exactly one of `url`, `repository`."""
    model_folder: str | None = None
    """Folder with the model's `tokenizer_config.json` and `tokenizer.json`, relative to the policy file: where its chat
    template, stop sequences and token counts come from."""
    chat_template: str | None = None
    """A Jinja template in the place of the folder's."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, beside the client's and the model folder's."""
    tool_format: Literal["hermes", "llama3", "mistral", "none"] | None = None
    """How the model writes tool calls; default: as its chat template shows."""
    adds_bos: bool = True
    """Whether the engine puts the begin-of-text token before a prompt, so that a rendered one goes without."""
    draft_tokens: Count | None = None
    """For a BLS model with a draft model: how many tokens it proposes at a time. Answers then come in one piece."""
    remote_images: bool = False
    """Whether image URLs that a client sends may be handed to the engine, which then fetches them from its network."""
    tls: TlsSpec | None = None
    metrics_url: Url | None = None
    """Triton's metrics, `http://host:8002/metrics`, read for balancing."""
    metrics_model: str | None = None
    """What they call the model, where it is another one behind `model`: `tensorrt_llm` for an ensemble or BLS model."""
    max_concurrent: Count | None = None
    timeouts: BackendTimeoutsSpec | None = None
    """Clocks of this backend's own, in the place of the policy's."""


class EmbedderBackendSpec(_Spec, frozen=True, tag_field="kind", tag="embedder"):
    """Forebay's own embedding model (all-MiniLM-L6-v2, int8, 384 dimensions), in a process on this machine."""

    threads: Count = 1
    max_concurrent: Count | None = None
    timeouts: BackendTimeoutsSpec | None = None
    """Clocks of this backend's own, in the place of the policy's."""


class ScriptedBackendSpec(_Spec, frozen=True, tag_field="kind", tag="scripted"):
    """Plays a script instead of a model: for tests, demonstrations and load measurements."""

    answer: str = "This is a scripted answer."
    first_token_delay: Duration = Duration(0.0)
    token_delay: Duration = Duration(0.0)
    fault: Literal["none", "unreachable", "overloaded", "error", "hang", "truncate", "midstream_error", "reset"] = (
        "none"
    )
    fault_after_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_concurrent: Count | None = None
    timeouts: BackendTimeoutsSpec | None = None
    """Clocks of this backend's own, in the place of the policy's."""


PATH_FIELDS = ("weights", "repository", "model_folder", "ca", "certificate", "key")
"""Fields of a backend, or of its `tls`, that are paths: relative to the policy file as written, absolute as loaded."""

BackendSpec = OpenAIBackendSpec | LlamaCppBackendSpec | TritonBackendSpec | EmbedderBackendSpec | ScriptedBackendSpec


class TimeoutsSpec(_Spec, frozen=True):
    """How long each phase of a call may take; all of them inside `total`."""

    connect: Duration = Duration(1.0)
    first_token: Duration = Duration(30.0)
    idle: Duration = Duration(30.0)
    total: Duration = Duration(300.0)


class BackendTimeoutsSpec(_Spec, frozen=True):
    """A backend's own clocks; what is not stated is the policy's. Its `total` is for one attempt at it."""

    connect: Duration | None = None
    first_token: Duration | None = None
    idle: Duration | None = None
    total: Duration | None = None


class RetriesSpec(_Spec, frozen=True):
    max_attempts: Count = 3
    """Attempts per request, over all backends and fallbacks, before the first content token."""
    budget: Ratio = 0.2
    """Retries allowed as a share of requests, per worker, so that a failing backend is not stormed."""


class PriceSpec(_Spec, frozen=True):
    """USD per 1M tokens."""

    input: UsdPer1M = UsdPer1M(0)
    output: UsdPer1M = UsdPer1M(0)
    cached_input: UsdPer1M | None = None


class BalanceSpec(_Spec, frozen=True):
    """How a model's requests are spread over its backends."""

    affinity: bool = True
    """Send the turns of a conversation, and requests with the same long system prompt, to the same backend as long as
    it is not busier than the others: it has read their beginning before."""


class ModelSpec(_Spec, frozen=True):
    backends: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    """Replicas that serve this model, by name."""
    context_window: Count
    """Prompt and completion together, tokens."""
    max_output_tokens: Count | None = None
    price: PriceSpec = PriceSpec()
    capabilities: tuple[Literal["tools", "json_schema", "logprobs", "vision"], ...] = ()
    task: Literal["chat", "embeddings"] = "chat"
    """What it is asked for: chat and text completions, or embeddings."""
    owned_by: str = "forebay"
    balance: BalanceSpec = BalanceSpec()


class FixedRouteSpec(_Spec, frozen=True, tag_field="strategy", tag="fixed"):
    """Always this model; the fallbacks in order when it cannot answer."""

    model: str
    fallbacks: tuple[str, ...] = ()


class ThresholdRouteSpec(_Spec, frozen=True, tag_field="strategy", tag="threshold"):
    """The small model for what is scored below `threshold`, the large one from there on."""

    small: str
    large: str
    threshold: Ratio = 0.5
    """Difficulty in [0, 1], see routing/difficulty. 0 sends everything to the large model."""
    fallbacks: tuple[str, ...] | None = None
    """Default: the other one of the two."""


RouteSpec = FixedRouteSpec | ThresholdRouteSpec


class PolicyFile(_Spec, frozen=True):
    """One policy file, as written."""

    name: Name
    backends: Annotated[dict[Name, BackendSpec], msgspec.Meta(min_length=1)]
    models: Annotated[dict[Name, ModelSpec], msgspec.Meta(min_length=1)]
    routes: dict[Name, RouteSpec] = {}
    """Names that clients use like a model; a model's own name always works too."""
    cache: CachePolicy = CachePolicy()
    timeouts: TimeoutsSpec = TimeoutsSpec()
    retries: RetriesSpec = RetriesSpec()


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """A policy file that passed every check, with the identity that headers and logs name it by."""

    file: PolicyFile
    version: str
    """The first 12 hex digits of the BLAKE2b hash of what the file says."""
    source: str
    """Where it was read from, for people."""
    warnings: tuple[PolicyMistake, ...] = ()
    """What an operator should look at, though it refuses nothing."""

    @property
    def label(self) -> str:
        return f"{self.file.name}@{self.version}"

    @property
    def names(self) -> tuple[str, ...]:
        """Every model and route a client can name, routes first."""
        return (*self.file.routes, *self.file.models)
