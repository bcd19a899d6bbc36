"""What a served model costs now: the one place that reservations, quotes and answers take a price from."""

from billing.prices import NANO_PER_MIL, PriceVersion, Rate
from deployments.messages import ModelSpec


def list_price(model: ModelSpec) -> PriceVersion:
    return PriceVersion(model.slug, 1, 0.0, (Rate("frame", model.mils_per_frame * NANO_PER_MIL),))
