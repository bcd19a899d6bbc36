"""The JSON bodies of what a customer reads about its use. Money in mils; USD is for display."""

from typing import Literal

from pydantic import BaseModel, Field

from billing.request_log import RequestState
from billing.usage import Dimension


class LoggedRequest(BaseModel):
    id: str
    object: Literal["request"] = "request"
    model: str
    key_id: str
    key_last4: str
    key_label: str
    state: RequestState = Field(description="Of its money: held, kept, kept in part, given back")
    frames: int = Field(description="That were asked for")
    frames_delivered: int | None = Field(description="Null while it is open")
    frames_covered: int = Field(description="That provisioned units pay for, the first to be delivered")
    reserved_mils: int
    refunded_mils: int
    cost_mils: int
    cost_usd: float
    reason: str = Field(description="Why something was refunded")
    created: float
    settled: float | None
    detail: str


class LoggedRequests(BaseModel):
    object: Literal["list"] = "list"
    data: list[LoggedRequest]
    next_cursor: str | None = Field(description="Send as `after` for older ones; null at the end")
    previous_cursor: str | None = Field(description="Send as `before` for newer ones; null at the newest")


class UsageLine(BaseModel):
    day: str | None = Field(description="UTC; null when days are counted together")
    model: str | None
    key_id: str | None
    requests: int
    frames: int = Field(description="That were asked for")
    frames_delivered: int
    reserved_mils: int
    refunded_mils: int
    cost_mils: int
    cost_usd: float


class Usage(BaseModel):
    customer_id: str
    since: float
    until: float
    group_by: list[Dimension]
    data: list[UsageLine]
    requests: int
    frames: int
    frames_delivered: int
    cost_mils: int
    cost_usd: float


class MonthStatement(BaseModel):
    month: str
    period_start: float
    period_end: float
    closed: bool = Field(description="Whether the month is over")
    from_seq: int = Field(description="Of the last entry before it; the statement before ends with this one")
    to_seq: int = Field(description="Of its last entry")
    entries: int
    opening_balance_mils: int
    credits_mils: int
    debits_mils: int = Field(description="For work and provisioned units; negative")
    refunds_mils: int
    reversals_mils: int = Field(description="Payments taken back, debts repaid; negative")
    transfers_mils: int = Field(description="Within the team")
    closing_balance_mils: int
    opening_balance_usd: float
    spent_usd: float = Field(description="Debits less refunds")
    closing_balance_usd: float


class MonthStatements(BaseModel):
    customer_id: str
    data: list[MonthStatement]
    next_cursor: str | None = Field(description="Send as `before` for earlier months; null at the first")


class ModelUnits(BaseModel):
    model: str
    month: str
    units: int
    unit_mils: int = Field(description="Of one, a month")
    unit_frames: int = Field(description="That one pays for, a month")
    charged: float | None = Field(description="When this month was; null while it waits for credit")
    frames: int = Field(description="That this month's units pay for; 0 while it is not charged")
    frames_used: int
    frames_left: int


class ProvisionedUnits(BaseModel):
    customer_id: str
    data: list[ModelUnits]


class BudgetEvent(BaseModel):
    id: str
    object: Literal["event"] = "event"
    type: Literal["budget.warning"] = "budget.warning"
    ts: float
    key_id: str
    period: Literal["day", "month"]
    period_start: float
    level_percent: int
    limit_mils: int
    spent_mils: int
    message: str


class BudgetEvents(BaseModel):
    customer_id: str
    data: list[BudgetEvent]
    next_cursor: str | None = Field(description="Send as `after` for older ones; null at the end")
