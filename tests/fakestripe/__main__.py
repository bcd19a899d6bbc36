"""`python -m tests.fakestripe --port 12111 --webhook-url http://127.0.0.1:8000/v1/billing/webhook`

A Stripe for newcomers, beside `make serve`: its checkout page takes fake cards. State lives in memory.
"""

import argparse
import asyncio

from tests.fakestripe.server import SECRET_KEY, WEBHOOK_SECRET, running


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=12111)
    parser.add_argument("--webhook-url", required=True)
    options = parser.parse_args()
    async with running(port=options.port, webhook_url=options.webhook_url) as fake:
        print(f"fake Stripe at {fake.url}, key {SECRET_KEY}, webhook secret {WEBHOOK_SECRET}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    import contextlib

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
