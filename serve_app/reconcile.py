"""`dream-admin stripe reconcile`: hear what was missed and compare the books, with a running cluster or without."""

import asyncio
import logging
import time

from billing.commands import Command, Outcome
from billing.payments.reader import PaymentsReader
from deployments.ledger_client import LedgerClient
from deployments.logs import configure_logs
from deployments.payments import sweeps
from deployments.payments.errors import PaymentsDisabled
from deployments.payments.gateway import StripeGateway
from deployments.payments.service import Payments
from serve_app.admin import Apply, ledger_writer, open_migrated
from serve_app.settings import Settings
from serve_app.signing import load_secret

DAY_S = 86_400


def reconcile(settings: Settings, days_ago: int) -> sweeps.Report:
    """Sweep events and payments, then compare the day that many days of UTC ago.

    Raises:
        deployments.payments.errors.PaymentError: payments are off, or Stripe does not answer.
        ValueError: the settings are not whole.
    """
    if not settings.payments.config().enabled:
        raise PaymentsDisabled()
    configure_logs(logging.WARNING)  # standard output is the report
    with ledger_writer(settings) as apply:
        return asyncio.run(_reconcile(settings, apply, int(time.time() // DAY_S) - days_ago))


async def _reconcile(settings: Settings, apply: Apply, day: int) -> sweeps.Report:
    async def call(commands: list[Command]) -> list[Outcome]:
        return [await asyncio.to_thread(apply, command) for command in commands]

    config = settings.payments.config()
    ledger, gateway = LedgerClient(call), StripeGateway(config)
    ledger.start()
    payments = Payments(config, ledger, PaymentsReader(open_migrated(settings)), gateway)
    try:
        await sweeps.sweep_events(payments)
        await sweeps.sweep_objects(payments, older_than_s=0.0)
        return await sweeps.reconcile(payments, day, load_secret(settings.data_dir / "report-secret"))
    finally:
        await ledger.stop()
        await gateway.close()
