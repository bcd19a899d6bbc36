"""How an attack on the schema is written: one transaction that is right in all but what it is aimed at."""

from collections.abc import Sequence
from typing import NamedTuple


class Attack(NamedTuple):
    name: str
    by: str
    statements: Sequence[str]
    only: str = ""
    """On this kind of database only: the other has no such statement, or rounds where this one refuses."""


def entry(
    kind: str,
    amount: object,
    *,
    customer: str = ":ann",
    seq: object = ":next",
    prev_seq: object = ":tail",
    prev_balance: object = ":balance",
    balance_after: object = None,
    public_id: str = "'new'",
    reserved: object = "NULL",
    epoch: object = ":epoch",
) -> str:
    """An entry at the end of Ann's chain, right in all that is not said."""
    if balance_after is None:
        balance_after = f"{prev_balance} + ({amount})"
    return (
        "INSERT INTO entry (customer_id, seq, prev_seq, prev_balance, amount, balance_after, kind, public_id, reserved,"
        f" ts, detail, epoch) VALUES ({customer}, {seq}, {prev_seq}, {prev_balance}, {amount}, {balance_after},"
        f" '{kind}', {public_id}, {reserved}, 2000000000, '', {epoch})"
    )


def reservation(
    request_id: str = "'new'",
    *,
    customer: str = ":ann",
    key: str = ":ann_key",
    frames: object = 10,
    rate: object = 5,
    amount: object = 50,
    captured: object = 0,
    refunded: object = 0,
    state: str = "open",
    settled: object = "NULL",
    debit_seq: object = ":next",
    model: str = "''",
    covered: object = "NULL",
) -> str:
    return (
        "INSERT INTO reservation (request_id, customer_id, key_id, frames, mils_per_frame, amount, captured, refunded,"
        " state, lease_until, reason, created_at, debit_seq, settled_at, settled_seq, frames_delivered, model, covered)"
        f" VALUES ({request_id},"
        f" {customer}, {key}, {frames}, {rate}, {amount}, {captured}, {refunded}, '{state}', 2000000000, '', 1,"
        f" {debit_seq}, {settled}, {settled}, {'NULL' if state == 'open' else f'({captured}) / ({rate})'},"
        f" {model}, {covered})"
    )


def wallet(change: str) -> str:
    return f"UPDATE wallet SET seq = seq + 1, balance_mils = balance_mils + ({change}) WHERE customer_id = :ann"


def settle(request: str, captured: int, refunded: int) -> str:
    return (
        f"UPDATE reservation SET state = 'settled', captured = {captured}, refunded = {refunded}, settled_at = 1,"
        f" settled_seq = 1, frames_delivered = ({captured}) / 5 WHERE request_id = {request}"
    )


def submission(request: str = "'held'", *, key: str = "''", payload: str = "0" * 64, amount: object = 50) -> str:
    return f"INSERT INTO submission VALUES ({request}, :ann, {amount}, {key}, '{payload}', 1, NULL)"
