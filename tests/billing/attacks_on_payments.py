"""Attacks on payments, what was taken back of them, and debts.

Cat paid 1000 and spent 800; all 1000 were taken back, so 800 are owed; then she paid 300, so 500 are still owed.
Her entries: 1 credit 1000, 2 debit 800, 3 reversal 200, 4 credit 300, 5 repayment 300.
"""

from tests.billing.attacks import Attack, entry, wallet


def payment(
    source: str = "'stripe:new'", *, public_id: str = ":credit", granted: int = 1000, reversed_mils: int = 0
) -> str:
    """Of Ann's first credit, which nobody paid for."""
    return f"INSERT INTO payment VALUES ({source}, {public_id}, :ann, {granted}, 1, {reversed_mils}, NULL, 1)"


def reversal(
    source: str = "'stripe:cat2'",
    *,
    seq: int = 1,
    previous: str = "NULL, 0",
    to: int = 100,
    taken: int = 0,
    owed: int = 100,
    entry_seq: int = 5,
) -> str:
    return (
        f"INSERT INTO reversal VALUES ({source}, {seq}, {previous}, {to}, {taken}, {owed}, :cat, {entry_seq},"
        " 'evt_raw', 1)"
    )


def debt(
    *,
    seq: int = 3,
    previous: str = "2, 500",
    amount: int = -100,
    after: int = 400,
    kind: str = "repayment",
    entry_seq: int = 5,
) -> str:
    return f"INSERT INTO debt VALUES (:cat, {seq}, {previous}, {amount}, {after}, '{kind}', {entry_seq}, 'evt_raw', 1)"


PAYMENT_ATTACKS = [
    Attack(
        "a debt that nothing caused", "ck_wallet_debt", ["UPDATE wallet SET debt_mils = 5 WHERE customer_id = :ann"]
    ),
    Attack("a debt forgiven", "fk_wallet_debt", ["UPDATE wallet SET debt_mils = 0 WHERE customer_id = :cat"]),
    Attack("taking back no payment", "tr_entry_reversal", [entry("reversal", -10), wallet("-10")]),
    Attack("giving back no payment", "tr_entry_reversal", [entry("reinstatement", 10), wallet("10")]),
    Attack("repaying no debt", "tr_entry_repayment", [entry("repayment", -10), wallet("-10")]),
    # Payments.
    Attack("one source paid twice", "pk_payment", [payment("'stripe:cat'")]),
    Attack(
        "one credit paid for twice",
        "uq_payment_public_id",
        ["INSERT INTO payment VALUES ('stripe:new', 'evt_cat', :cat, 1000, 1, 0, NULL, 1)"],
    ),
    Attack("a payment that credited nothing", "tr_payment_insert", [payment(public_id="'evt_x'")]),
    Attack("a payment that credited less", "tr_payment_insert", [payment(granted=1001)]),
    Attack(
        "taking back more than was paid",
        "ck_payment_reversed",
        ["UPDATE payment SET reversed = 1001, reversal_seq = 2 WHERE source = 'stripe:cat'"],
    ),
    Attack("taken back before it was paid", "ck_payment_untouched", [payment(reversed_mils=5)]),
    Attack(
        "taken back without a reversal",
        "fk_payment_reversal",
        ["UPDATE payment SET reversed = 900, reversal_seq = 2 WHERE source = 'stripe:cat'"],
    ),
    Attack(
        "a larger payment",
        "tr_payment_update",
        ["UPDATE payment SET granted = 2000, reversal_seq = 2 WHERE source = 'stripe:cat'"],
    ),
    Attack(
        "an older state of a payment",
        "tr_payment_update",
        ["UPDATE payment SET reversed = 0, reversal_seq = NULL WHERE source = 'stripe:cat'"],
    ),
    Attack("a payment that never was", "tr_payment_delete", ["DELETE FROM payment WHERE source = 'stripe:cat2'"]),
    # Reversals.
    Attack("two reversals of one number", "pk_reversal", [reversal("'stripe:cat'")]),
    Attack("a reversal that starts anew", "ck_reversal_chain", [reversal("'stripe:cat'", seq=2)]),
    Attack("a reversal of another sum", "ck_reversal_sum", [reversal(owed=99)]),
    Attack(
        "owing what was given back",
        "ck_reversal_parts",
        [reversal("'stripe:cat'", seq=2, previous="1, 1000", to=900, taken=-150, owed=50)],
    ),
    Attack(
        "a reversal of what was not so",
        "fk_reversal_previous",
        [reversal("'stripe:cat'", seq=2, previous="1, 900", to=1000)],
    ),
    Attack("a reversal of nobody's payment", "fk_reversal_payment", [reversal("'stripe:x'")]),
    Attack("a reversal at no entry", "fk_reversal_entry", [reversal(entry_seq=99)]),
    Attack("an edited reversal", "tr_reversal_update", ["UPDATE reversal SET public_id = 'x'"]),
    Attack("a reversal that never was", "tr_reversal_delete", ["DELETE FROM reversal"]),
    # Debts.
    Attack("two debts of one number", "pk_debt", [debt(seq=2, previous="1, 800", amount=-100, after=700)]),
    Attack("a debt of another sum", "ck_debt_sum", [debt(after=300)]),
    Attack("a debt that starts anew", "ck_debt_chain", [debt(previous="NULL, 500")]),
    Attack("a repayment that adds to the debt", "ck_debt_kind", [debt(amount=100, after=600)]),
    Attack("a debt after one that was not so", "fk_debt_previous", [debt(previous="2, 400", after=300)]),
    Attack("a repayment by no entry", "fk_debt_entry", [debt(entry_seq=99)]),
    Attack("a debt without a reversal", "tr_debt_insert", [debt(kind="shortage", amount=100, after=600)]),
    Attack("an edited debt", "tr_debt_update", ["UPDATE debt SET public_id = 'x'"]),
    Attack("a debt that never was", "tr_debt_delete", ["DELETE FROM debt WHERE seq = 2"]),
    # Events.
    Attack("one event twice", "pk_payment_event", ["INSERT INTO payment_event VALUES ('evt_cat', 'stripe:cat', 1)"]),
    Attack(
        "an event of no payment",
        "fk_payment_event_payment",
        ["INSERT INTO payment_event VALUES ('evt_x', 'stripe:x', 1)"],
    ),
    Attack("an event of another time", "tr_payment_event_update", ["UPDATE payment_event SET applied_at = 9"]),
    Attack("an event that is forgotten", "tr_payment_event_delete", ["DELETE FROM payment_event"]),
]
