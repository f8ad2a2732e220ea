"""`make gpu-check`: the live suite against a Triton on this machine's GPU, or the word that there is nothing to check.

    make gpu-check                                          a Triton at grpc://127.0.0.1:8001 with the model `forebay`
    make gpu-check TRITON_URL=grpc://host:8001 BACKEND='{"model": "tensorrt_llm_bls", "model_folder": "/models/llama"}'

BACKEND are the fields of a `kind: triton` backend, as a policy file has them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from urllib.parse import urlsplit

DEFAULT = "grpc://127.0.0.1:8001"


def main() -> int:
    gpus = _gpus()
    named = os.environ.get("FOREBAY_CHECK_TRITON")
    if not gpus and not named:
        print("No GPU was found on this machine (nvidia-smi lists none): nothing was checked.")
        return 0
    url = named or DEFAULT
    print("\n".join(gpus) or f"No GPU on this machine; the Triton at {url} may have one.")
    if not _listens(url):
        print(
            f"No Triton listens at {url}. Start one (deploy/triton/README.md), or name it: make gpu-check TRITON_URL=grpc://…"
        )
        return 1
    suite = [sys.executable, "-m", "pytest", "-v", "tests/live"]
    return subprocess.run(suite, env={**os.environ, "FOREBAY_CHECK_TRITON": url}, check=False).returncode


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [line for line in listed.stdout.splitlines() if line.startswith("GPU ")] if listed.returncode == 0 else []


def _listens(url: str) -> bool:
    address = urlsplit(url)
    try:
        with socket.create_connection((address.hostname or "", address.port or 8001), timeout=2.0):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
