"""How many replicas a model should have: what is asked for, plus what it takes to work off the backlog in time.

`DemandPolicy` is pure, with the time as an argument, so the cluster and the fleet simulator run the same class.
`ServePolicy` is what Serve's controller calls: it hands over what the model's scheduler counts.

The target is absolute, not a change of the present number. Replicas that are booting are therefore never asked for
twice: they are part of the target that has been set already. Ray's own policy multiplies the present number by the
load per running replica; while a step's worth of replicas boots, that load stays high and the number keeps growing.

Work is counted in replica-seconds: what a request would take of one replica that runs full batches.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from billing.database import open_database
from billing.units import UnitsReader
from deployments.scheduler import Demand

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ScalingTerms:
    """One model's bounds and promises."""

    min_replicas: int = 1
    """Kept at all times; more are if customers pay for provisioned units. 0 only with a cold-start budget."""
    max_replicas: int = 1
    boot_s: float = 240.0
    """From asking for a replica until it serves: node, image, weights, warm-up."""
    drain_s: float = 60.0
    """Within this time after the new replicas serve, the backlog should be gone."""
    safety: float = 1.0
    """Replicas to spare, in square roots of the load: R + safety * sqrt(R), the square-root staffing of queueing theory
    (Halfin and Whitt 1981). A large fleet needs a smaller share of spare replicas than a small one."""
    window_s: float = 30.0
    """Work asked for is averaged over this long."""
    calm_s: float = 180.0
    """Replicas go only after this long without a moment whose steady work needed them."""
    cold_start_budget_s: float = 0.0
    """How long a first request may wait for a replica to boot; 0: the model is never scaled to zero."""
    idle_s: float = 900.0
    """Without any work for this long, a model with a cold-start budget is scaled to zero."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"replicas must be 0 <= min <= max, max >= 1; got {self.min_replicas}..{self.max_replicas}"
            )
        if self.safety < 0:
            raise ValueError(f"safety must not be negative, got {self.safety}")
        for name in ("boot_s", "drain_s", "window_s", "calm_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.min_replicas == 0 and self.cold_start_budget_s <= 0:
            raise ValueError("a model may be scaled to zero only if it declares a cold-start budget")


class DemandPolicy:
    """Feed it the demand every second or so; `decide` answers with the number of replicas to have."""

    def __init__(self, terms: ScalingTerms) -> None:
        self._terms = terms
        self._offered: deque[tuple[float, float]] = deque()
        """(time, replica-seconds offered until then), over the window."""
        self._steady: deque[tuple[float, float]] = deque()
        """Decreasing loads within `calm_s`: the first is the largest."""
        self._started_at: float | None = None
        self._busy_at = float("-inf")

    def decide(self, now: float, demand: Demand, ready: int, target: int, promised: int = 0) -> int:
        """`ready` replicas serve and `target` were asked for last; returns the next target.

        `promised` replicas are kept for those who pay for them, used or not.
        """
        terms = self._terms
        if self._started_at is None:
            self._started_at = self._busy_at = now
        if self._offered and demand.offered_s < self._offered[-1][1]:
            self._offered.clear()  # the scheduler began anew
        rate = self._rate(now, demand.offered_s)
        if rate > 0 or demand.backlog_s > 0:
            self._busy_at = now
        steady = rate + terms.safety * math.sqrt(rate)
        while self._steady and self._steady[-1][1] <= steady:
            self._steady.pop()
        self._steady.append((now, steady))
        while self._steady[0][0] < now - terms.calm_s:
            self._steady.popleft()
        held = math.ceil(self._steady[0][1] + self._to_drain(rate, demand.backlog_s, ready, target) - 1e-9)
        if now - self._started_at < terms.calm_s:
            held = max(held, target)  # this policy is new, and does not know what the present number was needed for
        floor = max(terms.min_replicas, promised)
        if floor == 0 and (now - self._busy_at < terms.idle_s or demand.backlog_s > 0):
            floor = min(1, max(held, target))
        return min(max(floor, held), terms.max_replicas)

    def _rate(self, now: float, offered_s: float) -> float:
        """Replicas' worth of work asked for per second, over the window."""
        self._offered.append((now, offered_s))
        while len(self._offered) > 2 and self._offered[1][0] <= now - self._terms.window_s:
            self._offered.popleft()
        since, before = self._offered[0]
        # Early on the window is not full: dividing by all of it keeps one first request from looking like a flood.
        return (offered_s - before) / max(now - since, self._terms.window_s)

    def _to_drain(self, rate: float, backlog_s: float, ready: int, target: int) -> float:
        """Replicas besides, for what will still be waiting when those that are asked for now begin to serve."""
        booting = max(0, target - ready)
        # Those already on the way serve, on average, half of the time that a new one takes to come.
        spare_s = (ready + booting / 2 - rate) * self._terms.boot_s
        return min(backlog_s, max(0.0, backlog_s - spare_s)) / self._terms.drain_s


class ServePolicy:
    """Serve's autoscaling policy for one model. Asks from threads of its own: the controller must not wait."""

    POLL_EVERY_S = 1.0
    PROMISES_EVERY_S = 30.0
    STALE_S = 10.0

    def __init__(self, model: str, terms: dict[str, Any], database_url: str) -> None:
        """`terms` are the fields of `ScalingTerms`: Serve passes JSON. The database tells how many replicas are
        promised; the last answer holds while it cannot be asked."""
        self._model = model
        self._policy = DemandPolicy(ScalingTerms(**terms))
        self._database_url = database_url
        self._units: UnitsReader | None = None
        self._latest: tuple[float, Demand] | None = None
        self._promised = 0
        self._polling = False

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        if not self._polling:
            self._polling = True
            for ask, every_s in ((self._ask_demand, self.POLL_EVERY_S), (self._ask_promises, self.PROMISES_EVERY_S)):
                name = f"{ask.__name__.strip('_')}-{self._model}"
                threading.Thread(target=self._poll_forever, args=(ask, every_s), name=name, daemon=True).start()
        latest, now = self._latest, time.monotonic()
        ready, target = context.current_num_replicas, context.target_num_replicas
        if latest is None or now - latest[0] > self.STALE_S:
            return target, {}  # nothing is known: neither grow nor shrink on a guess
        return self._policy.decide(now, latest[1], ready, target, self._promised), {}

    def _poll_forever(self, ask: Callable[[], None], every_s: float) -> None:
        failing = False
        while True:
            try:
                ask()
                failing = False
            except Exception as error:
                if not failing:
                    log.warning(f"{ask.__name__.strip('_')}_failed", model=self._model, error=type(error).__name__)
                failing = True
            time.sleep(every_s)

    def _ask_demand(self) -> None:
        import ray

        from deployments.actors import scheduler_handle

        demand = ray.get(scheduler_handle(self._model).demand.remote(), timeout=self.STALE_S)
        self._latest = time.monotonic(), demand

    def _ask_promises(self) -> None:
        if self._units is None:
            self._units = UnitsReader(open_database(self._database_url))
        self._promised = self._units.replicas(time.time()).get(self._model, 0)
