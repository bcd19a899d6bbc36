"""Raw SQL against the migrated schema: what the database itself refuses, whoever asks and whatever the code forgets.

Each attack is one transaction that keeps every rule but the one it is aimed at. `by` names the rule: a constraint, an
index or a trigger. SQLite names neither foreign keys nor unique indexes in its errors, PostgreSQL names all.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DataError, IntegrityError

from billing.commands import (
    AddPrice,
    ChargeUnits,
    CloseStatement,
    Credit,
    KeyTerms,
    Quote,
    Rejected,
    RequestId,
    Reserved,
    Reverse,
    RevokeKey,
    SetCreditLine,
    SetKeyTerms,
    SetMember,
    SetUnits,
    Transfer,
)
from billing.database import writer
from billing.invariants import audit
from billing.job_tables import billing_metadata
from billing.keys import initial_grant_id
from billing.money import Mils
from billing.price_terms import terms_of
from billing.prices import PriceVersion, Rate
from billing.triggers import POSTGRESQL, SQLITE
from tests.billing.attacks import Attack, entry, reservation, settle, submission, wallet
from tests.billing.attacks_on_accounts import ACCOUNT_ATTACKS
from tests.billing.attacks_on_jobs import JOB_ATTACKS
from tests.billing.attacks_on_payments import PAYMENT_ATTACKS
from tests.billing.attacks_on_units import UNIT_ATTACKS
from tests.billing.conftest import Clock, Desk
from tests.support.databases import Databases

TERMS = (
    "INSERT INTO key_terms (key_id, budget_id, label, models, scope, daily_budget_mils, monthly_budget_mils)"
    " VALUES ({key}, {budget}, '', '', {more}, 5)"
)
PRICE = "INSERT INTO price VALUES ('m', '', {version}, {previous}, {since}, '', 1)"
FENCED = "tr_entry_epoch"
REFUND = "tr_entry_refund"

# Ann: credit 1000; `part`, 49 frames at 5 mils, 12 delivered; `held`, 10 frames, open; `kept`, 2 frames, delivered.
# Bob: credit 500; `bobs`, 10 frames, open. Cat: see `attacks_on_payments`.
ATTACKS = [
    # The chain.
    Attack("a sum that is wrong", "ck_entry_sum", [entry("credit", 10, balance_after=":balance + 11"), wallet("11")]),
    Attack(
        "a lie about the balance before",
        "fk_entry_previous",
        [entry("credit", 10, prev_balance="(:balance + 100)"), wallet("110")],
    ),
    Attack("a gap", "ck_entry_chain", [entry("credit", 10, seq=":next + 1")]),
    Attack(
        "a gap with a predecessor that is none",
        "fk_entry_previous",
        [
            entry("credit", 10, seq=":next + 1", prev_seq=":next"),
        ],
    ),
    Attack(
        "a second writer at the same place",
        "pk_entry",
        [
            entry("credit", 10, seq=":tail", prev_seq=":tail - 1", prev_balance=":balance_before_tail"),
        ],
    ),
    Attack("a chain that starts anew", "ck_entry_chain", [entry("credit", 10, prev_seq="NULL", prev_balance=0)]),
    Attack("a second opening", "pk_entry", [entry("opening", 0, seq=0, prev_seq="NULL", prev_balance=0)]),
    Attack(
        "an opening with money",
        "ck_entry_kind",
        [
            "INSERT INTO wallet (customer_id, name, seq, balance_mils, created_at) VALUES ('cus_eve', 'eve', 0, 99, 1)",
            entry("opening", 99, customer="'cus_eve'", seq=0, prev_seq="NULL", prev_balance=0),
        ],
    ),
    Attack(
        "an opening with a past",
        "ck_entry_chain",
        [
            "INSERT INTO wallet (customer_id, name, seq, balance_mils, created_at) VALUES ('cus_eve', 'eve', 0, 99, 1)",
            entry("opening", 0, customer="'cus_eve'", seq=0, prev_seq="NULL", prev_balance=99),
        ],
    ),
    Attack(
        "an entry in nobody's wallet",
        "fk_entry_wallet",
        [
            entry("opening", 0, customer="'cus_nobody'", seq=0, prev_seq="NULL", prev_balance=0),
        ],
    ),
    # The wallet.
    Attack(
        "money from nowhere",
        "fk_wallet_tail",
        [
            "UPDATE wallet SET balance_mils = balance_mils + 1 WHERE customer_id = :ann",
        ],
    ),
    Attack("a wallet ahead of its entries", "fk_wallet_tail", [wallet("0")]),
    Attack(
        "a wallet that points at an older entry",
        "tr_wallet_update",
        [
            "UPDATE wallet SET seq = 1, balance_mils = 1000 WHERE customer_id = :ann",
        ],
    ),
    Attack(
        "a wallet that changes hands",
        "tr_wallet_update",
        [
            "UPDATE wallet SET customer_id = 'cus_eve' WHERE customer_id = :ann",
        ],
    ),
    Attack(
        "a wallet without an opening",
        "fk_wallet_tail",
        [
            "INSERT INTO wallet (customer_id, name, seq, balance_mils, created_at) VALUES ('cus_eve', 'eve', 0, 0, 1)",
        ],
    ),
    Attack(
        "a wallet below zero",
        "ck_wallet_balance",
        [
            "UPDATE wallet SET balance_mils = -1 WHERE customer_id = :ann",
        ],
    ),
    Attack(
        "two customers of one name",
        "uq_wallet_name",
        [
            "INSERT INTO wallet (customer_id, name, seq, balance_mils, created_at) VALUES ('cus_eve', 'ann', 0, 0, 1)",
            entry("opening", 0, customer="'cus_eve'", seq=0, prev_seq="NULL", prev_balance=0),
        ],
    ),
    Attack(
        "two wallets of one id",
        "pk_wallet",
        ["INSERT INTO wallet (customer_id, name, seq, balance_mils, created_at) VALUES (:ann, 'eve', 0, 0, 1)"],
    ),
    Attack("deleting a wallet", "fk_entry_wallet|fk_api_key_wallet", ["DELETE FROM wallet WHERE customer_id = :ann"]),
    # Debits.
    Attack(
        "spending more than there is",
        "tr_entry_floor",
        [
            reservation(frames=1000, amount=5000),
            entry("debit", -5000, reserved=5000),
        ],
    ),
    Attack(
        "a second debit for a request",
        "uq_entry_debit",
        [
            entry("debit", -50, public_id="'held'", reserved=50),
            wallet("-50"),
        ],
    ),
    Attack("a debit without a reservation", "fk_entry_reservation", [entry("debit", -50, reserved=50), wallet("-50")]),
    Attack(
        "a debit that names no reserved amount",
        "ck_entry_kind",
        [
            reservation(),
            entry("debit", -50),
            wallet("-50"),
        ],
    ),
    Attack(
        "a debit larger than its reservation",
        "ck_entry_kind",
        [
            reservation(),
            entry("debit", -51, reserved=50),
            wallet("-51"),
        ],
    ),
    Attack(
        "a debit smaller than its reservation",
        "ck_entry_kind",
        [
            reservation(),
            entry("debit", -49, reserved=50),
            wallet("-49"),
        ],
    ),
    Attack(
        "a debit that lies about its reservation",
        "fk_entry_reservation",
        [
            reservation(),
            entry("debit", -40, reserved=40),
            wallet("-40"),
        ],
    ),
    Attack(
        "a debit for another customer's request",
        "fk_entry_reservation",
        [
            reservation(customer=":bob", key=":bob_key"),
            entry("debit", -50, reserved=50),
            wallet("-50"),
        ],
    ),
    # Refunds.
    Attack(
        "a second refund",
        "uq_entry_refund",
        [
            entry("refund", 185, public_id="'part'", reserved=245),
            wallet("185"),
        ],
    ),
    Attack(
        "a refund larger than the debit",
        f"{REFUND}|ck_entry_kind",
        [
            settle("'held'", 0, 50),
            entry("refund", 51, public_id="'held'", reserved=50),
            wallet("51"),
        ],
    ),
    Attack(
        "a refund while the work is open",
        REFUND,
        [
            entry("refund", 50, public_id="'held'", reserved=50),
            wallet("50"),
        ],
    ),
    Attack(
        "a refund of more than the settlement gives back",
        REFUND,
        [
            settle("'held'", 25, 25),
            entry("refund", 50, public_id="'held'", reserved=50),
            wallet("50"),
        ],
    ),
    Attack(
        "a refund of work that was delivered",
        REFUND,
        [
            entry("refund", 10, public_id="'kept'", reserved=10),
            wallet("10"),
        ],
    ),
    Attack(
        "a refund that claims a larger reservation",
        "fk_entry_reservation",
        [
            settle("'held'", 0, 50),
            entry("refund", 50, public_id="'held'", reserved=500),
            wallet("50"),
        ],
    ),
    Attack(
        "a refund of another customer's work",
        f"{REFUND}|fk_entry_reservation",
        [
            settle("'bobs'", 0, 50),
            entry("refund", 50, public_id="'bobs'", reserved=50),
            wallet("50"),
        ],
    ),
    Attack(
        "a refund without a debit",
        REFUND,
        [
            reservation(refunded=50, state="settled", settled=1),
            entry("refund", 50, reserved=50),
            wallet("50"),
        ],
    ),
    Attack(
        "a refund of nothing at all", f"{REFUND}|fk_entry_reservation", [entry("refund", 50, reserved=50), wallet("50")]
    ),
    # Kinds and amounts.
    Attack("one payment credited twice", "uq_entry_credit", [entry("credit", 10, public_id=":credit"), wallet("10")]),
    Attack(
        "a payment credited to two customers",
        "uq_entry_credit",
        [
            entry("credit", 10, public_id=":bob_credit"),
            wallet("10"),
        ],
    ),
    Attack("a debit that gives", "ck_entry_kind", [reservation(), entry("debit", 50, reserved=50), wallet("50")]),
    Attack("a credit that takes", "ck_entry_kind", [entry("credit", -10), wallet("-10")]),
    Attack(
        "a credit that belongs to a request",
        "ck_entry_kind",
        [
            entry("credit", 50, public_id="'held'", reserved=50),
            wallet("50"),
        ],
    ),
    Attack("an entry that moves nothing", "ck_entry_kind", [entry("credit", 0), wallet("0")]),
    Attack("a kind that does not exist", "ck_entry_kind", [entry("bonus", 10), wallet("10")]),
    Attack("half a mil", "REAL value in INTEGER column", [entry("credit", "0.5"), wallet("0.5")], only="sqlite"),
    Attack(
        "words for money",
        "TEXT value in INTEGER column|invalid input syntax",
        [
            entry("credit", "'ten'", balance_after=":balance"),
        ],
    ),
    Attack(
        "more than 64 bits",
        "REAL value in INTEGER column|out of range",
        [
            entry("credit", "9223372036854775807"),
            wallet("9223372036854775807"),
        ],
    ),
    # Reservations.
    Attack(
        "keeping more than was reserved", "ck_reservation_state|ck_reservation_delivered", [settle("'held'", 55, 0)]
    ),
    Attack("keeping and giving back the same money", "ck_reservation_state", [settle("'held'", 50, 50)]),
    Attack("keeping less than nothing", "ck_reservation_state|ck_reservation_delivered", [settle("'held'", -5, 55)]),
    Attack("settling with nothing", "ck_reservation_state", [settle("'held'", 0, 0)]),
    Attack(
        "keeping while open",
        "ck_reservation_state",
        [
            "UPDATE reservation SET captured = 50 WHERE request_id = 'held'",
        ],
    ),
    Attack(
        "a state that does not exist",
        "ck_reservation_state",
        [
            "UPDATE reservation SET state = 'lost' WHERE request_id = 'held'",
        ],
    ),
    Attack(
        "a settlement without its place in history",
        "ck_reservation_state",
        [
            "UPDATE reservation SET state = 'settled', captured = 50 WHERE request_id = 'held'",
        ],
    ),
    Attack("keeping a part of a frame", "ck_reservation_delivered", [settle("'held'", 12, 38)]),
    Attack("settling again", "tr_reservation_update", [settle("'part'", 245, 0)]),
    Attack(
        "opening again",
        "tr_reservation_update",
        [
            "UPDATE reservation SET state = 'open', captured = 0, refunded = 0, settled_at = NULL, settled_seq = NULL"
            " WHERE request_id = 'kept'",
        ],
    ),
    Attack(
        "another price afterwards",
        "tr_reservation_update",
        [
            "UPDATE reservation SET mils_per_frame = 4, amount = 40 WHERE request_id = 'held'",
        ],
    ),
    Attack(
        "another key afterwards",
        "tr_reservation_update",
        [
            "UPDATE reservation SET key_id = :bob_key, customer_id = :bob WHERE request_id = 'held'",
        ],
    ),
    Attack(
        "a price that does not add up",
        "ck_reservation_amount",
        [
            reservation(amount=45),
            entry("debit", -45, reserved=45),
            wallet("-45"),
        ],
    ),
    Attack("work for nothing", "ck_reservation_price", [reservation(rate=0, amount=0)]),
    Attack("no frames", "ck_reservation_price", [reservation(frames=0, amount=0)]),
    Attack(
        "spending with another customer's key",
        "fk_reservation_key",
        [
            reservation(key=":bob_key"),
            entry("debit", -50, reserved=50),
            wallet("-50"),
        ],
    ),
    Attack("the same request twice", "pk_reservation", [reservation("'held'")]),
    Attack("deleting a reservation", "tr_reservation_delete", ["DELETE FROM reservation WHERE request_id = 'held'"]),
    # What requests are recognised by. `part` and `gone` were sent with keys; `gone` was refunded.
    Attack(
        "one key, two requests",
        "uq_submission_key",
        [
            reservation(),
            entry("debit", -50, reserved=50),
            wallet("-50"),
            submission("'new'", key="'key of part'"),
        ],
    ),
    Attack("one request submitted twice", "pk_submission", [submission("'part'", amount=245)]),
    Attack("a submission without a request", "fk_submission_reservation", [submission("'new'")]),
    Attack("a submission of another customer's request", "fk_submission_reservation", [submission("'bobs'")]),
    Attack("a payload instead of its hash", "ck_submission_payload", [submission(payload="the actions")]),
    Attack("a key without end", "ck_submission_key", [submission(key=f"'{'x' * 257}'")]),
    Attack(
        "taking the key from work that was paid",
        "tr_submission_update",
        ["UPDATE submission SET released_at = 1 WHERE request_id = 'part'"],
    ),
    Attack(
        "another payload for a key",
        "tr_submission_update",
        [f"UPDATE submission SET payload_sha256 = '{'1' * 64}', released_at = 1 WHERE request_id = 'gone'"],
    ),
    Attack(
        "taking a released key back",
        "tr_submission_update",
        [
            "UPDATE submission SET released_at = 1 WHERE request_id = 'gone'",
            "UPDATE submission SET released_at = NULL WHERE request_id = 'gone'",
        ],
    ),
    Attack(
        "forgetting a request that is open",
        "tr_submission_delete",
        [submission(), "DELETE FROM submission WHERE request_id = 'held'"],
    ),
    # History.
    Attack(
        "deleting the last entry",
        "tr_entry_delete",
        [
            "DELETE FROM entry WHERE customer_id = :ann AND seq = :tail",
        ],
    ),
    Attack("deleting an entry inside", "tr_entry_delete", ["DELETE FROM entry WHERE customer_id = :ann AND seq = 2"]),
    Attack("deleting everything", "tr_entry_delete", ["DELETE FROM entry"]),
    Attack("emptying the table", "tr_entry_truncate", ["TRUNCATE entry CASCADE"], only="postgresql"),
    Attack(
        "replacing a row",
        "tr_entry_delete",
        [
            entry("credit", 2000, seq=1, prev_seq=0, prev_balance=0, public_id=":credit").replace(
                "INSERT", "INSERT OR REPLACE"
            ),
        ],
        only="sqlite",
    ),
    Attack(
        "editing an amount",
        "tr_entry_update",
        [
            "UPDATE entry SET amount = 2000, balance_after = 2000 WHERE customer_id = :ann AND seq = 1",
        ],
    ),
    Attack(
        "editing the last amount and the wallet with it",
        "tr_entry_update",
        [
            "UPDATE entry SET amount = -5, balance_after = balance_after + 5 WHERE customer_id = :ann AND seq = :tail",
            "UPDATE wallet SET balance_mils = balance_mils + 5 WHERE customer_id = :ann",
        ],
    ),
    Attack(
        "editing what the customer reads",
        "tr_entry_update",
        [
            "UPDATE entry SET detail = 'gift' WHERE customer_id = :ann AND seq = 2",
        ],
    ),
    Attack("editing an id", "tr_entry_update", ["UPDATE entry SET public_id = 'x' WHERE customer_id = :ann"]),
    Attack("editing a time", "tr_entry_update", ["UPDATE entry SET ts = ts + 1 WHERE customer_id = :ann"]),
    # Keys.
    Attack(
        "one token, two keys",
        "uq_api_key_sha256",
        [
            "INSERT INTO api_key SELECT 'key_new', sha256, last4, customer_id, refill_per_s, burst, created_at,"
            " created_seq, NULL, NULL FROM api_key WHERE key_id = :ann_key",
        ],
    ),
    Attack(
        "a key of nobody",
        "fk_api_key_wallet",
        [
            "INSERT INTO api_key SELECT 'key_new', replace(sha256, substr(sha256, 1, 8), 'aaaaaaaa'), last4,"
            " 'cus_nobody', refill_per_s, burst, created_at, created_seq, NULL, NULL FROM api_key"
            " WHERE key_id = :ann_key",
        ],
    ),
    Attack(
        "a key from the future",
        "fk_api_key_created",
        [
            "INSERT INTO api_key SELECT 'key_new', replace(sha256, substr(sha256, 1, 8), 'aaaaaaaa'), last4,"
            " customer_id, refill_per_s, burst, created_at, 99, NULL, NULL FROM api_key WHERE key_id = :ann_key",
        ],
    ),
    Attack(
        "a token instead of its hash",
        "ck_api_key_sha256|tr_api_key_update",
        [
            "INSERT INTO api_key SELECT 'key_new', 'dre_secret', last4, customer_id, refill_per_s, burst, created_at,"
            " created_seq, NULL, NULL FROM api_key WHERE key_id = :ann_key",
        ],
    ),
    Attack(
        "more than four of a token's symbols",
        "ck_api_key_last4",
        [
            "UPDATE api_key SET last4 = 'dre_secret' WHERE key_id = :ann_key",
        ],
    ),
    Attack(
        "a bucket that never refills",
        "ck_api_key_limits",
        [
            "UPDATE api_key SET refill_per_s = 0 WHERE key_id = :ann_key",
        ],
    ),
    Attack(
        "a revocation without its place in history",
        "ck_api_key_revoked",
        [
            "UPDATE api_key SET revoked_at = 1 WHERE key_id = :ann_key",
        ],
    ),
    Attack(
        "a revocation in the future",
        "fk_api_key_revoked",
        [
            "UPDATE api_key SET revoked_at = 1, revoked_seq = 99 WHERE key_id = :ann_key",
        ],
    ),
    Attack(
        "bringing a revoked key back",
        "tr_api_key_update",
        [
            "UPDATE api_key SET revoked_at = NULL, revoked_seq = NULL WHERE key_id = :revoked_key",
        ],
    ),
    Attack(
        "another secret for a key",
        "tr_api_key_update",
        [
            "UPDATE api_key SET sha256 = replace(sha256, substr(sha256, 1, 8), 'aaaaaaaa') WHERE key_id = :ann_key",
        ],
    ),
    Attack(
        "a key that changes hands",
        "tr_api_key_update",
        [
            "UPDATE api_key SET customer_id = :bob WHERE key_id = :revoked_key OR key_id = :ann_key",
        ],
    ),
    Attack(
        "two keys of one id",
        "pk_api_key|uq_api_key_customer",
        [
            "INSERT INTO api_key SELECT key_id, replace(sha256, substr(sha256, 1, 8), 'aaaaaaaa'), last4, customer_id,"
            " refill_per_s, burst, created_at, created_seq, NULL, NULL FROM api_key WHERE key_id = :ann_key",
        ],
    ),
    Attack("deleting a key", "tr_api_key_delete", ["DELETE FROM api_key WHERE key_id = :revoked_key"]),
    # What keys may do. Ann's key has a budget, of which `kept` used some.
    Attack("two sets of terms", "pk_key_terms", [TERMS.format(key=":ann_key", budget=":ann_key", more="'spend', 5")]),
    Attack("terms of no key", "fk_key_terms_key", [TERMS.format(key="'key_x'", budget=":ann_key", more="'spend', 5")]),
    Attack(
        "a budget of no key",
        "fk_key_terms_budget",
        [TERMS.format(key=":bob_key", budget="'key_x'", more="'spend', 5")],
    ),
    Attack(
        "a scope that does not exist",
        "ck_key_terms_scope",
        [TERMS.format(key=":bob_key", budget=":bob_key", more="'admin', 5")],
    ),
    Attack(
        "a budget below nothing",
        "ck_key_terms_budgets",
        [TERMS.format(key=":bob_key", budget=":bob_key", more="'spend', -1")],
    ),
    Attack(
        "a budget that starts anew",
        "tr_key_terms_update",
        ["UPDATE key_terms SET budget_id = :bob_key WHERE key_id = :ann_key"],
    ),
    Attack("one request counted twice", "pk_budget_use", ["INSERT INTO budget_use VALUES ('kept', :ann_key, 1)"]),
    Attack("counting no request", "fk_budget_use_reservation", ["INSERT INTO budget_use VALUES ('x', :ann_key, 1)"]),
    Attack("counting for no key", "fk_budget_use_budget", ["INSERT INTO budget_use VALUES ('bobs', 'key_x', 1)"]),
    Attack("spending on another day", "tr_budget_use_update", ["UPDATE budget_use SET day = day - 1"]),
    Attack("spending that is forgotten", "tr_budget_use_delete", ["DELETE FROM budget_use"]),
    # Quotes. Bob has one.
    Attack(
        "a warning at another level",
        "ck_budget_event_level",
        ["INSERT INTO budget_event VALUES ('evt_1', :bob, :bob_key, 'day', 1, 80, 100, 80, 1)"],
    ),
    Attack(
        "a warning before its time",
        "ck_budget_event_level",
        ["INSERT INTO budget_event VALUES ('evt_1', :bob, :bob_key, 'day', 1, 75, 100, 74, 1)"],
    ),
    Attack(
        "a warning of another's key",
        "fk_budget_event_key",
        ["INSERT INTO budget_event VALUES ('evt_1', :ann, :bob_key, 'day', 1, 75, 100, 75, 1)"],
    ),
    Attack("the same warning twice", "pk_budget_event", ["INSERT INTO budget_event SELECT * FROM budget_event"]),
    Attack("a warning of another sum", "tr_budget_event_update", ["UPDATE budget_event SET spent_mils = 12"]),
    Attack("a warning that was never given", "tr_budget_event_delete", ["DELETE FROM budget_event"]),
    Attack("another model than the one that ran", "tr_reservation_update", ["UPDATE reservation SET model = 'x'"]),
    Attack("two quotes of one id", "pk_quote", ["INSERT INTO quote VALUES ('quo_1', :bob, 'm', 1, 5, 1, 0, 1, 2, 1)"]),
    Attack(
        "a quote for nothing", "ck_quote_price", ["INSERT INTO quote VALUES ('quo_2', :bob, 'm', 1, 0, 1, 0, 1, 2, 1)"]
    ),
    Attack(
        "a quote that never held",
        "ck_quote_expiry",
        ["INSERT INTO quote VALUES ('quo_2', :bob, 'm', 1, 5, 1, 0, 2, 2, 1)"],
    ),
    Attack(
        "a quote for nobody",
        "fk_quote_wallet",
        ["INSERT INTO quote VALUES ('quo_2', 'cus_x', 'm', 1, 5, 1, 0, 1, 2, 1)"],
    ),
    Attack("another price than was quoted", "tr_quote_update", ["UPDATE quote SET mils_per_frame = 1"]),
    Attack("a quote that was never given", "tr_quote_delete", ["DELETE FROM quote"]),
    # Prices. There are two versions of m.
    Attack("two versions of one number", "pk_price", [PRICE.format(version=1, previous="NULL, NULL", since=9)]),
    Attack("a version that does not follow", "ck_price_chain", [PRICE.format(version=4, previous="2, 20", since=40)]),
    Attack("a version from before", "ck_price_chain", [PRICE.format(version=3, previous="2, 20", since=20)]),
    Attack("a version after none", "fk_price_previous", [PRICE.format(version=4, previous="3, 30", since=40)]),
    Attack("another price for a version", "tr_price_update", ["UPDATE price SET terms = '{}'"]),
    Attack("a price that never was", "tr_price_delete", ["DELETE FROM price"]),
    # The fence.
    Attack("writing after somebody took over", FENCED, [entry("credit", 10, epoch=":epoch - 1"), wallet("10")]),
    Attack("writing for an epoch that nobody holds", FENCED, [entry("credit", 10, epoch=":epoch + 1"), wallet("10")]),
    Attack("turning the epoch back", "tr_writer_fence_update", ["UPDATE writer_fence SET epoch = epoch - 1"]),
    Attack("taking over without a new epoch", "tr_writer_fence_update", ["UPDATE writer_fence SET taken_at = 5"]),
    Attack("a second fence", "ck_writer_fence_single", ["INSERT INTO writer_fence VALUES (2, 99, 1)"]),
    Attack("an epoch before the first", "ck_writer_fence_epoch", ["INSERT INTO writer_fence VALUES (1, -1, 1)"]),
    Attack("a fence in the fence's place", "pk_writer_fence", ["INSERT INTO writer_fence VALUES (1, 99, 1)"]),
    Attack("no fence", "tr_writer_fence_delete", ["DELETE FROM writer_fence"]),
    *PAYMENT_ATTACKS,
    *ACCOUNT_ATTACKS,
    *JOB_ATTACKS,
    *UNIT_ATTACKS,
]


IMPLIED = {
    "uq_api_key_customer",
    "uq_entry_balance",
    "uq_reservation_amount",
    "uq_payment_customer",
    "uq_reversal_to",
    "uq_debt_after",
    "uq_price_effective",
    "uq_statement_end",
    "uq_provision_period",
    "uq_provision_terms",
    "uq_unit_charge_frames",
    "uq_unit_use_after",
    "ck_wallet_floor",
}
"""Unique because a primary key inside them is: foreign keys point at them. A floor is refused by its line first."""


class History(NamedTuple):
    engine: Engine
    names: dict[str, Any]


@pytest.fixture(scope="module")
def history(databases: Databases) -> Iterator[History]:
    """One history for all attacks: since each is refused, none of them spoils it for the next."""
    with databases.migrated() as engine:
        desk = Desk(engine, Clock())
        ann, bob = desk.account(1000, name="ann"), desk.account(500, name="bob")
        revoked = desk.account(0, name="ann")
        desk.ledger.apply([RevokeKey(revoked.key.key_id)])
        for account, request_id, frames in ((ann, "part", 49), (ann, "kept", 2), (ann, "held", 10), (bob, "bobs", 10)):
            command = desk.reserve(account, frames, RequestId(request_id))
            if request_id == "part":
                command = replace(command, idempotency_key="key of part", payload_sha256="0" * 64)
            if request_id == "kept":
                desk.do(SetKeyTerms(ann.key.key_id, KeyTerms(daily_budget_mils=Mils(13))))
            assert isinstance(desk.do(command), Reserved)
            if request_id == "kept":
                desk.do(SetKeyTerms(ann.key.key_id, KeyTerms()))
        desk.do(Quote("quo_1", bob.key.key_id, "m", 1, Mils(5), 1, 60.0))
        gone = desk.reserve(bob, 1, RequestId("gone"))
        desk.do(replace(gone, idempotency_key="key of gone", payload_sha256="0" * 64))
        desk.settle(RequestId("gone"), 0)
        desk.settle(RequestId("kept"), 2)
        desk.settle(RequestId("part"), 12)
        for version, since in ((1, 10.0), (2, 20.0)):
            desk.do(AddPrice("m", "", version, since, terms_of(PriceVersion("m", version, since, (Rate("frame", 1),)))))
        cat = desk.account(name="cat")
        desk.do(Credit(cat.customer_id, Mils(1000), "stripe:cat", "evt_cat", "", ("evt_cat",)))
        desk.settle(desk.reserved(cat, 160), 160)
        desk.do(Reverse("stripe:cat", Mils(1000), "evt_back", ""))
        desk.do(Credit(cat.customer_id, Mils(300), "stripe:cat2", "evt_cat2", ""))
        dan, eli = desk.account(500, name="dan"), desk.account(name="eli")
        desk.do(SetCreditLine(dan.customer_id, Mils(100)))
        desk.do(SetMember(eli.customer_id, "eli", dan.customer_id, Mils(500), "month"))
        desk.do(Transfer("tra_1", dan.customer_id, eli.customer_id, Mils(200), ""))
        desk.do(CloseStatement(dan.customer_id, "2027-01"))
        assert isinstance(desk.do(desk.reserve(eli, 49, RequestId("elis"))), Reserved)
        fay = desk.account(1000, name="fay")
        desk.do(SetUnits(fay.customer_id, "m", 1, "2027-01", 2, Mils(100), 60, 4))
        desk.do(ChargeUnits())
        for request_id in ("fays", "fayp"):
            desk.do(replace(desk.reserve(fay, 49, RequestId(request_id)), model="m"))
        desk.settle(RequestId("fayp"), 10)
        tail, before_tail = desk.reader.transactions(ann.customer_id, 2)
        yield History(
            engine,
            {
                "ann": ann.customer_id,
                "bob": bob.customer_id,
                "cat": cat.customer_id,
                "dan": dan.customer_id,
                "eli": eli.customer_id,
                "fay": fay.customer_id,
                "fay_key": fay.key.key_id,
                "ann_key": ann.key.key_id,
                "bob_key": bob.key.key_id,
                "revoked_key": revoked.key.key_id,
                "credit": initial_grant_id(ann.key.key_id),
                "bob_credit": initial_grant_id(bob.key.key_id),
                "tail": tail.seq,
                "next": tail.seq + 1,
                "balance": tail.balance_after_mils,
                "balance_before_tail": before_tail.balance_after_mils,
                "epoch": 1,
            },
        )
        assert audit(engine) == []


def run(history: History, statements: Sequence[str]) -> None:
    with writer(history.engine).begin() as connection:
        for statement in statements:
            connection.execute(text(statement), history.names)


def everything(engine: Engine) -> dict[str, list[Any]]:
    with engine.connect() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(table.select())))
            for table in billing_metadata.sorted_tables
        }


def assert_refused(history: History, attack: Attack) -> None:
    before = everything(history.engine)
    with pytest.raises((IntegrityError, DataError)) as refusal:
        run(history, attack.statements)
    if history.engine.dialect.name == "postgresql" or attack.by.startswith(("ck_", "tr_")) or " " in attack.by:
        assert re.search(attack.by, str(refusal.value.orig))
    assert everything(history.engine) == before


def on(kind: str) -> Any:
    attacks = [attack for attack in ATTACKS if attack.only == kind]
    return pytest.mark.parametrize("attack", attacks, ids=lambda attack: attack.name)


@on("")
def test_the_database_refuses(history: History, attack: Attack):
    assert_refused(history, attack)


@on("sqlite")
@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
def test_sqlite_refuses(history: History, attack: Attack):
    assert_refused(history, attack)


@on("postgresql")
@pytest.mark.parametrize("databases", ["postgresql"], indirect=True)
def test_postgresql_refuses(history: History, attack: Attack):
    assert_refused(history, attack)


def test_the_same_statements_are_accepted_when_they_are_right(databases: Databases):
    """Or every refusal above could be a typing error."""
    with databases.migrated() as engine:
        desk = Desk(engine, Clock())
        account = desk.account(1000)
        names = {"ann": account.customer_id, "ann_key": account.key.key_id, "epoch": 1}
        run(
            History(engine, names | {"tail": 1, "next": 2, "balance": 1000}),
            [entry("credit", 10, public_id="'adm_raw'"), wallet("10")],
        )
        run(
            History(engine, names | {"tail": 2, "next": 3, "balance": 1010}),
            [reservation(), entry("debit", -50, reserved=50), wallet("-50")],
        )
        run(
            History(engine, names | {"tail": 3, "next": 4, "balance": 960}),
            [settle("'new'", 25, 25), entry("refund", 25, reserved=50), wallet("25")],
        )
        run(
            History(engine, names),
            [submission("'new'", key="'key'"), "DELETE FROM submission WHERE request_id = 'new'"],
        )
        assert desk.balance(account) == 985
        assert audit(engine) == []


def test_every_rule_of_the_schema_is_attacked():
    rules = {str(constraint.name) for table in billing_metadata.sorted_tables for constraint in table.constraints} | {
        str(index.name) for table in billing_metadata.sorted_tables for index in table.indexes if index.unique
    }
    for statement in (*SQLITE, *POSTGRESQL):
        rules.update(re.findall(r"CREATE TRIGGER (\w+)", statement))
    # On PostgreSQL one trigger checks both rules of a new entry.
    rules.remove("tr_entry_insert")
    aimed_at = {rule for attack in ATTACKS for rule in attack.by.split("|") if " " not in rule}
    assert rules - IMPLIED == aimed_at - IMPLIED


def test_fractions_of_a_mil_never_reach_a_postgresql_row_either(desk: Desk):
    """A PostgreSQL BIGINT would round half a mil; the ledger refuses it before."""
    account = desk.account(1000)
    for frames, rate in ((1.0, 5), (1, 0.5)):
        outcome = desk.do(replace(desk.reserve(account), frames=frames, mils_per_frame=rate))
        assert isinstance(outcome, Rejected)
    assert desk.balance(account) == 1000
