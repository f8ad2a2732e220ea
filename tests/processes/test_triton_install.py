"""Triton arrives whole through the real pip, or says why it does not."""

from __future__ import annotations

import platform
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from gateway import triton_install
from gateway.triton_install import Installation, SystemUnsupported, TritonUnavailable, install, place


@pytest.mark.slow
def test_an_installation_that_is_there_is_not_made_again(triton_installation: Installation) -> None:
    said: list[str] = []
    assert install(triton_installation.directory.parent, said.append) == triton_installation
    assert said == []


def test_a_c_library_that_is_too_old_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    with pytest.raises(SystemUnsupported, match=r"needs glibc 2\.35 or newer and this system has 2\.31"):
        install(tmp_path / "triton", print)
    assert not (tmp_path / "triton").exists()


def test_a_python_that_is_too_new_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "version_info", namedtuple("Version", "major minor")(3, 13))  # noqa: PYI024
    with pytest.raises(SystemUnsupported, match=r"which Python 3\.13 has not. Use Python 3\.11 or 3\.12"):
        install(tmp_path / "triton", print)


def test_a_python_without_its_shared_library_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(triton_install.sysconfig, "get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    with pytest.raises(TritonUnavailable, match=rf"apt install libpython3\.{sys.version_info.minor}\b"):
        install(tmp_path / "triton", print)


def test_a_failed_installation_leaves_none_that_looks_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TritonUnavailable, match="pip could not download what Triton needs: ERROR"):
        install(tmp_path / "triton", print)
    assert not place(tmp_path / "triton").directory.exists()
