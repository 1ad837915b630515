"""An address is one server's, from before its model is loaded, and who comes second is told so in one sentence."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.server.options import listen, listening_socket
from tests.fork_server import ROOT
from tests.inference.running_server import free_port
from tests.inference.small_model import SmallModel
from tests.processes import PATIENCE, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems tell later, once the model is loaded")
TAKEN = "can't be listened on: Address already in use"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_that_a_loading_server_has_is_taken(host: str) -> None:
    try:
        first = listening_socket(host, 0)
    except UserError:
        pytest.skip("this machine has no IPv6")
    port = first.getsockname()[1]
    with pytest.raises(UserError, match=f"{port} {TAKEN}"):
        listening_socket(host, port)
    first.close()
    del first
    second = listening_socket(host, port)
    listen(second)
    with pytest.raises(UserError, match=f"{port} {TAKEN}"):
        listening_socket(host, port)
    second.close()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_who_comes_second_is_told_in_one_sentence(small: SmallModel, tmp_path: Path, workers: str) -> None:
    folder, port = tmp_path / "model", free_port()
    shutil.copytree(small.folder, folder)
    # The server reads the manifest between binding and loading, and gets it as soon as the test has listened.
    pipe = folder / "manifest.json"
    manifest = pipe.rename(tmp_path / "manifest.json")
    os.mkfifo(pipe)
    words = [
        sys.executable,
        "-m",
        "mmoe_rec",
        "serve",
        "--model",
        str(folder),
        "--port",
        str(port),
        "--workers",
        workers,
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        writing = until(lambda: opened(pipe))
        with pytest.raises(UserError, match=TAKEN):
            listening_socket("127.0.0.1", port)
        with socket.socket() as first:
            first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            first.bind(("0.0.0.0", port))
            first.listen()
            content = manifest.read_bytes()
            manifest.rename(pipe)
            os.write(writing, content)
            os.close(writing)
            assert process.wait(PATIENCE) == 2
        assert (tmp_path / "log").read_text() == f"error: 127.0.0.1:{port} {TAKEN}\n"
    finally:
        process.kill()


def opened(pipe: Path) -> int | None:
    """A pipe that somebody reads, to be written to."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None
