"""What can go wrong with a rollout, in the engine's words; HTTP gives each its status in one table.

RolloutError
├── CreditsInsufficient   the balance does not cover the price; nothing was reserved
├── KeyNotAccepted        the key was revoked or has expired before the reservation
├── KeyNotAllowed         the key may not spend, or not on this model
├── BudgetUsedUp          the key's budget, or its share of a team's money, does not cover it; nothing was reserved
├── QuoteNotAccepted      the quote is unknown, for other work, or has expired; nothing was reserved
├── IdempotencyKeyReused  the idempotency key already names other work; nothing was reserved
├── ResultExpired         it was delivered before and is no longer kept; nothing was reserved
├── RolloutCanceled       it was sent before and canceled half done; nothing was reserved
├── TooManyJobs           this customer has as many jobs waiting as it may; nothing was reserved
├── ModelOverloaded       the queue is full, or nothing could run the work in time; refunded
├── DeadlinePassed        it was not, or could not have been, done by its deadline; refunded
├── SessionLimit          the customer has as many sessions as it may; nothing was reserved
├── SessionUnknown        no such session of this customer, or it has ended
├── SessionBudgetSpent    the submission needs more frames than its session has left; it was not run
├── SessionBusy           somebody is connected to it already
├── EngineFailed          the model or its replica failed; refunded
└── LedgerUnavailable     nothing runs unless it is reserved first
"""

from typing import Literal

from billing.money import Mils


class RolloutError(Exception):
    """Base of everything `Ingress.run` raises on purpose."""


class CreditsInsufficient(RolloutError):
    def __init__(self, balance_mils: Mils, requested_mils: Mils) -> None:
        super().__init__(balance_mils, requested_mils)
        self.balance_mils = balance_mils
        self.requested_mils = requested_mils

    def __str__(self) -> str:
        return f"the balance is {self.balance_mils} mils and this request needs {self.requested_mils}; add credits"


class KeyNotAccepted(RolloutError):
    def __str__(self) -> str:
        return "the API key was revoked or has expired"


class KeyNotAllowed(RolloutError):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the API key may not do this: {self.reason}"


class BudgetUsedUp(RolloutError):
    def __init__(
        self,
        limit_mils: Mils,
        spent_mils: Mils,
        requested_mils: Mils,
        period: str,
        resets_at: float,
        source: Literal["key", "team"] = "key",
    ) -> None:
        super().__init__(limit_mils, spent_mils, requested_mils, period, resets_at, source)
        self.limit_mils = limit_mils
        self.spent_mils = spent_mils
        self.requested_mils = requested_mils
        self.period = period
        self.resets_at = resets_at
        self.source = source

    def __str__(self) -> str:
        whose = "the API key's budget" if self.source == "key" else "this member's cap on its team's money"
        left = max(0, self.limit_mils - self.spent_mils)
        return (
            f"{whose} is {self.limit_mils} mils per {self.period} and {left} are left; this request needs"
            f" {self.requested_mils}. It starts anew at {int(self.resets_at)} (POSIX seconds)"
        )


class QuoteNotAccepted(RolloutError):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"X-DreamEngine-Quote-Id: {self.reason}; ask for a new quote with dryRun=true. Nothing was charged"


class IdempotencyKeyReused(RolloutError):
    def __str__(self) -> str:
        return "Idempotency-Key: was used before with another payload; use a new key for new work"


class ResultExpired(RolloutError):
    def __str__(self) -> str:
        return "this was delivered before, and its video has expired; send it as new work to run it again"


class RolloutCanceled(RolloutError):
    def __str__(self) -> str:
        return "this was sent before and then canceled; use a new Idempotency-Key, or send it again in a minute"


class TooManyJobs(RolloutError):
    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(limit, retry_after_s)
        self.limit = limit
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.limit} of your jobs are waiting or running, and no more may; try again in {self.retry_after_s} s"


class ModelOverloaded(RolloutError):
    def __init__(self, model: str, retry_after_s: int) -> None:
        super().__init__(model, retry_after_s)
        self.model = model
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.model} has no room right now; try again in {self.retry_after_s} s. Nothing was charged"


class DeadlinePassed(RolloutError):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model

    def __str__(self) -> str:
        return f"{self.model} cannot finish this by its deadline; allow more time or send less. Nothing was charged"


class SessionLimit(RolloutError):
    retry_after_s = 10

    def __str__(self) -> str:
        return "too many sessions are open; close one, or wait for one to end. Nothing was charged"


class SessionUnknown(RolloutError):
    def __str__(self) -> str:
        return "there is no such session, or it has ended; create one with POST /v1/sessions"


class SessionBudgetSpent(RolloutError):
    def __init__(self, frames_left: int, frames_needed: int) -> None:
        super().__init__(frames_left, frames_needed)
        self.frames_left = frames_left
        self.frames_needed = frames_needed

    def __str__(self) -> str:
        return (
            f"actions: the session has {self.frames_left} frames of its budget left and this needs {self.frames_needed}"
            "; send fewer actions, or create another session"
        )


class SessionBusy(RolloutError):
    def __str__(self) -> str:
        return "somebody is connected to this session already; each has one connection"


class EngineFailed(RolloutError):
    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model = model
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.model} failed: {self.reason}. Nothing is charged for it"


class LedgerUnavailable(RolloutError):
    retry_after_s = 2

    def __str__(self) -> str:
        return "the ledger cannot be reached; nothing runs that is not paid for. Try again shortly"
