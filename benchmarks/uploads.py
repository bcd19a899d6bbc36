"""What a thousand uploads at once take of an ingress process's memory: `python -m benchmarks.uploads`.

The real application behind uvicorn in a process of its own, a stand-in for the model. Every client sends all of a
400 kB rollout but its last bytes; when all of them hang there, or were refused, they send the rest and read their
answers; then others do so again. Once with room for all bodies, once for a quarter, where the others must be told
so at once. One JSON line: the process's peak resident memory above its idle one, per byte of bodies that it may hold.
The exit status is 1 above `MAX_PER_BYTE` and the allowance, or if a client had no answer.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import resource
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import structlog
import uvicorn

from serve_app.settings import Limits
from tests.support.app import running_app
from tests.support.payloads import actions, npy, png

SIDE = 365
"""Of a picture of noise, which no PNG makes smaller: 400 kB."""
TAIL_BYTES = 512
MAX_PER_BYTE = 2.2
ALLOWANCE_BYTES = 32 * 2**20
"""Of connections, threads and pages that the allocator keeps, however many bodies there are."""


async def serve(max_held_bytes: int) -> None:
    """The application on a free port, which is printed with a key; until standard input ends."""
    limits = Limits(max_held_bytes=max_held_bytes)
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        async with running_app(Path(directory), limits=limits) as app:
            structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
            token, _ = app.ledger.create_key(10**8, refill_per_s=10**5, burst=10**5)
            server = uvicorn.Server(uvicorn.Config(app.api, lifespan="off", log_level="critical", backlog=4096))
            serving = asyncio.create_task(server.serve([listener]))
            print(listener.getsockname()[1], token, flush=True)
            await asyncio.to_thread(sys.stdin.read)
            server.should_exit = True
            await serving


@contextlib.contextmanager
def served(max_held_bytes: int) -> Iterator[tuple[int, str, int]]:
    """Port, key and process id."""
    command = [sys.executable, "-m", "benchmarks.uploads", "--serve", str(max_held_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port, token = process.stdout.readline().split()
        try:
            yield int(port), token, process.pid
        finally:
            process.stdin.close()


class Upload:
    """One client."""

    def __init__(self, port: int, token: str, picture: bytes, seed: int) -> None:
        self._port = port
        files = {"frame": picture, "actions": npy(actions(1, seed=seed))}
        headers = {"Authorization": f"Bearer {token}", "Connection": "close"}
        url = f"http://127.0.0.1:{port}/v1/predict"
        request = httpx.Request("POST", url, headers=headers, files=files, data={"num_steps": "1"})
        self.body = request.read()
        lines = ["POST /v1/predict HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
        self._head = "\r\n".join(lines).encode()

    async def begin(self) -> None:
        """Send all but the tail, or as much as the server takes."""
        self._socket = socket.socket()
        self._socket.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, ("127.0.0.1", self._port))
        with contextlib.suppress(ConnectionError):
            await loop.sock_sendall(self._socket, self._head + self.body[:-TAIL_BYTES])

    async def end(self) -> str:
        """Send the tail; the status of the answer, which may have been there before."""
        loop = asyncio.get_running_loop()
        answer = b""
        with self._socket:
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(self._socket, self.body[-TAIL_BYTES:])
            with contextlib.suppress(ConnectionError):  # a server that refused what it did not read resets at the end
                while part := await loop.sock_recv(self._socket, 65536):
                    answer = answer or part
        return answer.split()[1].decode() if answer else "connection lost"


def peak_bytes(pid: int) -> int:
    """The most memory that the process has had resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


async def wave(port: int, token: str, process: psutil.Process, picture: bytes, seeds: range) -> Counter[str]:
    """All at once; their answers."""
    uploads = [Upload(port, token, picture, seed) for seed in seeds]
    await asyncio.gather(*(upload.begin() for upload in uploads))
    used, still = process.cpu_times(), 0
    while still < 5:  # until the server has read what the kernel holds for it
        await asyncio.sleep(0.1)
        before, used = used, process.cpu_times()
        still = still + 1 if used.user - before.user < 0.02 else 0
    return Counter(await asyncio.gather(*(upload.end() for upload in uploads)))


async def measure(clients: int, max_held_bytes: int) -> dict[str, Any]:
    with served(max_held_bytes) as (port, token, pid):
        picture, process = png(SIDE, SIDE), psutil.Process(pid)
        answers = await wave(port, token, process, picture, range(1))
        idle = process.memory_info().rss
        body_bytes = len(Upload(port, token, picture, 0).body)
        answers = await wave(port, token, process, picture, range(1, 1 + clients))
        first_peak = peak_bytes(pid) - idle
        answers += await wave(port, token, process, picture, range(1 + clients, 1 + 2 * clients))
        peak = peak_bytes(pid) - idle
    held = min(clients, max_held_bytes // body_bytes) * body_bytes
    return {
        "bodies_mb": round(clients * body_bytes / 1e6, 1),
        "may_hold_mb": round(held / 1e6, 1),
        "answers": dict(answers),
        "peak_mb": round(first_peak / 1e6, 1),
        "peak_of_both_waves_mb": round(peak / 1e6, 1),
        "peak_per_byte": round(peak / held, 2),
        "within": peak <= MAX_PER_BYTE * held + ALLOWANCE_BYTES and answers.keys() <= {"200", "429", "503"},
    }


async def main(clients: int) -> bool:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    rounds = {
        "all_fit": await measure(clients, Limits().max_held_bytes),
        "a_quarter_fits": await measure(clients, clients * 400_000 // 4),
    }
    print(json.dumps({"benchmark": "uploads", "clients": clients, **rounds}))
    return all(each["within"] for each in rounds.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
    else:
        sys.exit(0 if asyncio.run(main(arguments.clients)) else 1)
