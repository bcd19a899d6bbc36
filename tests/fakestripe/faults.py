"""What can go wrong at Stripe or on the way, on demand: once, or with a probability."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Literal, TypeVar

ApiFault = Literal["500_after", "500_before", "409", "429", "timeout"]
"""`500_after` executes and answers 500, which an idempotency key then replays; `timeout` executes and never answers."""
WebhookFault = Literal["drop", "duplicate", "reorder", "stale", "two_signatures", "old_version", "forged"]
Kind = TypeVar("Kind")


@dataclass
class Faults:
    """`next` are used up first in, first out by the requests whose path they name; then chance decides."""

    random: Random = field(default_factory=lambda: Random(0))
    next: list[tuple[ApiFault, str]] = field(default_factory=list)
    """A fault, and what the request's `METHOD /path` begins with."""
    api_probability: float = 0.0
    api_kinds: tuple[ApiFault, ...] = ("500_after", "500_before", "409", "429", "timeout")
    next_webhook: list[WebhookFault] = field(default_factory=list)
    webhook_probability: float = 0.0
    webhook_kinds: tuple[WebhookFault, ...] = ("drop", "duplicate", "reorder", "stale", "two_signatures", "old_version")

    def fail(self, kind: ApiFault, request: str, times: int = 1) -> None:
        self.next += [(kind, request)] * times

    def of_request(self, request: str) -> ApiFault | None:
        for index, (kind, prefix) in enumerate(self.next):
            if request.startswith(prefix):
                del self.next[index]
                return kind
        return self._chance(self.api_probability, self.api_kinds)

    def of_webhook(self) -> WebhookFault | None:
        if self.next_webhook:
            return self.next_webhook.pop(0)
        return self._chance(self.webhook_probability, self.webhook_kinds)

    def _chance(self, probability: float, kinds: Iterable[Kind]) -> Kind | None:
        if probability and self.random.random() < probability:
            return self.random.choice(list(kinds))
        return None
