"""What a client does is seen behind the proxy of production."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import eventually, free_port

RUNS = 20
BODY_BYTES = 40_000

CONFIG = """
global
    nbthread 4
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option abortonclose
    option splice-request
frontend in
    bind 127.0.0.1:{port}
    use_backend out
backend out
    server application 127.0.0.1:{behind}
"""
"""Of Ray's configuration what matters here."""


@pytest.fixture
def application() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        yield server


@pytest.fixture
def port(application: socket.socket, tmp_path: Path) -> Iterator[int]:
    port = free_port()
    (tmp_path / "haproxy.cfg").write_text(CONFIG.format(port=port, behind=application.getsockname()[1]))
    command = [sys.executable, "-m", "serve_app.haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        eventually(lambda: listens(port))
        yield port
        process.terminate()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_client_that_hangs_up_behind_a_large_body_is_seen_every_time(application: socket.socket, port: int) -> None:
    """Without `dream-haproxy`, HAProxy 2.8.25 missed 8 of 20 such."""
    head = f"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: {BODY_BYTES}\r\n\r\n".encode()
    for _ in range(RUNS):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(head + bytes(BODY_BYTES))
            behind, _address = application.accept()
            behind.settimeout(10)
            received = b""
            while b"\r\n\r\n" not in received or len(received.partition(b"\r\n\r\n")[2]) < BODY_BYTES:
                received += behind.recv(65536)
        with behind, contextlib.suppress(ConnectionResetError):
            assert behind.recv(1) == b""
