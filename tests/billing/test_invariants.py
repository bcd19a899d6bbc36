"""Each audit finds the damage it is for, on tables that have the rows but none of the rules that prevent it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import Column, Engine, MetaData, Table, text

from billing.commands import (
    AddPrice,
    ChargeUnits,
    CloseStatement,
    Credit,
    KeyTerms,
    Quote,
    Reverse,
    RevokeKey,
    SetCreditLine,
    SetKeyTerms,
    SetMember,
    SetUnits,
    Transfer,
)
from billing.database import open_database, writer
from billing.invariants import AUDITS, MAX_ROWS_PER_AUDIT, Violation, audit
from billing.keys import mint_request_id
from billing.money import Mils
from billing.price_terms import terms_of
from billing.prices import PriceVersion, Rate
from billing.tables import billing_metadata
from tests.billing.conftest import Clock, Desk
from tests.support.databases import Databases


@pytest.fixture(scope="module")
def unruled(databases: Databases) -> Iterator[Engine]:
    """A healthy history copied into tables without any constraint, index or trigger."""
    bare = MetaData()
    for table in billing_metadata.sorted_tables:
        Table(table.name, bare, *(Column(column.name, column.type) for column in table.columns))
    with databases.migrated() as ruled, databases.empty() as url:
        desk = Desk(ruled, Clock())
        ann, bob = desk.account(1000, name="ann"), desk.account(500, name="bob")
        desk.settle(desk.reserved(ann, 49), 12, "engine_failed")
        desk.reserved(ann, 10)
        desk.settle(desk.reserved(ann, 2), 2)
        desk.do(SetKeyTerms(ann.key.key_id, KeyTerms(daily_budget_mils=Mils(500))))
        desk.do(Quote("quo_1", ann.key.key_id, "m", 1, Mils(5), 1, 60.0))
        keyed = replace(desk.reserve(ann, 3), idempotency_key="k", payload_sha256="0" * 64)
        desk.do(keyed)
        desk.settle(keyed.request_id, 0)
        desk.settle(desk.do(replace(keyed, request_id=mint_request_id())).request_id, 3)
        fay = desk.account(1000, name="fay")
        desk.do(SetUnits(fay.customer_id, "m", 1, "2027-01", 2, Mils(100), 60, 4))
        desk.do(ChargeUnits())
        desk.ran(fay, 49, "m", delivered=10)
        desk.ran(fay, 49, "m")
        desk.settle(desk.reserved(bob, 20), 0)
        desk.do(RevokeKey(bob.key.key_id))
        for version, since in ((1, 10.0), (2, 20.0)):
            desk.do(AddPrice("m", "", version, since, terms_of(PriceVersion("m", version, since, (Rate("frame", 1),)))))
        desk.do(Credit(ann.customer_id, Mils(300), "stripe:cs_1", "evt_1", "", ("evt_1",)))
        desk.do(Reverse("stripe:cs_1", Mils(200), "evt_2", ""))
        cat = desk.account(name="cat")
        desk.do(Credit(cat.customer_id, Mils(100), "stripe:cs_2", "evt_3", ""))
        desk.settle(desk.reserved(cat, 20), 20)
        desk.do(Reverse("stripe:cs_2", Mils(100), "evt_4", ""))
        desk.do(Credit(cat.customer_id, Mils(30), "stripe:cs_3", "evt_5", ""))
        dan, eli = desk.account(500, name="dan"), desk.account(name="eli")
        desk.do(SetCreditLine(dan.customer_id, Mils(100)))
        desk.do(SetMember(eli.customer_id, "eli", dan.customer_id, Mils(500), "month"))
        desk.do(Transfer("tra_1", dan.customer_id, eli.customer_id, Mils(200), ""))
        desk.do(CloseStatement(dan.customer_id, "2026-12"))
        desk.settle(desk.reserved(eli, 49), 44)
        desk.settle(desk.reserved(dan, 71), 71)
        desk.do(CloseStatement(dan.customer_id, "2027-01"))
        desk.ledger = desk.new_ledger()
        desk.settle(desk.reserved(ann, 5), 4)
        engine = open_database(url)
        with writer(engine).begin() as connection, ruled.connect() as source:
            bare.create_all(connection)
            for table in bare.sorted_tables:
                rows = [dict(row) for row in source.execute(table.select()).mappings()]
                if rows:
                    connection.execute(table.insert(), rows)
        yield engine
        engine.dispose()


TABLES = tuple(billing_metadata.tables)
ANN = "(SELECT customer_id FROM wallet WHERE name = 'ann')"
BOB = "(SELECT customer_id FROM wallet WHERE name = 'bob')"
COPY = "customer_id, seq + 100, prev_seq, prev_balance, amount, balance_after"

DAMAGE = [
    ("money from nowhere", "conservation", "UPDATE wallet SET balance_mils = balance_mils + 1 WHERE name = 'ann'"),
    ("captured money that nobody paid", "conservation", "UPDATE reservation SET captured = captured + 5"),
    ("a lost reservation", "conservation", "DELETE FROM reservation WHERE state = 'open'"),
    ("an edited amount", "prefix_sum", f"UPDATE entry SET amount = 2000 WHERE customer_id = {ANN} AND seq = 1"),
    ("an edited balance", "prefix_sum", f"UPDATE entry SET balance_after = 9 WHERE customer_id = {ANN} AND seq = 2"),
    ("an edited predecessor", "prefix_sum", f"UPDATE entry SET prev_balance = 9 WHERE customer_id = {ANN} AND seq = 2"),
    ("a missing entry", "prefix_sum", f"DELETE FROM entry WHERE customer_id = {ANN} AND seq = 2"),
    ("a wallet that lags", "wallet_is_its_tail", "UPDATE wallet SET seq = seq - 1 WHERE name = 'ann'"),
    ("a wallet with another balance", "wallet_is_its_tail", "UPDATE wallet SET balance_mils = 1 WHERE name = 'ann'"),
    ("a wallet without entries", "wallet_is_its_tail", f"DELETE FROM entry WHERE customer_id = {BOB}"),
    ("a wallet below zero", "no_negative_balance", "UPDATE wallet SET balance_mils = -1 WHERE name = 'ann'"),
    ("a past below zero", "no_negative_balance", f"UPDATE entry SET balance_after = -1 WHERE customer_id = {ANN}"),
    *(
        (
            f"a doubled {kind}",
            "one_entry_per_id",
            f"INSERT INTO entry SELECT {COPY}, kind, public_id, reserved, ts, detail, epoch FROM entry"
            f" WHERE kind = '{kind}'",
        )
        for kind in ("debit", "refund", "credit")
    ),
    ("a refund without a debit", "refund_follows_debit", "DELETE FROM entry WHERE kind = 'debit'"),
    ("a refund before its debit", "refund_follows_debit", "UPDATE entry SET seq = 0 WHERE kind = 'refund'"),
    ("a refund larger than its debit", "refund_follows_debit", "UPDATE entry SET amount = 246 WHERE kind = 'refund'"),
    (
        "a refund in another wallet",
        "refund_follows_debit",
        f"UPDATE entry SET customer_id = {BOB} WHERE kind = 'refund' AND customer_id = {ANN}",
    ),
    ("a debit without a reservation", "debit_has_reservation", "DELETE FROM reservation"),
    ("a debit of another amount", "debit_has_reservation", "UPDATE reservation SET amount = amount + 5"),
    ("a debit for another customer", "debit_has_reservation", f"UPDATE reservation SET customer_id = {BOB}"),
    ("a reservation that was not debited", "reservation_has_debit", "DELETE FROM entry WHERE kind = 'debit'"),
    ("a reservation that names another entry", "reservation_has_debit", "UPDATE reservation SET debit_seq = 1"),
    ("a settlement that keeps too much", "settled_arithmetic", "UPDATE reservation SET captured = captured + 5"),
    ("a settlement by another price", "settled_arithmetic", "UPDATE reservation SET mils_per_frame = 4"),
    ("a refund that never became a row", "settled_arithmetic", "DELETE FROM entry WHERE kind = 'refund'"),
    ("an open reservation that kept money", "settled_arithmetic", "UPDATE reservation SET state = 'open'"),
    ("a limit without a line", "line_is_the_newest", "UPDATE wallet SET credit_limit_mils = 900 WHERE name = 'dan'"),
    ("a lost line", "line_is_the_newest", "DELETE FROM credit_line"),
    ("spending below the line", "no_negative_balance", "UPDATE credit_line SET floor_mils = -50"),
    (
        "a parent in a team",
        "teams_have_two_levels",
        f"INSERT INTO membership VALUES ((SELECT parent_id FROM membership), {ANN}, NULL, NULL)",
    ),
    ("a transfer of another sum", "transfer_is_two_entries", "UPDATE transfer SET amount = amount + 1"),
    ("a transfer that did not arrive", "transfer_is_two_entries", "DELETE FROM entry WHERE kind = 'transfer_in'"),
    ("an entry of no transfer", "transfer_is_two_entries", "DELETE FROM transfer WHERE transfer_id = 'tra_1'"),
    ("a transfer without a team", "transfer_is_two_entries", "DELETE FROM membership"),
    ("a draw of another sum", "draw_is_a_transfer", "UPDATE draw SET drawn = drawn + 1"),
    (
        "what was drawn and never given back",
        "draw_is_a_transfer",
        "DELETE FROM transfer WHERE transfer_id LIKE '%back'",
    ),
    ("a statement of another sum", "statements_tile", "UPDATE statement SET usage_mils = -1, payments_mils = 301"),
    ("a lost statement", "statements_tile", "DELETE FROM statement WHERE number = 1"),
    ("statements out of order", "statements_tile", "UPDATE statement SET period = '2020-01' WHERE number = 2"),
    ("a lost version of a price", "prices_follow_each_other", "DELETE FROM price WHERE version = 1"),
    ("a price from before", "prices_follow_each_other", "UPDATE price SET effective_from = 30 WHERE version = 1"),
    ("more frames than were reserved", "settled_arithmetic", "UPDATE reservation SET frames_delivered = 99"),
    (
        "a part of a frame",
        "settled_arithmetic",
        "UPDATE reservation SET captured = captured - 1, refunded = refunded + 1",
    ),
    ("spending after revocation", "no_spending_by_revoked_key", "UPDATE api_key SET revoked_seq = 1"),
    ("spending before the key was made", "no_spending_by_revoked_key", "UPDATE api_key SET created_seq = 50"),
    (
        "spending with another customer's key",
        "no_spending_by_revoked_key",
        f"UPDATE api_key SET customer_id = {BOB} WHERE customer_id = {ANN}",
    ),
    ("one key charged twice", "one_request_per_idempotency_key", "UPDATE reservation SET frames_delivered = 1"),
    ("a submission without its request", "submission_is_its_request", "DELETE FROM reservation"),
    ("a submission of another customer", "submission_is_its_request", f"UPDATE submission SET customer_id = {BOB}"),
    ("a paid request's key released", "submission_is_its_request", "UPDATE reservation SET frames_delivered = 1"),
    ("a payment that credited nothing", "payment_is_its_credit", "UPDATE payment SET credit_seq = 0"),
    ("a payment that credited less", "payment_is_its_credit", "UPDATE payment SET granted = granted + 1"),
    ("a payment taken back further", "reversals_add_up", "UPDATE payment SET reversed = reversed + 1"),
    ("a lost reversal", "reversals_add_up", "DELETE FROM reversal WHERE source = 'stripe:cs_2'"),
    ("a reversal that took nothing", "reversal_is_an_entry", "DELETE FROM entry WHERE kind = 'reversal'"),
    ("an entry that reverses nothing", "reversal_is_an_entry", "UPDATE entry SET kind = 'reversal' WHERE seq = 1"),
    ("a debt forgiven", "debt_adds_up", "UPDATE wallet SET debt_mils = 0 WHERE name = 'cat'"),
    ("a repayment that moved no money", "debt_adds_up", "DELETE FROM entry WHERE kind = 'repayment'"),
    ("money to spend beside a debt", "debt_adds_up", "UPDATE wallet SET balance_mils = 5 WHERE name = 'cat'"),
    ("units that nobody paid", "units_are_charged_once", "DELETE FROM entry WHERE kind = 'fee'"),
    ("a fee for no units", "units_are_charged_once", "DELETE FROM unit_charge"),
    ("units at other terms", "units_are_charged_once", "UPDATE provision SET version = 2"),
    ("a use that is forgotten", "units_cover_what_they_allot", "DELETE FROM unit_use WHERE seq = 1"),
    ("more used than there is", "units_cover_what_they_allot", "UPDATE unit_charge SET frames = 1"),
    ("frames that no units cover", "units_cover_what_they_allot", "UPDATE reservation SET covered = 1"),
    ("time that runs back", "history_runs_forward", f"UPDATE entry SET ts = 0 WHERE customer_id = {ANN} AND seq = 3"),
    (
        "a stale writer's entry",
        "history_runs_forward",
        "UPDATE entry SET epoch = 0 WHERE seq = (SELECT MAX(seq) FROM entry)",
    ),
    ("an entry from the future", "history_runs_forward", "UPDATE writer_fence SET epoch = 1"),
]


def test_a_healthy_history_has_no_violation(unruled: Engine):
    assert audit(unruled) == []


@pytest.mark.parametrize(("name", "finder", "damage"), DAMAGE, ids=[name for name, _, _ in DAMAGE])
def test_an_audit_finds(unruled: Engine, name: str, finder: str, damage: str):
    with unruled.connect() as connection:
        kept = {table: connection.execute(text(f"SELECT * FROM {table}")).mappings().all() for table in TABLES}
    try:
        with writer(unruled).begin() as connection:
            assert connection.execute(text(damage)).rowcount > 0
        violations = audit(unruled)
        assert finder in {violation.audit for violation in violations}
        assert all(violation.row for violation in violations)
    finally:
        with writer(unruled).begin() as connection:
            for table, rows in kept.items():
                connection.execute(text(f"DELETE FROM {table}"))
                if rows:
                    connection.execute(billing_metadata.tables[table].insert(), [dict(row) for row in rows])


def test_every_audit_is_shown_to_find_something():
    assert {finder for _, finder, _ in DAMAGE} == {each.name for each in AUDITS}


def test_audits_have_one_name_each_and_say_what_they_claim():
    assert len({each.name for each in AUDITS}) == len(AUDITS)
    assert all(each.claim.endswith(".") for each in AUDITS)


def test_an_empty_ledger_is_healthy(engine: Engine):
    assert audit(engine) == []


def test_an_entry_that_its_wallet_does_not_know_is_found_and_stops_only_that_wallet(engine: Engine, clock: Clock):
    """The one wrong write that the schema accepts: it cannot see a row that nothing points at."""
    desk = Desk(engine, clock)
    ann, bob = desk.account(1000), desk.account(1000)
    with writer(engine).begin() as connection:
        connection.execute(
            text(
                "INSERT INTO entry VALUES (:ann, 2, 1, 1000, 7, 1007, 'credit', 'adm_stray', NULL, 2000000000, '', 1)"
            ),
            {"ann": ann.customer_id},
        )
    assert {violation.audit for violation in audit(engine)} == {"conservation", "wallet_is_its_tail"}
    refused, served = desk.ledger.apply([desk.reserve(ann), desk.reserve(bob)])
    assert type(refused).__name__ == "Rejected"
    assert type(served).__name__ == "Reserved"
    assert desk.balance(ann) == 1000


def test_a_ledger_broken_everywhere_reports_a_bounded_number_of_rows(engine: Engine, clock: Clock):
    desk = Desk(engine, clock)
    accounts = [desk.account(10) for _ in range(MAX_ROWS_PER_AUDIT + 5)]
    with writer(engine).begin() as connection:
        for account in accounts:
            connection.execute(
                text("INSERT INTO entry VALUES (:of, 2, 1, 10, 7, 17, 'credit', :id, NULL, 2000000000, '', 1)"),
                {"of": account.customer_id, "id": f"adm_{account.customer_id}"},
            )
    violations = audit(engine)
    assert [violation.audit for violation in violations].count("wallet_is_its_tail") == MAX_ROWS_PER_AUDIT
    assert isinstance(violations[0], Violation)
