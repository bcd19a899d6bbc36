"""Every metric of the cluster, in one table: docs/08-metrics.md, the dashboard and the alert rules are held to it.

No label has more values than the cluster has models, routes, classes, audits or reasons; customers and keys are in the
ledger, not here.
"""

from dataclasses import dataclass
from typing import Literal

SHORT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Bounds of buckets, in seconds, for what takes milliseconds."""
LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
BOOT_S = (1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    """As it is exposed; a histogram's has `_bucket`, `_sum` and `_count` after it."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's, ascending; the one without a bound is not among them."""


MODEL = ("model",)
MODEL_CLASS = ("model", "service_class")

HTTP_REQUESTS = Metric(
    "dream_http_requests_total",
    "counter",
    "Requests answered, by the route's template; `none` if there is none, status 0 if the client left first.",
    ("route", "method", "status"),
)
HTTP_SECONDS = Metric(
    "dream_http_request_seconds", "histogram", "From a request's first byte to its answer's last.", ("route",), LONG_S
)

ROLLOUTS = Metric(
    "dream_rollouts_total",
    "counter",
    "Priced requests by how they ended: `succeeded`, `refused`, `failed`, `canceled`.",
    ("model", "outcome"),
)
ROLLOUT_QUEUE_SECONDS = Metric(
    "dream_rollout_queue_seconds", "histogram", "Waiting for a replica, all chunks together.", MODEL, LONG_S
)
ROLLOUT_INFER_SECONDS = Metric(
    "dream_rollout_infer_seconds", "histogram", "In the engine, all chunks together.", MODEL, LONG_S
)
ROLLOUT_SECONDS = Metric(
    "dream_rollout_seconds", "histogram", "Of a rollout that succeeded, from its arrival to its answer.", MODEL, LONG_S
)

ENGINE_STEP_SECONDS = Metric(
    "dream_engine_step_seconds", "histogram", "One denoising step of one batch: one forward.", MODEL, SHORT_S
)
ENGINE_STEP_ROWS = Metric("dream_engine_step_rows", "histogram", "Candidates in one forward.", MODEL, SIZES)
ENGINE_PLACES = Metric(
    "dream_engine_places_total",
    "counter",
    "Candidates that the forwards would have had room for: rows over places is how full batches are.",
    MODEL,
)
ENGINE_BISECTIONS = Metric(
    "dream_engine_bisections_total", "counter", "Batches that raised and were run again in halves.", MODEL
)
ENGINE_OUT_OF_MEMORY = Metric(
    "dream_engine_out_of_memory_total", "counter", "Those of them that did not fit into the device's memory.", MODEL
)
ENGINE_ROWS_FAILED = Metric(
    "dream_engine_rows_failed_total", "counter", "Candidates' chunks on which the model raised.", MODEL
)
LATENT_CACHE_HITS = Metric("dream_latent_cache_hits_total", "counter", "Start frames whose latents were known.", MODEL)
LATENT_CACHE_MISSES = Metric("dream_latent_cache_misses_total", "counter", "Start frames that were encoded.", MODEL)
LATENT_CACHE_BYTES = Metric("dream_latent_cache_bytes", "gauge", "Latents that the replicas keep, all together.", MODEL)
CONTEXT_CACHE_HITS = Metric(
    "dream_context_cache_hits_total", "counter", "Chunks of streams whose context their replica had.", MODEL
)
CONTEXT_CACHE_MISSES = Metric(
    "dream_context_cache_misses_total",
    "counter",
    "Contexts of streams that were not there, to be sent along or made again.",
    MODEL,
)
CONTEXT_CACHE_BYTES = Metric(
    "dream_context_cache_bytes", "gauge", "Contexts of streams that the replicas keep, all together.", MODEL
)
REPLICA_BOOT_SECONDS = Metric(
    "dream_replica_boot_seconds",
    "histogram",
    "Loading a replica: weights, profile, warm-up. Its sum is what cold starts cost, beyond the machine's own start.",
    MODEL,
    BOOT_S,
)
REPLICA_SECONDS = Metric("dream_replica_seconds_total", "counter", "Time for which replicas were ready.", MODEL)
REPLICA_GPU_SECONDS = Metric(
    "dream_replica_gpu_seconds_total", "counter", "The same times the GPUs of each; 0 on CPUs.", MODEL
)

REPLICAS = Metric("dream_replicas", "gauge", "Replicas by state: `ready`, `booting`.", ("model", "state"))
SCHEDULER_CAPACITY_ROWS = Metric(
    "dream_scheduler_capacity_rows", "gauge", "Candidates in one forward, over all replicas.", MODEL
)
SCHEDULER_RUNNING_ROWS = Metric(
    "dream_scheduler_running_rows", "gauge", "Candidates that were granted a replica and are not done.", MODEL
)
SCHEDULER_QUEUED_ROWS = Metric(
    "dream_scheduler_queued_rows", "gauge", "Candidates that wait for a replica.", MODEL_CLASS
)
SCHEDULER_QUEUED_ROW_STEPS = Metric(
    "dream_scheduler_queued_row_steps", "gauge", "Their cost: candidates times denoising steps.", MODEL_CLASS
)
SCHEDULER_GRANT_SECONDS = Metric(
    "dream_scheduler_grant_seconds", "histogram", "From a chunk's arrival to its grant.", MODEL_CLASS, LONG_S
)
SCHEDULER_REFUSALS = Metric(
    "dream_scheduler_refusals_total",
    "counter",
    "Chunks that got no grant: `overloaded`, `too_late` for their deadline, `withdrawn` by their client.",
    ("model", "service_class", "reason"),
)
CAPACITY_ROLLOUTS_PER_SECOND = Metric(
    "dream_capacity_rollouts_per_second",
    "gauge",
    "Rollouts of 49 frames and one candidate that the ready replicas make in full batches.",
    MODEL,
)
HEADROOM_ROLLOUTS_PER_SECOND = Metric(
    "dream_headroom_rollouts_per_second", "gauge", "What of that the last half minute left unused.", MODEL
)

LEDGER_COMMIT_SECONDS = Metric("dream_ledger_commit_seconds", "histogram", "One durable commit.", (), SHORT_S)
LEDGER_COMMIT_COMMANDS = Metric("dream_ledger_commit_commands", "histogram", "Commands in one commit.", (), SIZES)
LEDGER_ENTRIES = Metric("dream_ledger_entries_total", "counter", "Rows added to wallets.", ("kind",))
LEDGER_FRAMES_BILLED = Metric("dream_ledger_frames_billed_total", "counter", "Frames of settled requests.", MODEL)
LEDGER_CAPTURED_MILS = Metric(
    "dream_ledger_captured_mils_total", "counter", "Revenue: what settlements kept. A mil is $0.0001.", MODEL
)
LEDGER_REFUNDED_MILS = Metric("dream_ledger_refunded_mils_total", "counter", "What settlements gave back.", MODEL)
LEDGER_AUDIT_VIOLATIONS = Metric(
    "dream_ledger_audit_violations", "gauge", "Rows that contradict this audit's claim; must be 0.", ("audit",)
)
LEDGER_AUDITS_NOT_FINISHED = Metric(
    "dream_ledger_audits_not_finished", "gauge", "Audits of the last round that gave no answer."
)
LEDGER_AUDIT_TIMESTAMP_SECONDS = Metric(
    "dream_ledger_audit_timestamp_seconds", "gauge", "When the last round of audits ended, POSIX time."
)
LEDGER_AUDIT_DURATION_SECONDS = Metric(
    "dream_ledger_audit_duration_seconds", "gauge", "How long the last round of audits took."
)

STRIPE_DIFFERENCE_CENTS = Metric(
    "dream_stripe_difference_cents",
    "gauge",
    "By how much Stripe's books of the last day differ from ours, without sign.",
)
STRIPE_INBOX_AGE_SECONDS = Metric(
    "dream_stripe_inbox_age_seconds", "gauge", "Of the oldest event of Stripe's that was not applied."
)

PART_UP = Metric(
    "dream_part_up",
    "gauge",
    "1 if this part answered the scrape: `ledger`, `status`, `payments`, `controller`, `scheduler` of each model.",
    ("part", "model"),
)
BUILD_INFO = Metric("dream_build_info", "gauge", "Always 1.", ("version",))

METRICS: tuple[Metric, ...] = tuple(each for each in list(globals().values()) if isinstance(each, Metric))
BY_NAME = {metric.name: metric for metric in METRICS}
