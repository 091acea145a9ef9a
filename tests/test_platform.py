"""The package on a system without fcntl, resource, pread, sysconf and SIGCHLD, as Windows is.

Windows itself is not at hand: these are the parts of Python that it lacks.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfumato import platform
from tests.helpers.runs import images

WITHOUT = """
import os, signal, sys, types
sys.modules.update(fcntl=None, resource=None)
del os.pread, os.sysconf, signal.SIGCHLD
memory = types.SimpleNamespace(total=8 * 2**30)
process = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=2**30))
sys.modules["psutil"] = types.SimpleNamespace(virtual_memory=lambda: memory, Process=lambda: process)
"""
EVERY_MODULE = """
import importlib, pkgutil, sfumato
for module in pkgutil.walk_packages(sfumato.__path__, "sfumato."):
    if module.name.endswith(("__main__", "_executor")):  # these import packages of others
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as missing:
        assert missing.name in {"tensorboard", "wandb", "trackio"}, missing  # extras
from sfumato import platform
from tests.helpers.runs import images
print(platform.HAS_FILE_LOCKS, platform.total_memory() / 2**30, platform.peak_memory() / 2**30)
"""
CHECK_AND_TRAIN = """
from sfumato.cli.main import main
sys.argv = ["sfumato", *sys.argv[1:]]
main()
"""


def without(
    code: str, *arguments: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of that kind."""
    command = [sys.executable, "-c", WITHOUT + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_every_module_is_imported_there() -> None:
    result = without(EVERY_MODULE)
    assert result.stderr == ""
    assert result.stdout.split() == ["False", "8.0", "1.0"]


@pytest.mark.slow
def test_data_are_read_there_and_training_is_refused_before_it_begins(
    tmp_path: Path,
) -> None:
    photos = images(tmp_path / "photos")
    checked = without(CHECK_AND_TRAIN, "data", "check", str(photos), cwd=tmp_path)
    assert (checked.returncode, "40 images" in checked.stdout) == (0, True), checked.stderr
    run = tmp_path / "run"
    trained = without(
        CHECK_AND_TRAIN, "train", str(photos), "budget.steps=1", "--run", str(run), cwd=tmp_path
    )
    assert trained.returncode == 2
    assert "file locks" in trained.stderr
    assert "WSL" in trained.stderr


def test_bytes_are_read_at_their_place_with_and_without_pread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    descriptor = os.open(tmp_path / "bytes", os.O_RDONLY)
    try:
        for _ in range(2):
            assert platform.read_at(descriptor, 3, 250) == bytes([250, 251, 252])
            assert platform.read_at(descriptor, 9, 255) == bytes([255])
            assert platform.read_at(descriptor, 9, 300) == b""
            monkeypatch.delattr(os, "pread", raising=False)
    finally:
        os.close(descriptor)


def test_memory_is_that_of_this_machine() -> None:
    assert 2**28 < platform.total_memory() < 2**50
    held = platform.peak_memory()
    assert 2**24 < held < platform.total_memory()
    block = bytearray(held // 2 + 2**27)
    assert platform.peak_memory() >= held
    del block


@pytest.mark.skipif(sys.platform == "win32", reason="processes there have no such state")
def test_a_process_that_has_ended_is_not_alive_though_its_parent_has_not_asked() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    deadline = time.monotonic() + 30
    while platform.is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not platform.is_alive(child)
    os.waitpid(child, 0)
    assert platform.is_alive(os.getpid())
