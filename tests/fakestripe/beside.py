"""`python -m tests.fakestripe.beside COMMAND...` runs COMMAND with payments on, against a fake Stripe beside it.

The fake ends with the command. What it knows is kept in the data directory, as Stripe would remember it.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.fakestripe.server import SECRET_KEY, WEBHOOK_SECRET


def main() -> None:
    command = sys.argv[1:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host = os.environ.get("HOST", "127.0.0.1")
    server = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{os.environ.get('PORT', '8000')}"
    data_dir = Path(os.environ.get("DATA_DIR", ".data"))
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    fake = [sys.executable, "-m", "tests.fakestripe", "--port", str(port)]
    fake += ["--webhook-url", f"{server}/v1/billing/webhook"]
    fake += ["--state", str(data_dir / "fake-stripe.json"), "--while-parent-is", str(os.getpid())]
    subprocess.Popen(fake, stdout=sys.stderr)
    os.environ |= {
        "STRIPE_SECRET_KEY": SECRET_KEY,
        "STRIPE_WEBHOOK_SECRETS": WEBHOOK_SECRET,
        "STRIPE_API_BASE": f"http://127.0.0.1:{port}",
    }
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
