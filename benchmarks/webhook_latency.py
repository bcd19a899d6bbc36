"""How long after Stripe's webhook a payment is in the balance, and how long a sweep takes to heal one that never came.

    python -m benchmarks.webhook_latency --payments 200

The real API, service and ledger (SQLite) in one process, against the fake Stripe on a real port. Prints one JSON line.
"""

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import structlog

from deployments.payments import sweeps
from tests.support.payments import BASE_URL, Shop, open_shop


async def credited_after(shop: Shop, sweep: bool) -> float:
    """Seconds from the webhook, or from the beginning of the sweep, to a balance that shows the payment."""
    headers, customer = shop.app.key(credits_mils=0)
    topup = await shop.payments.topup(customer, 2_500, BASE_URL)
    shop.fake.state.pay_session(topup.session_id)
    started = time.perf_counter()
    if sweep:
        shop.fake.webhooks.waiting.clear()
        await sweeps.sweep_events(shop.payments)
    else:
        await shop.fake.deliver()
    url = "/v1/billing/balance"
    while (await shop.app.http.get(url, headers=headers)).json()["balance_mils"] != 250_000:  # noqa: ASYNC110 - a poll
        await asyncio.sleep(0.001)
    return time.perf_counter() - started


async def main(payments: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with open_shop(Path(directory), request_timeout_s=10.0) as shop:
            webhooks = [await credited_after(shop, sweep=False) for _ in range(payments)]
            swept = [await credited_after(shop, sweep=True) for _ in range(10)]
    result = {
        "payments": payments,
        "webhook_to_balance_ms_p50": round(1e3 * statistics.median(webhooks), 1),
        "webhook_to_balance_ms_p99": round(1e3 * sorted(webhooks)[int(payments * 0.99) - 1], 1),
        "sweep_to_balance_ms_max": round(1e3 * max(swept), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--payments", type=int, default=200)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    asyncio.run(main(parser.parse_args().payments))
