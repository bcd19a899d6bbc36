"""What async rollouts are made of in one ingress process, put together."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Engine

from deployments.file_groups import open_file_groups
from deployments.ingress import Ingress
from deployments.job_store import JobStore
from deployments.ledger_client import LedgerClient
from deployments.model_client import ModelClient
from deployments.reservations import Reservations
from deployments.results import ResultStore
from deployments.rollout_jobs import JobLimits, RolloutJobs
from deployments.status_client import StatusClient
from deployments.webhook_store import WebhookStore
from deployments.webhooks import WebhookDeliverer, WebhookSender
from serve_app.envelopes import Envelopes
from serve_app.settings import ClusterArgs


@dataclass(frozen=True, slots=True)
class JobServices:
    jobs: RolloutJobs
    outbox: WebhookStore
    deliverer: WebhookDeliverer

    def start(self) -> None:
        self.jobs.start()
        self.deliverer.start()

    async def stop(self) -> None:
        await self.jobs.stop()
        await self.deliverer.stop()


def job_services(
    args: ClusterArgs,
    database: Engine,
    ingress: Ingress,
    ledger: LedgerClient,
    reservations: Reservations,
    models: Mapping[str, ModelClient],
    results: ResultStore,
    status: StatusClient,
    envelopes: Envelopes,
) -> JobServices:
    limits = args.limits
    rows, outbox = JobStore(database), WebhookStore(database)
    deliverer = WebhookDeliverer(outbox, rows, WebhookSender(args.webhook_loopback), envelopes.webhook_body)
    jobs = RolloutJobs(
        store=rows,
        inputs=open_file_groups(args.results),
        results=results,
        ingress=ingress,
        ledger=ledger,
        reservations=reservations,
        models=models,
        status=status,
        limits=JobLimits(
            at_once=limits.running_jobs,
            max_live=limits.max_live_jobs,
            max_live_per_customer=limits.max_live_jobs_per_customer,
            timeout_s=limits.job_timeout_s,
        ),
        on_end=deliverer.wake,
    )
    return JobServices(jobs, outbox, deliverer)
