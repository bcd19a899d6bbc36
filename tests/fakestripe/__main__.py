"""`python -m tests.fakestripe --webhook-url http://127.0.0.1:8000/v1/billing/webhook`: the fake as a process."""

import argparse
import asyncio
import json
import os
import signal
from pathlib import Path

from tests.fakestripe.server import SECRET_KEY, WEBHOOK_SECRET, FakeStripe, running

SAVE_EVERY_S = 0.5


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=12111)
    parser.add_argument("--webhook-url", required=True)
    parser.add_argument("--state", type=Path, help="file to remember everything in")
    parser.add_argument("--while-parent-is", type=int, default=0, help="end with this process")
    options = parser.parse_args()
    if options.while_parent_is:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, and this ends with it
    async with running(port=options.port, webhook_url=options.webhook_url) as fake:
        if options.state is not None and options.state.exists():
            fake.state.restore(json.loads(options.state.read_text()))
        print(f"fake Stripe at {fake.url}, key {SECRET_KEY}, webhook secret {WEBHOOK_SECRET}", flush=True)
        while not options.while_parent_is or os.getppid() == options.while_parent_is:
            await asyncio.sleep(SAVE_EVERY_S)
            if options.state is not None:
                save(fake, options.state)


def save(fake: FakeStripe, path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(fake.state.remembered()))
    partial.replace(path)


if __name__ == "__main__":
    import contextlib

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
