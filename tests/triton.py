"""A real Triton for tests: started on free ports with its own repository, stopped, killed and restarted at will."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from gateway.triton_install import Installation, Ports, triton_command
from tests.triton_models import Dialect, write_model
from tests.valkey import free_port

_STARTS_WITHIN_S = 60.0
_STOPS_WITHIN_S = 30.0
_CLEARS_UP_WITHIN_S = 10.0


class TritonServer:
    """A tritonserver and its models' processes, under explicit model control; `close` removes all of it.

    `write` fills its repository; `load` names the models it starts with ("*": all). `env` is for the models.
    """

    def __init__(
        self,
        installation: Installation,
        write: Callable[[Path], None],
        *,
        load: Sequence[str] = ("*",),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._installation = installation
        self._folder = Path(tempfile.mkdtemp(prefix="fb-triton-"))
        self._load = load
        self._journal = self._folder / "journal"
        self._journal.touch()
        self._env = {"FOREBAY_TRITON_JOURNAL": str(self._journal), **(env or {})}
        self.repository = self._folder / "models"
        self.repository.mkdir()
        write(self.repository)
        self.log_path = self._folder / "log"
        self.ports = Ports(http=free_port(), grpc=free_port(), metrics=free_port())
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.metrics}/metrics"

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    def start(self) -> TritonServer:
        """Start the server and return once it is live: each of its models is loaded by then, or has failed."""
        command = triton_command(
            self._installation, repository=self.repository, ports=self.ports, load=self._load, env=self._env
        )
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command.argv, env=command.env, stdout=log, stderr=log)
        self._until(self.is_live, _STARTS_WITHIN_S, "is not live")
        return self

    def stop(self) -> int:
        """Ask the server to end, wait until nothing of it is left, and return its exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as `kill -9` does, and wait until nothing of it is left."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it and start it again on the same ports."""
        self.kill()
        self.start()

    def close(self) -> None:
        """End it, whatever state it is in, and remove its files."""
        if self.process is not None:
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def children(self) -> list[psutil.Process]:
        """Return the processes of its models, and the one that clears up after it."""
        return psutil.Process(self.pid).children(recursive=True)

    def is_live(self) -> bool:
        return self._answers("/v2/health/live")

    def is_ready(self, model: str) -> bool:
        return self._answers(f"/v2/models/{model}/ready")

    def write(self, name: str, dialect: Dialect) -> None:
        """Put a scripted model into the repository, in the place of one of that name; `load` makes it take effect."""
        write_model(self.repository, name, dialect)

    def load(self, name: str) -> None:
        """Load a model, or reload it as it is in the repository now. Raises `ValueError` with Triton's reason."""
        self._control(name, "load")

    def unload(self, name: str) -> None:
        """Unload a model and return once it is gone: answers under way are finished first."""
        self._control(name, "unload")
        self._until(lambda: self._state(name) != "UNLOADING", _STOPS_WITHIN_S, f"still unloads {name}")

    def generate(self, model: str, **tensors: Any) -> dict[str, Any]:
        """Return the one response to an HTTP `generate`. Raises `ValueError` with Triton's reason."""
        answer: dict[str, Any] = json.loads(self._post(f"/v2/models/{model}/generate", tensors))
        return answer

    def generate_stream(self, model: str, **tensors: Any) -> list[dict[str, Any]]:
        """Return the events of an HTTP `generate_stream`, an error event among them."""
        body = self._post(f"/v2/models/{model}/generate_stream", tensors).decode()
        return [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line]

    def metrics(self) -> str:
        with urllib.request.urlopen(self.metrics_url, timeout=5.0) as response:
            text: str = response.read().decode()
            return text

    def events(self, event: str | None = None, *, request_id: str | None = None) -> list[dict[str, Any]]:
        """Return what the scripted models noted, in order; `at_s` is on the clock of `time.monotonic`."""
        whole_lines = self._journal.read_text().rpartition("\n")[0]  # the next may be just being written
        noted = [json.loads(line) for line in whole_lines.splitlines()]
        return [
            line
            for line in noted
            if event in (None, line["event"]) and (request_id is None or line["id"] == request_id)
        ]

    def event(self, event: str, *, request_id: str | None = None, within_s: float = 5.0) -> dict[str, Any]:
        """Return the first such event, waiting for it."""
        self._until(lambda: bool(self.events(event, request_id=request_id)), within_s, f"noted no {event}")
        return self.events(event, request_id=request_id)[0]

    def _control(self, name: str, verb: str) -> None:
        self._post(f"/v2/repository/models/{name}/{verb}", {})

    def _state(self, name: str) -> str:
        index = json.loads(self._post("/v2/repository/index", {}))
        return next((model.get("state", "") for model in index if model["name"] == name), "")

    def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=60.0) as response:
                answer: bytes = response.read()
                return answer
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(error.read().decode()) from None

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=5.0):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False

    def _until(self, reached: Callable[[], bool], within_s: float, otherwise: str) -> None:
        give_up_at = time.monotonic() + within_s
        while not reached():
            if self.process is None or self.process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"Triton {otherwise}: {self.log_path.read_text()[-4000:]}")
            time.sleep(0.01)

    def _end(self, how: signal.Signals) -> int:
        assert self.process is not None, "not started"
        children = []
        with suppress(psutil.NoSuchProcess):
            children = self.children()
        self.process.send_signal(how)
        try:
            status = self.process.wait(_STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process = None
        _, left = psutil.wait_procs(children, _CLEARS_UP_WITHIN_S)
        for process in left:
            process.kill()
        assert left == [], "Triton left processes behind"
        return status
