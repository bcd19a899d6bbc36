"""The only place that turns plain classes into Serve deployments and binds them."""

import asyncio
import gc
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from billing.database import open_database
from billing.payments.reader import PaymentsReader
from billing.reader import LedgerReader
from billing.request_log import RequestLog
from billing.statements import StatementReader
from billing.units import UnitsReader
from billing.usage import UsageReader
from deployments import actors, ledger_client
from deployments.channel import Channel, connect
from deployments.file_groups import open_file_groups
from deployments.frame_store import FrameStore
from deployments.ingress import Ingress
from deployments.ledger_audits import AuditsClient
from deployments.logs import configure_logs
from deployments.model_client import ModelClient
from deployments.payments.desk import PaymentsDesk
from deployments.pricing import Prices
from deployments.replica import Replica, ReplicaConfig
from deployments.replica_counts import BootingReplicas, booting_by_deployment
from deployments.reservations import Reservations
from deployments.results import ResultStore
from deployments.robot_commands import RobotCommands
from deployments.scheduler import SchedulerLimits
from deployments.sessions import SessionLimits, Sessions
from deployments.status_client import StatusClient
from deployments.tracing import configure_tracing
from serve_app.api import create_api
from serve_app.catalog import CATALOG, PACKAGED_CHECKPOINTS, RUNNERS, model_spec
from serve_app.context import Services
from serve_app.envelopes import Envelopes
from serve_app.job_services import job_services
from serve_app.known_keys import KnownKeys
from serve_app.rate_limit import TokenBuckets
from serve_app.settings import ClusterArgs, ModelArgs
from serve_app.signing import LinkSigner, load_secret

INGRESS_CPUS = 0.1
MAX_CONSTRUCTOR_ATTEMPTS = 2
"""A checkpoint that does not load once will not load at the twentieth try."""
LOGGING = LoggingConfig(enable_access_log=False)
"""A request is a line of ours already, with its own id."""


@serve.ingress()
class Gateway:
    """The HTTP ingress replica: FastAPI in front of `Ingress`."""

    def __init__(self, args: ClusterArgs, replicas: Mapping[str, DeploymentHandle[Any]], open_to: str = "") -> None:
        configure_logs()
        configure_tracing("ingress")
        self._args = args
        self._open_to = open_to
        self._replicas = replicas

    async def drain(self, timeout_s: float) -> None:
        """Take no new work; return when what is running has been answered, or refunded after `timeout_s`; jobs that
        were not done by then wait for the next start."""
        await self._sessions.drain()
        await asyncio.gather(self._ingress.drain(timeout_s), self._jobs.jobs.drain(timeout_s))

    async def held(self) -> dict[str, int]:
        """What this replica has of its clients' now; nothing once all is quiet."""
        return {"sessions": self._sessions.num_connected, "body_bytes": self._api.state.held_bodies.num_bytes}

    async def num_tasks(self) -> int:
        """What runs in this replica's loop: the same number again once all is quiet, or something leaks."""
        return len(asyncio.all_tasks())

    def __serve_build_asgi_app__(self) -> FastAPI:
        args, limits = self._args, self._args.limits
        ledger_actor = actors.start_ledger(args.database_url, args.control_labels)
        ledger = ledger_client.connect(ledger_actor)
        status = StatusClient(actors.start_status(str(args.data_dir / "status"), args.control_labels))
        models = {
            slug: ModelClient(
                model_spec(CATALOG[slug]),
                Channel(actors.start_scheduler(slug, scheduler_limits(slug, args), args.control_labels).address.remote),
                connect,
                limits.queue_timeout_s,
                limits.chunk_timeout_s,
            )
            for slug in self._replicas
        }
        database = open_database(args.database_url)
        reader, usage = LedgerReader(database), UsageReader(database)
        payments = args.payments.config()
        payments_actor = None
        if payments.enabled:
            report_secret = load_secret(args.data_dir / "report-secret")
            payments_actor = actors.start_payments(
                payments, args.database_url, ledger_actor, report_secret, args.control_labels
            )
        results = ResultStore(args.results, args.video_ttl_s)
        reservations = Reservations(ledger, reader)
        signer = LinkSigner(load_secret(args.data_dir / "link-secret"))
        envelopes = Envelopes(signer, args.video_ttl_s)
        self._ingress = Ingress(ledger, reservations, models, results, status)
        directory = actors.start_session_directory(
            limits.max_sessions_per_customer, limits.max_sessions, args.control_labels
        )
        session_limits = SessionLimits(limits.session_frames, limits.session_idle_s)
        self._sessions = Sessions(reservations, models, directory, status, session_limits)
        self._jobs = job_services(
            args, database, self._ingress, ledger, reservations, models, results, status, envelopes
        )
        self._api = create_api(
            Services(
                args=args,
                ingress=self._ingress,
                models=models,
                commands={
                    model.slug: RobotCommands.read(model.slug, Path(model.command_statistics))
                    for model in args.models
                    if model.command_statistics
                },
                max_row_steps={model.slug: model.max_row_steps for model in args.models},
                reader=reader,
                request_log=RequestLog(database),
                usage=usage,
                statements=StatementReader(database),
                units=UnitsReader(database),
                prices=Prices(reader.prices, usage.frames_since),
                buckets=TokenBuckets(time.monotonic, share=1 / args.ingress_replicas),
                known_keys=KnownKeys(time.monotonic),
                results=results,
                sessions=self._sessions,
                frames=FrameStore(open_file_groups(args.results)),
                jobs=self._jobs,
                envelopes=envelopes,
                signer=signer,
                status=status,
                booting=BootingReplicas(_booting_by_model),
                audits=AuditsClient(ledger_actor),
                metrics_secret=load_secret(args.data_dir / "metrics-secret").hex(),
                open_to=self._open_to,
                payments=PaymentsDesk(payments, ledger, PaymentsReader(database), payments_actor),
                decoders=ThreadPoolExecutor(limits.image_decoders, thread_name_prefix="decode"),
            )
        )
        gc.collect()
        gc.freeze()  # what is there before the first request: else a collection in a burst stops all for 0.3 s
        return self._api


def _booting_by_model() -> dict[str, int]:
    counts = booting_by_deployment()
    return {slug: counts.get(_replicas_name(slug), 0) for slug in CATALOG}


def _replicas_name(slug: str) -> str:
    return f"model-{slug}"


def build(args: ClusterArgs) -> serve.Application:
    """What `serve deploy` calls; Serve takes no builder of two parameters."""
    return application(args)


def application(args: ClusterArgs, open_to: str = "") -> serve.Application:
    """The whole cluster as one Serve application: an ingress deployment, and a replica deployment per model.

    `open_to` is the SHA-256 of the key that every request is taken to carry, in development. It is no field of `args`:
    a Serve config file cannot set it.
    """
    gateway = serve.deployment(Gateway, name="ingress").options(
        num_replicas=args.ingress_replicas,
        max_ongoing_requests=args.limits.max_ongoing_requests,
        max_queued_requests=args.limits.max_waiting_requests,
        graceful_shutdown_timeout_s=args.limits.chunk_timeout_s,
        logging_config=LOGGING,
        ray_actor_options={"num_cpus": INGRESS_CPUS, "label_selector": args.control_labels},
    )
    return gateway.bind(args, {model.slug: _replicas(model, args) for model in args.models}, open_to)


def _replicas(model: ModelArgs, args: ClusterArgs) -> serve.Application:
    entry = CATALOG[model.slug]
    config = ReplicaConfig(
        spec=model_spec(entry),
        runner=model.runner or RUNNERS[entry.spec.runner],
        checkpoint=model.checkpoint or str(PACKAGED_CHECKPOINTS.get(model.slug, "")),
        cache_dir=str(args.data_dir / "checkpoints"),
        device=model.device,
        max_rows=model.max_rows,
        context_bytes=model.context_bytes,
        torch_threads=model.torch_threads,
        stall_s=args.limits.chunk_timeout_s,
        lpips_weights=args.lpips_weights,
        lpips_sha256=args.lpips_sha256,
        num_gpus=model.num_gpus,
        scheduler_limits=scheduler_limits(model.slug, args),
        control_labels=args.control_labels,
    )
    where = {"accelerator_type": model.accelerator} if model.accelerator else {}
    deployment = serve.deployment(Replica, name=_replicas_name(model.slug)).options(
        **_replica_count(model, args),
        logging_config=LOGGING,
        ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus, **where},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=MAX_CONSTRUCTOR_ATTEMPTS,
    )
    return deployment.bind(config)


def _replica_count(model: ModelArgs, args: ClusterArgs) -> dict[str, Any]:
    if model.min_replicas == model.max_replicas:
        return {"num_replicas": model.min_replicas}
    kwargs = {
        "model": model.slug,
        "terms": asdict(model.scaling_terms()),
        "database_url": args.database_url,
    }
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=model.min_replicas,
            max_replicas=model.max_replicas,
            initial_replicas=max(1, model.min_replicas),
            # The policy keeps its own time: Serve's delays would come on top of it.
            upscale_delay_s=0,
            downscale_delay_s=0,
            policy=AutoscalingPolicy(policy_function="deployments.autoscaling:ServePolicy", policy_kwargs=kwargs),
        )
    }


def scheduler_limits(slug: str, args: ClusterArgs) -> SchedulerLimits:
    limits = args.limits
    scaling = next(model.scaling for model in args.models if model.slug == slug)
    spec = model_spec(CATALOG[slug])
    return SchedulerLimits(
        max_queued_rows=limits.max_queued_rows,
        usual_steps=spec.forwards(spec.chunk_size, spec.default_num_steps, 0.0),
        max_customer_rows=limits.max_customer_rows,
        customer_weights=dict(limits.customer_weights),
        grant_timeout_s=limits.chunk_timeout_s,
        boot_s=scaling.boot_s,
        cold_start_budget_s=scaling.cold_start_budget_s,
    )
