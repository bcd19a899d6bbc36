"""The JSON bodies of the wire, in and out."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from deployments.messages import Metric, Returns

MAX_NUM_STEPS = 100
MAX_GUIDANCE = 20.0
MAX_SEED = 2**63 - 1
MAX_DEADLINE_MS = 600_000

ActionsFormat = Literal["encoded", "commands"]
"""Whether the actions part holds what the model is given, or the robot's own commands."""


class UpstreamProvider(BaseModel):
    key: str
    name: str
    short_name: str
    logo_url: str | None = None
    homepage: str | None = None
    huggingface_org: str | None = None


class CatalogSpec(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_size: str
    embodiment: str
    action_dim: int
    chunk_size: int
    resolution: tuple[int, int] = Field(description="[H, W]")
    default_num_steps: int
    default_guidance: float
    runner: str
    output_kind: str = "video"
    encoder_name: str | None = None
    temporal_compression: int | None = None
    ckpt_repo: str | None = None
    base_model: str | None = None
    tokenizer: str | None = None
    attention: str | None = Field(None, description="The kernel of the running replicas; null while none runs")


class Benchmark(BaseModel):
    """Measured figures only; a model without them has no block at all."""

    version: str
    run_id: str
    vs_baseline: str
    speedup_x: float
    bench_wall_s: float
    engine_wall_ms: float
    psnr_db: float
    psnr_delta_db: float
    ssim: float
    ssim_delta: float
    lpips: float | None
    lpips_delta: float | None
    cost_per_rollout_usd: float
    rollouts: int
    notes: str


class CatalogEntry(BaseModel):
    slug: str
    name: str
    provider: str
    upstream_provider: UpstreamProvider
    category: str
    summary: str
    description: str
    intended_use: str
    training_data: str
    license: str
    links: dict[str, str]
    price_per_frame_usd: float
    is_flagship: bool = False
    is_benchmarked: bool = False
    active: bool = Field(False, description="Whether this base URL runs this model")
    spec: CatalogSpec
    benchmark: Benchmark | None = None


class Catalog(BaseModel):
    data: list[CatalogEntry]


class SpecPrice(BaseModel):
    slug: str
    price_per_frame_usd: float


class Specs(BaseModel):
    specs: list[SpecPrice]
    default_price_usd_per_frame: float


class RolloutParams(BaseModel):
    """The `params` field of `POST /v1/rollouts`. Unknown names are refused: a misspelt knob must not be ignored.

    JSON has types, so they are taken as they are: `true` is no seed, and `"false"` no switch.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    seed: int = Field(0, ge=0, le=MAX_SEED)
    score: bool = False
    num_steps: int | None = Field(None, ge=1, le=MAX_NUM_STEPS)
    guidance: float | None = Field(None, ge=0.0, le=MAX_GUIDANCE, allow_inf_nan=False)
    actions_format: ActionsFormat = "encoded"
    mode: Literal["sync", "async"] = "sync"
    webhook_url: str | None = None


class PredictParams(BaseModel):
    """The form fields of `POST /v1/predict`, beside its files."""

    model_config = ConfigDict(extra="forbid")

    seed: int = Field(0, ge=0, le=MAX_SEED)
    num_steps: int | None = Field(None, ge=1, le=MAX_NUM_STEPS)
    guidance: float | None = Field(None, ge=0.0, le=MAX_GUIDANCE, allow_inf_nan=False)
    actions_format: ActionsFormat = "encoded"
    frame_id: str | None = Field(None, description="Of a frame uploaded to /v1/frames, in place of the file `frame`")
    deadline_ms: int | None = Field(None, ge=1, le=MAX_DEADLINE_MS, description="From the request's arrival")
    score: bool = Field(False, description="Measure the frames against full steps, or against `ground_truth`")
    service_class: Literal["standard", "batch"] = Field(
        "standard", description="`batch` takes a small share of a busy model, at the price of that class"
    )


class BatchParams(PredictParams):
    """The form fields of `POST /v1/predict/batch`, beside its files."""

    horizon: int | None = Field(None, ge=1, description="Run only so many actions of each candidate")
    max_cost_mils: int | None = Field(None, ge=1, description="Refuse the request if it could cost more")
    returns: Returns = Field("mp4", alias="return")
    goal_frame_id: str | None = Field(None, description="Of an uploaded frame, in place of the file `goal_frame`")
    metric: Metric | None = Field(None, description="How the last frame is measured against the goal; mse if not said")
    prune: float | None = Field(None, gt=0, lt=1, description="Share of the candidates that goes on after each chunk")
    best_clip: bool = Field(False, description="With return=scores: the video of the best candidate too")


class RolloutMetadata(BaseModel):
    provider: str
    provider_name: str
    executed_model: str
    upstream_id: str
    cost: float | None = Field(None, description="USD, exact to the mil; once it has ended")
    cost_estimate: float | None = Field(None, description="USD, what is reserved for it; until it has ended")
    frames_requested: int | None = Field(None, description="Of a rollout of mode=async")
    start_frame_resized: bool | None = None


class RolloutFailure(BaseModel):
    code: str
    message: str


class RolloutEnvelope(BaseModel):
    id: str
    object: Literal["rollout"] = "rollout"
    model: str
    created: int
    status: Literal["queued", "running", "succeeded", "failed", "canceled"]
    frames: int = Field(description="In its video; 0 until there is one")
    resolution: tuple[int, int] = Field(description="[H, W]")
    engine_wall_ms: float
    psnr_db: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    cost_usd: float
    video_url: str | None = Field(None, description="Once there is a video")
    video_url_expires_at: int | None = None
    seed: int
    error: RolloutFailure | None = Field(None, description="Why it failed")
    metadata: RolloutMetadata

    @model_serializer(mode="wrap")
    def _without_scores_that_there_are_not(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name not in SCORES or value is not None}


SCORES = ("psnr_db", "ssim", "lpips")


class CandidateScore(BaseModel):
    index: int
    score: float = Field(description="In the metric's own unit")
    frames: int = Field(description="Made, and charged, the start frame among them")
    pruned: bool


class Scores(BaseModel):
    """How near each candidate's last frame is to the goal."""

    id: str
    object: Literal["scores"] = "scores"
    model: str
    metric: Metric
    higher_is_better: bool
    best: int
    candidates: list[CandidateScore]
    frames: int
    cost_mils: int
    cost_usd: float
    engine_wall_ms: float


class UploadedFrame(BaseModel):
    id: str
    object: Literal["frame"] = "frame"
    resolution: tuple[int, int] = Field(description="[H, W]")
    resized: bool
    expires_at: int


class RolloutList(BaseModel):
    object: Literal["list"] = "list"
    data: list[RolloutEnvelope]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = Field(description="Whether there are more on the side that was asked for")


class DeliveryAttempt(BaseModel):
    attempt: int
    ts: float
    took_ms: float
    status: int | None = Field(None, description="What the receiver answered, if it did")
    problem: str | None = Field(None, description="Absent when it was delivered")


class WebhookDelivery(BaseModel):
    id: str = Field(description="The `webhook-id` of every attempt")
    url: str
    state: Literal["pending", "delivered", "failed"]
    created: float
    next_attempt_at: float | None = None
    attempts: list[DeliveryAttempt]


class Deliveries(BaseModel):
    object: Literal["list"] = "list"
    data: list[WebhookDelivery]


class WebhookSecret(BaseModel):
    secret: str = Field(description="`whsec_` and base64, as Standard Webhooks writes it")
    created: float


class WebhookSecrets(BaseModel):
    secrets: list[WebhookSecret] = Field(description="Any of them verifies a webhook; the newest comes first")


class EstimateComponent(BaseModel):
    """One line of a price. Money in USD, exact to the nano-dollar in `unit_price` and to the mil in `total_cost`."""

    type: Literal["video"] = "video"
    metric: str
    quantity: float
    billable_quantity: float
    unit_price: float
    total_cost: float


class Estimate(BaseModel):
    """The answer to `dryRun=true`: a price that binds until it expires."""

    model_config = ConfigDict(protected_namespaces=())

    estimated: Literal[True] = True
    model: str
    provider: str
    cost_mils: int
    total_cost_micros: int = Field(description="Millionths of a dollar")
    cost_usd: float
    currency: Literal["USD"] = "USD"
    components: list[EstimateComponent]
    affordable_rollouts: int = Field(description="How many of this request the balance pays for")
    expected_wait_s: float | None = Field(description="Until it would begin; 0 if at once, null if nothing is known")
    quote_id: str
    expires_at: float


class Balance(BaseModel):
    customer_id: str
    balance_mils: int
    balance_cents: int
    balance_usd: float
    spendable_mils: int = Field(description="The balance, and whatever credit was granted beyond it")
    debt_mils: int = Field(description="Of payments that were taken back; whatever comes in repays it first")
    model: str = Field(description="The active model, whose price the next two are at")
    rollouts_left: int = Field(description="Of 49 frames, one candidate")
    mpc_hours_left: float = Field(description="Of 10 decisions a second with 8 candidates of 49 frames each")
    spending_mils_per_hour: int = Field(description="At the rate of the last minute, refunds taken off")
    hours_left: float | None = Field(description="At that rate; null while nothing is spent")


class Transaction(BaseModel):
    id: str
    seq: int = Field(description="Of the entry in its wallet: counts from 1 without a gap")
    ts: float
    kind: Literal["debit", "credit", "refund"]
    amount_mils: int
    amount_cents: int
    amount_usd: float
    balance_after_mils: int
    balance_after_cents: int
    balance_after_usd: float
    detail: str


class Transactions(BaseModel):
    customer_id: str
    transactions: list[Transaction]


class LatencyPercentiles(BaseModel):
    p50: float
    p90: float
    p99: float


class OutcomeRates(BaseModel):
    requests: int
    error_rate: float
    """Engine failures over requests that ran."""
    refund_rate: float
    """Requests that were paid back over requests that ran."""


class LatencyQuarter(BaseModel):
    started_at: float
    """POSIX seconds at which this quarter of an hour began."""
    requests: int
    total_ms: LatencyPercentiles | None


class ModelStatus(BaseModel):
    state: Literal["ready", "starting", "idle", "unreachable"]
    """`starting`: no replica serves yet. `idle`: none does and none is kept; the next request starts one."""
    replicas: int
    """That serve now."""
    booting_replicas: int | None
    """None if Serve's controller does not answer."""
    max_replicas: int
    running_rows: int
    queued_rows: int
    capacity_rows: int
    utilisation: float
    """Running rows over what the replicas take at a time, 0 to 1."""
    capacity_rollouts_per_s: float | None
    """Rollouts of 49 frames and one candidate that the replicas make in full batches; None while no rate is known."""
    headroom_rollouts_per_s: float | None
    """What of that the last half minute left unused."""
    cold_start_s: float
    """What the operator says a replica takes from being asked for until it serves."""
    requests: int
    frames: int
    failed: int
    canceled: int
    refused: int
    error_rate: float
    rates: dict[str, OutcomeRates]
    """Over the last `1m`, `15m` and `24h`."""
    quarters: list[LatencyQuarter]
    """The last day by quarters of an hour, oldest first; those without a request are left out."""
    queue_ms: LatencyPercentiles | None
    infer_ms: LatencyPercentiles | None
    total_ms: LatencyPercentiles | None


class LedgerStatus(BaseModel):
    """What the ledger's own audits last found."""

    audits: Literal["ok", "violated", "not_finished", "pending", "unreachable"]
    """`not_finished`: the database did not answer some. `pending`: the ledger has not finished a round yet."""
    audited_at: float | None = None
    """POSIX seconds."""
    took_s: float | None = None
    violations: int = 0


class Status(BaseModel):
    model: str
    models: dict[str, ModelStatus]
    ledger: LedgerStatus
    uptime_s: float
    window_s: float
    version: str


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    message: str
    type: str
    code: str


class ErrorBody(BaseModel):
    """Both shapes that clients know: FastAPI's `detail` and the gateway-style `error`."""

    detail: str | dict[str, int | str]
    error: ErrorDetail
