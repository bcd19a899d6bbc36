"""Provisioned units as they stand: what each customer has, paid and used, and what capacity is promised. Reads only."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from sqlalchemy import Engine, and_, func, select

from billing.commands import CustomerId
from billing.core.units import period_of
from billing.money import Mils
from billing.tables import provision, unit_charge, unit_use


@dataclass(frozen=True, slots=True)
class UnitTerms:
    """A version of a customer's commitment, in force from its month until the next one's."""

    customer_id: CustomerId
    model: str
    version: int
    from_period: str
    units: int
    unit_mils: Mils
    unit_frames: int
    units_per_replica: int


@dataclass(frozen=True, slots=True)
class UnitsNow:
    """One model's units in one month."""

    terms: UnitTerms
    period: str
    charged_at: float | None
    """None while they wait for credit; they pay for nothing until then."""
    frames: int
    """That they pay for this month; 0 while they are not charged."""
    frames_used: int

    @property
    def frames_left(self) -> int:
        return self.frames - self.frames_used


class UnitsReader:
    """Safe to share between threads. Every method raises one of `DATABASE_FAILURES` when the database fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def versions(self) -> list[UnitTerms]:
        """Every version of every commitment, in order."""
        return self._versions(None)

    def now(self, ts: float, customer_id: CustomerId) -> list[UnitsNow]:
        """A customer's units of this month, by model."""
        period = period_of(ts)
        used = select(func.coalesce(func.sum(unit_use.c.frames), 0)).where(
            *(unit_use.c[name] == unit_charge.c[name] for name in ("customer_id", "model", "period"))
        )
        charges = select(
            unit_charge.c.model, unit_charge.c.charged_at, unit_charge.c.frames, used.scalar_subquery().label("used")
        ).where(unit_charge.c.customer_id == customer_id, unit_charge.c.period == period)
        with self._engine.connect() as connection:
            charged = {row.model: row for row in connection.execute(charges)}
        standing = []
        for terms in in_force(self._versions(customer_id), period):
            row = charged.get(terms.model)
            paid = (None, 0, 0) if row is None else (row.charged_at, row.frames, int(row.used))
            standing.append(UnitsNow(terms, period, *paid))
        return standing

    def frames_left(self, ts: float, customer_id: CustomerId, model: str) -> int:
        """Frames of the model that this month's units still pay for."""
        return sum(each.frames_left for each in self.now(ts, customer_id) if each.terms.model == model)

    def replicas(self, ts: float) -> dict[str, int]:
        """How many replicas of each model are promised: a floor for whoever decides how many there are.

        Only what is charged counts, so that a month which was not paid keeps no machine.
        """
        period = period_of(ts)
        paid = (
            select(provision.c.model, provision.c.units, provision.c.units_per_replica)
            .join(
                unit_charge,
                and_(*(unit_charge.c[name] == provision.c[name] for name in ("customer_id", "model", "version"))),
            )
            .where(unit_charge.c.period == period, provision.c.units_per_replica > 0)
        )
        shares: dict[str, Fraction] = {}
        with self._engine.connect() as connection:
            for row in connection.execute(paid):
                shares[row.model] = shares.get(row.model, Fraction(0)) + Fraction(row.units, row.units_per_replica)
        return {model: ceil(share) for model, share in shares.items()}

    def _versions(self, customer_id: CustomerId | None) -> list[UnitTerms]:
        columns = (provision.c[name] for name in UnitTerms.__dataclass_fields__)
        rows = select(*columns).order_by(provision.c.customer_id, provision.c.model, provision.c.version)
        if customer_id is not None:
            rows = rows.where(provision.c.customer_id == customer_id)
        with self._engine.connect() as connection:
            return [UnitTerms(*row) for row in connection.execute(rows)]


def in_force(versions: list[UnitTerms], period: str) -> list[UnitTerms]:
    """The newest version of each customer and model in that month, but for those that ended."""
    newest = {(each.customer_id, each.model): each for each in versions if each.from_period <= period}
    return [each for each in newest.values() if each.units > 0]
