"""Configuration, read once at the start and passed on as values. Every number carries its unit.

`Settings` are what an operator sets in the environment; `ClusterArgs` is what a Serve application is built from, and
what a Serve config file gives under `args`.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from billing.commands import CustomerId
from deployments.autoscaling import ScalingTerms
from deployments.file_groups import open_file_groups
from deployments.payments.config import PaymentsConfig
from deployments.results import RECENT_TTL_S
from serve_app.catalog import CATALOG, DEFAULT_MODEL, PACKAGED_CHECKPOINTS


class ScalingArgs(BaseModel):
    """When replicas come and go; `deployments.autoscaling.ScalingTerms` says what each number does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    boot_s: float = Field(240.0, gt=0)
    drain_s: float = Field(60.0, gt=0)
    safety: float = Field(1.0, ge=0)
    window_s: float = Field(30.0, gt=0)
    calm_s: float = Field(180.0, gt=0)
    cold_start_budget_s: float = Field(0.0, ge=0)
    idle_s: float = Field(900.0, gt=0)


class ModelArgs(BaseModel):
    """One served model: a catalog entry with weights, and the replicas that run it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slug: str
    checkpoint: str = ""
    """Directory of a converted checkpoint, or its URL; empty takes the one that is packaged for this slug."""
    command_statistics: str = ""
    """File with the range of the robot's commands (`*_stats.json`), so that clients may send commands for actions."""
    runner: str = ""
    """`module:callable` that makes the model from its checkpoint and device; empty takes the catalog's."""
    device: str = "cpu"
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    accelerator: str = ""
    """Kind of GPU, such as `H100`, as Ray calls it; empty takes any."""
    min_replicas: int = Field(1, ge=0)
    """Kept at all times, those for provisioned units included. 0 only with `scaling.cold_start_budget_s`."""
    max_replicas: int = Field(1, ge=1)
    scaling: ScalingArgs = ScalingArgs()
    max_rows: int = Field(16, ge=1)
    """Candidates in one forward."""
    max_row_steps: int = Field(1024, ge=1)
    """Candidates x denoising steps of one request: what a replica does for it per chunk. 64 candidates may take 16."""
    context_bytes: int = Field(256 * 2**20, ge=0)
    """Of streams' contexts that one replica keeps on its device, of a model that streams; beyond it the least recently
    used go, and are made again when they are needed."""
    torch_threads: int = Field(0, ge=0)
    """CPU threads of the model; 0 leaves torch's default."""

    @model_validator(mode="after")
    def _replicas_are_in_order(self) -> Self:
        self.scaling_terms()
        return self

    def scaling_terms(self) -> ScalingTerms:
        """Raises ValueError if the bounds contradict each other."""
        return ScalingTerms(self.min_replicas, self.max_replicas, **self.scaling.model_dump())


class Limits(BaseModel):
    """Bounds on what one request and one process may take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: int = 32 * 2**20
    max_held_bytes: int = 512 * 2**20
    """Bodies that one ingress replica holds at a time; with the arrays that they become, 2.2 times as much memory."""
    body_timeout_s: float = 120.0
    """For a body to arrive, since a request that trickles in holds one of `max_ongoing_requests`."""
    max_image_pixels: int = 4096 * 4096
    image_decoders: int = Field(2, ge=1)
    """Pictures that one ingress replica decodes at a time; one of `max_image_pixels` takes about 300 MB meanwhile."""
    max_actions: int = 1200
    """Actions in one rollout."""
    max_candidates: int = 64
    max_sessions_per_customer: int = Field(8, ge=1)
    max_sessions: int = Field(200, ge=1)
    """Of all customers together; each holds one of `max_ongoing_requests` of its ingress replica."""
    session_frames: int = Field(1_201, ge=2)
    """Reserved for a session that does not ask for fewer."""
    session_idle_s: float = 120.0
    send_timeout_s: float = Field(20.0, gt=0)
    """A client that takes nothing of a stream or a session for this long is cut off; it pays for what was sent."""
    max_raw_bytes: int = 128 * 2**20
    """Raw frames in one answer."""
    max_queued_rows: int = 256
    """Rows of the usual number of steps that wait for one model before requests are answered 503: each customer's fair
    part of them, per service class."""
    max_customer_rows: int = Field(0, ge=0)
    """Rows that one customer may have running on one model, even while it is idle; 0 sets no limit."""
    customer_weights: dict[CustomerId, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Customers whose fair share of a busy model is not 1."""
    queue_timeout_s: float = 60.0
    chunk_timeout_s: float = 120.0
    running_jobs: int = Field(16, ge=1)
    """Async rollouts that one ingress replica runs at a time."""
    max_live_jobs: int = Field(10_000, ge=1)
    """Async rollouts that wait or run, of all customers; beyond them new ones are answered 503."""
    max_live_jobs_per_customer: int = Field(1_000, ge=1)
    """Beyond them this customer's new ones are answered 429."""
    job_timeout_s: float = Field(24 * 3600.0, gt=0)
    """An async rollout that could not be run for this long is refunded."""
    max_ongoing_requests: int = 400
    """Requests that one ingress replica holds at a time: more than may queue for a model, so that the model's own bound
    is the one that is met, with its Retry-After."""
    max_waiting_requests: int = 200
    """Requests that wait in a proxy for an ingress replica; beyond them it answers 503 itself."""


class PaymentsArgs(BaseModel):
    """Stripe's secrets, in the environment or in files; without a secret key payments are off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    secret_key: SecretStr = SecretStr("")
    webhook_secrets: SecretStr = SecretStr("")
    """Separated by commas; two while one is being rolled."""
    secret_key_file: Path | None = None
    """Instead of `secret_key`: a configuration that is deployed can be read by others, a mounted file cannot."""
    webhook_secrets_file: Path | None = None
    api_base: str = ""
    """Another peer than Stripe, for tests."""

    def config(self) -> PaymentsConfig:
        """Raises ValueError with one line that says what is missing."""
        key, secrets = (
            _secret(self.secret_key, self.secret_key_file),
            _secret(self.webhook_secrets, self.webhook_secrets_file),
        )
        if key and not key.startswith(("sk_", "rk_")):
            raise ValueError("STRIPE_SECRET_KEY must be a secret or restricted key (sk_..., rk_...)")
        each = tuple(secret.strip() for secret in secrets.split(",") if secret.strip())
        if key and not each:
            raise ValueError("STRIPE_WEBHOOK_SECRETS must be set with STRIPE_SECRET_KEY: no payment could be trusted")
        return PaymentsConfig(key, each, self.api_base)


def _secret(given: SecretStr, file: Path | None) -> str:
    if file is None:
        return given.get_secret_value().strip()
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


class ClusterArgs(BaseModel):
    """Everything `serve_app.build:build` needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_dir: Path
    database_url: str
    default_model: str = DEFAULT_MODEL
    models: tuple[ModelArgs, ...]
    ingress_replicas: int = Field(1, ge=1)
    control_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for ingress replicas, the ledger and the schedulers; empty takes any node."""
    lpips_weights: str = ""
    """File of the LPIPS network's weights (safetensors), readable on every node with replicas; empty without it."""
    lpips_sha256: str = ""
    public_url: str = ""
    """Base of absolute URLs in answers; empty takes it from each request's Host header."""
    results_url: str = ""
    """Where results and the inputs of queued jobs are kept: a path, or an fsspec URL such as `s3://bucket/prefix`;
    empty means below the data directory."""
    video_ttl_s: float = Field(24 * 3600.0, ge=RECENT_TTL_S)
    webhook_loopback: bool = False
    """For development: webhooks may go to http on this machine as well as to https anywhere."""
    limits: Limits = Limits()
    payments: PaymentsArgs = PaymentsArgs()

    @property
    def results(self) -> str:
        return self.results_url or str(self.data_dir / "results")

    @model_validator(mode="after")
    def _results_can_be_kept(self) -> Self:
        try:
            open_file_groups(self.results)
        except (ImportError, ValueError) as error:
            raise ValueError(f"results_url {self.results_url!r} cannot be used: {error}") from None
        return self

    @model_validator(mode="after")
    def _payments_are_whole(self) -> Self:
        self.payments.config()
        return self

    @model_validator(mode="after")
    def _cold_starts_can_be_waited_for(self) -> Self:
        for model in self.models:
            if model.scaling.cold_start_budget_s > self.limits.queue_timeout_s:
                raise ValueError(
                    f"{model.slug}: cold_start_budget_s {model.scaling.cold_start_budget_s:g} is longer than a request "
                    f"may wait at all, queue_timeout_s {self.limits.queue_timeout_s:g}"
                )
        return self

    @model_validator(mode="after")
    def _models_are_known(self) -> Self:
        slugs = [model.slug for model in self.models]
        for model in self.models:
            if model.slug not in CATALOG:
                raise ValueError(f"{model.slug!r} is not in the catalog; it has {', '.join(CATALOG)}")
            if not model.checkpoint and not model.runner and model.slug not in PACKAGED_CHECKPOINTS:
                raise ValueError(f"{model.slug!r} has no packaged checkpoint; name the directory of one")
        if self.default_model not in slugs:
            raise ValueError(f"the default model {self.default_model!r} is not served; these are: {', '.join(slugs)}")
        return self


class Settings(BaseSettings):
    """The environment of `make serve` and `dream-admin`."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    no_auth: bool = False
    """For development: no request needs a key, and all are the development customer's. Loopback only."""
    data_dir: Path = Path(".data")
    database_url: str = ""
    """Empty means SQLite in the data directory."""
    default_model: str = DEFAULT_MODEL
    model_checkpoints: dict[str, str] = Field(default_factory=dict)
    """JSON object from a catalog slug to its checkpoint, a directory or a URL; empty for the packaged one. The default
    model needs no entry."""
    model_statistics: dict[str, str] = Field(default_factory=dict)
    """JSON object from a catalog slug to the file with the range of its robot's commands."""
    model_device: str = "cpu"
    lpips_weights: str = ""
    """File of the LPIPS network's weights; without it that metric is not offered."""
    lpips_sha256: str = ""
    public_url: str = ""
    results_url: str = ""
    stripe_secret_key: SecretStr = SecretStr("")
    """Empty means that payments are off."""
    stripe_webhook_secrets: SecretStr = SecretStr("")
    stripe_api_base: str = ""
    webhook_loopback: bool = False
    ray_address: str = ""
    """For `dream-admin` beside a cluster of `serve deploy`; one of `make serve` is found by itself."""

    @property
    def payments(self) -> PaymentsArgs:
        return PaymentsArgs(
            secret_key=self.stripe_secret_key,
            webhook_secrets=self.stripe_webhook_secrets,
            api_base=self.stripe_api_base,
        )

    @property
    def ledger_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'ledger.db'}"

    @staticmethod
    def _absolute(path: str) -> str:
        """The cluster's processes have working directories of their own."""
        return str(Path(path).resolve()) if path else ""

    def cluster_args(self) -> ClusterArgs:
        checkpoints = {DEFAULT_MODEL: ""} | self.model_checkpoints
        return ClusterArgs(
            data_dir=self.data_dir.resolve(),
            database_url=self.ledger_url,
            default_model=self.default_model,
            lpips_weights=self._absolute(self.lpips_weights),
            lpips_sha256=self.lpips_sha256,
            public_url=self.public_url,
            payments=self.payments,
            results_url=self.results_url if "://" in self.results_url else self._absolute(self.results_url),
            webhook_loopback=self.webhook_loopback,
            models=tuple(
                ModelArgs(
                    slug=slug,
                    checkpoint=checkpoint,
                    command_statistics=self.model_statistics.get(slug, ""),
                    device=self.model_device,
                    num_gpus=1.0 if self.model_device.startswith("cuda") else 0.0,
                )
                for slug, checkpoint in checkpoints.items()
            ),
        )
