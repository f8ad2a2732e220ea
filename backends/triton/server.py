"""One Triton server over gRPC: a channel that all of its models share, and errors by their cause."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import msgspec
from tritonclient.grpc import service_pb2, service_pb2_grpc

from backends.errors import (
    BackendError,
    BackendFailed,
    BackendOverloaded,
    BackendProtocolError,
    BackendRefusedCredentials,
    BackendTimeout,
    BackendUnreachable,
    RequestRejected,
)
from backends.triton.dialect import Tensor

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Of one gRPC message, either way: images of a request, log probabilities of a whole answer."""

KEEPALIVE_S = 310
"""Triton ends a connection, and all that is on it, after three pings less than 300 s apart without an answer between
them, as while a prompt waits or an answer in one piece is computed (`tritonserver --help`)."""

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # gRPC's own back-off grows to two minutes; a server that comes back is to be used at once.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name this is what an attempt to connect may take: a TLS handshake across a continent takes 300 ms.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A host that vanished sends no reset. While something is asked of it, which a watch does all the time, the kernel
    # ends the connection when nothing was acknowledged for the time-out; a ping is for when nothing is.
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Otherwise two channels to one address share a connection, and its back-off.
    ("grpc.use_local_subchannel_pool", 1),
)

_REAL_CODES = (("triton_grpc_error", "true"),)
"""Asks Triton to end a stream that fails with a gRPC status, instead of a message with a text."""

REAL_CODES_SINCE = (2, 57)
"""The first version (25.04) that is asked for codes. Older ones crash where an error meets a cancellation: 2.51 did
within 3 tries with codes, and in none of 60 without (triton-inference-server/server issues 7368 and 8034)."""

TOO_LONG_CODE = "context_length_exceeded"

_TOO_LONG = ("max_seq_len", "max_input_len", "maximum input length", "context size", "context length")
"""How TensorRT-LLM and llama.cpp say that a prompt does not fit; Triton gives no code for it."""

_SAID_BY_TRITON_ITSELF = ("[request id", "unexpected inference", "inference request", "expected ", "Request for")
"""How Triton's own check of a request begins to complain: then the tensors are not the model's, which is our fault."""

_QUEUE_FULL = ("maximum queue size", "queue is full", "Request timeout expired")
"""The last is Triton's word for a request that stood in its queue longer than the model's queue policy lets it."""


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """PEM texts for a `grpcs://` server; None: the system's authorities, no certificate of ours."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    server_name: str | None = None


class ModelDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says about a model that it has loaded."""

    inputs: Mapping[str, str]
    """Datatype by name."""
    single: frozenset[str]
    """The inputs that hold one value."""
    outputs: frozenset[str]
    max_batch_size: int
    decoupled: bool
    parameters: Mapping[str, str]
    digest: bytes
    """Changes when any of it does."""


class Response(msgspec.Struct, frozen=True):
    """One response of a stream: raw tensors by name, with their datatypes."""

    tensors: Mapping[str, tuple[str, bytes]]


class TritonServer:
    """A server at `url` (`grpc://host:port` or `grpcs://host:port`), for one backend.

    The channel is opened by the first call, in the running event loop. Every failure is a `BackendError` that names
    the backend and the model. `real_codes`: whether streams are asked to fail with a gRPC status; None: where `version`
    finds a server that can be asked so.
    """

    def __init__(
        self, url: str, *, backend: str, model: str, tls: Tls | None = None, real_codes: bool | None = None
    ) -> None:
        scheme, _, address = url.rstrip("/").partition("://")
        self._address = address
        self._tls = (tls or Tls()) if scheme == "grpcs" else None
        self._backend = backend
        self._model = model
        self._asks_for_codes = real_codes
        self._has_codes = bool(real_codes)
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._closed = False

    async def connect(self, until: float) -> None:
        """Return once there is a connection.

        Raises `BackendTimeout` at `until` (event-loop clock, seconds), or `BackendUnreachable`.
        """
        channel = self._open()
        try:
            async with asyncio.timeout_at(until):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        raise self._unreachable(f"no connection to {self._address}")
                    await channel.wait_for_state_change(state)
        except TimeoutError as error:
            message = "the engine's connect time ran out"
            raise BackendTimeout(message, phase="connect", backend=self._backend, model=self._model) from error

    async def version(self, within_s: float) -> tuple[int, ...]:
        """The server's version; from then on streams are asked for codes where it is new enough."""
        answer = await self._ask(
            lambda stub: stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=within_s)
        )
        version = tuple(int(part) for part in answer.version.split(".") if part.isdecimal())
        if self._asks_for_codes is None:
            self._has_codes = version >= REAL_CODES_SINCE
        return version

    async def is_ready(self, within_s: float) -> bool:
        """Whether the model takes requests."""
        request = service_pb2.ModelReadyRequest(name=self._model)
        answer = await self._ask(lambda stub: stub.ModelReady(request, timeout=within_s))
        return bool(answer.ready)

    async def state(self, within_s: float) -> str:
        """The model's state and why, as the repository index has it; `UNKNOWN` for one that is not in it."""
        answer = await self._ask(
            lambda stub: stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=within_s)
        )
        for model in answer.models:
            if model.name == self._model:
                return f"{model.state or 'NOT LOADED'}" + (f" ({model.reason})" if model.reason else "")
        return "UNKNOWN"

    async def describe(self, within_s: float) -> ModelDescription:
        """The model's metadata and configuration."""
        name = self._model
        metadata = await self._ask(
            lambda stub: stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=name), timeout=within_s)
        )
        answer = await self._ask(
            lambda stub: stub.ModelConfig(service_pb2.ModelConfigRequest(name=name), timeout=within_s)
        )
        config = answer.config
        return ModelDescription(
            inputs={tensor.name: tensor.datatype for tensor in metadata.inputs},
            single=frozenset(tensor.name for tensor in metadata.inputs if list(tensor.shape[-1:]) == [1]),
            outputs=frozenset(tensor.name for tensor in metadata.outputs),
            max_batch_size=config.max_batch_size,
            decoupled=config.model_transaction_policy.decoupled,
            parameters={key: value.string_value for key, value in config.parameters.items()},
            digest=metadata.SerializeToString(deterministic=True) + config.SerializeToString(deterministic=True),
        )

    async def answered(self, within_s: float) -> int:
        """How many requests the model has answered since it was loaded: less than before means that it was reloaded."""
        request = service_pb2.ModelStatisticsRequest(name=self._model)
        answer = await self._ask(lambda stub: stub.ModelStatistics(request, timeout=within_s))
        return sum(model.inference_count for model in answer.model_stats)

    async def load(self, within_s: float) -> None:
        """Load the model, or load it anew; returns when it is there. Needs explicit model control."""
        request = service_pb2.RepositoryModelLoadRequest(model_name=self._model)
        await self._ask(lambda stub: stub.RepositoryModelLoad(request, timeout=within_s))

    async def unload(self, within_s: float) -> None:
        """Begin to unload the model: Triton lets requests in flight end, and answers before they have."""
        request = service_pb2.RepositoryModelUnloadRequest(model_name=self._model)
        await self._ask(lambda stub: stub.RepositoryModelUnload(request, timeout=within_s))

    def infer(self, tensors: Iterable[Tensor], request_id: str) -> Inference:
        """Begin one request on a stream of its own. Not sent before its first response is awaited."""
        request = service_pb2.ModelInferRequest(model_name=self._model, id=request_id)
        for tensor in tensors:
            request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            request.raw_input_contents.append(tensor.content)
        self._open()
        return Inference(self._stub.ModelStreamInfer(metadata=_REAL_CODES if self._has_codes else ()), request, self)

    def error(self, error: grpc.aio.AioRpcError) -> BackendError:
        """The cause behind a gRPC status."""
        code, said = error.code(), error.details() or "no reason given"
        who: dict[str, Any] = {"backend": self._backend, "model": self._model}
        if any(words in said for words in _TOO_LONG):
            return RequestRejected(said, code=TOO_LONG_CODE, **who)
        match code:
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.RESOURCE_EXHAUSTED:
                is_full = code is grpc.StatusCode.RESOURCE_EXHAUSTED or any(words in said for words in _QUEUE_FULL)
                return BackendOverloaded(said, **who) if is_full else BackendUnreachable(said, **who)
            case grpc.StatusCode.NOT_FOUND | grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
                return BackendRefusedCredentials(said, **who)
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return BackendTimeout("the engine gave up: " + said, phase="total", **who)
            case grpc.StatusCode.UNIMPLEMENTED:
                return BackendProtocolError(said, **who)
            case grpc.StatusCode.INVALID_ARGUMENT:
                ours = said.startswith(_SAID_BY_TRITON_ITSELF)
                return BackendProtocolError(said, **who) if ours else RequestRejected(said, **who)
        return BackendFailed(said, **who)

    def failure(self, said: str) -> BackendError:
        """The cause behind an error that came as a message, without a code: its text is all there is to go by."""
        kind: type[BackendError] = BackendFailed
        if said.startswith(_SAID_BY_TRITON_ITSELF):
            kind = BackendProtocolError
        elif any(words in said for words in _QUEUE_FULL):
            kind = BackendOverloaded
        elif any(words in said for words in _TOO_LONG):
            return RequestRejected(said, code=TOO_LONG_CODE)
        return kind(said, backend=self._backend, model=self._model)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def unreachable(self) -> BackendUnreachable:
        return self._unreachable("the backend was closed during the call")

    async def aclose(self) -> None:
        """Close the channel; calls in flight are cut."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def _ask(self, call: Callable[[Any], Awaitable[T]]) -> T:
        self._open()
        try:
            return await call(self._stub)
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from error
        except asyncio.CancelledError:
            if self._closed and not _is_cancelled(asyncio.current_task()):  # as in `Inference.next`
                raise self.unreachable() from None
            raise

    def _open(self) -> grpc.aio.Channel:
        if self._closed:
            raise self._unreachable("the backend is closed")
        if self._channel is None:
            self._channel = self._new_channel()
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self._channel

    def _new_channel(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self._address, options=_CHANNEL_OPTIONS)
        ca = self._tls.ca or _system_authorities()
        credentials = grpc.ssl_channel_credentials(ca, self._tls.key, self._tls.certificate)
        name = self._tls.server_name
        options = _CHANNEL_OPTIONS + ((("grpc.ssl_target_name_override", name),) if name else ())
        return grpc.aio.secure_channel(self._address, credentials, options=options)

    def _unreachable(self, message: str) -> BackendUnreachable:
        return BackendUnreachable(message, backend=self._backend, model=self._model)


class Inference:
    """One request and its responses. Read it from one task, then `hang_up`, which makes the model stop at once."""

    def __init__(self, call: Any, request: Any, server: TritonServer) -> None:
        self._call = call
        self._request = request
        self._server = server
        self._sent = False
        self._cut = False

    async def next(self) -> Response | None:
        """The next response; None at the end. Raises a `BackendError`."""
        try:
            if not self._sent:
                await self._call.write(self._request)
                await self._call.done_writing()
                self._sent = True
            message = await self._call.read()
            if message is grpc.aio.EOF:
                if await self._call.code() is not grpc.StatusCode.OK:
                    raise self._server.error(await _status_of(self._call))
                return None
        except grpc.aio.AioRpcError as error:
            raise self._server.error(error) from error
        except asyncio.CancelledError:
            # gRPC reports a call that was cut under its reader as the reader's own cancellation.
            if (self._cut or self._server.is_closed) and not _is_cancelled(asyncio.current_task()):
                raise self._server.unreachable() from None
            raise
        if message.error_message:
            raise self._server.failure(message.error_message)
        answer = message.infer_response
        contents = answer.raw_output_contents
        return Response({tensor.name: (tensor.datatype, contents[i]) for i, tensor in enumerate(answer.outputs)})

    def hang_up(self) -> None:
        """End the call, if it has not ended."""
        self._call.cancel()

    def cut(self) -> None:
        """Make the reader fail with `BackendUnreachable`."""
        self._cut = True
        self._call.cancel()


def _system_authorities() -> bytes | None:
    """Whom OpenSSL trusts on this system: gRPC brings a list of its own. None where it has them in no one file."""
    file = ssl.get_default_verify_paths().cafile
    return Path(file).read_bytes() if file else None


def _is_cancelled(task: asyncio.Task[Any] | None) -> bool:
    return task is not None and task.cancelling() > 0


async def _status_of(call: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), details=await call.details()
    )
