"""What payments need to know, as one value."""

from dataclasses import dataclass

MAX_STALE = 5
"""Looks at one payment in a row; each is overtaken only by another that was applied."""


@dataclass(frozen=True, slots=True)
class PaymentsConfig:
    secret_key: str
    """Stripe's; empty turns payments off."""
    webhook_secrets: tuple[str, ...] = ()
    """All that are valid: two while one is being rolled."""
    api_base: str = ""
    """Another peer than Stripe; empty for Stripe itself."""
    request_timeout_s: float = 10.0
    max_attempts: int = 4
    """Of one request, over which it may take `max_attempts` times its time-out and a few seconds of waiting."""
    first_wait_s: float = 0.25
    """Between the first two attempts; it doubles, and is four times that after a 429."""
    page_ttl_s: float = 3_600.0
    """How long a payment page stays open; Stripe takes 30 minutes to 24 hours."""
    events_every_s: float = 300.0
    objects_every_s: float = 600.0
    object_age_s: float = 600.0
    """A top-up that nothing was heard of for this long is asked about."""
    auto_every_s: float = 2.0
    """Between looks for balances below their threshold."""

    def __repr__(self) -> str:
        """Without the secrets: configuration is named in logs and in the names of actors."""
        return (
            f"PaymentsConfig(livemode={self.livemode}, webhook_secrets={len(self.webhook_secrets)},"
            f" api_base={self.api_base!r}, page_ttl_s={self.page_ttl_s}, events_every_s={self.events_every_s},"
            f" objects_every_s={self.objects_every_s})"
        )

    @property
    def enabled(self) -> bool:
        return bool(self.secret_key)

    @property
    def livemode(self) -> bool:
        return "_live_" in self.secret_key
