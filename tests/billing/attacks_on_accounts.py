"""Attacks on teams, credit lines and statements.

Dan is the parent of Eli, who has a cap, and may spend down to -100. Dan: 1 credit 500, 2 gave 200 to Eli, 3 drawn
on by `elis`, Eli's request; his January is closed with entry 2. Eli: 1 received 200, 2 drew 45, 3 debit 245.
"""

from tests.billing.attacks import Attack, entry, wallet


def line(*, seq: int = 2, limit: int = 50, floor: int = -50, entry_seq: int = 2) -> str:
    return f"INSERT INTO credit_line VALUES (:dan, {seq}, {limit}, {floor}, {entry_seq}, 1)"


def statement(
    *,
    number: int = 2,
    previous: str = "1",
    period: str = "2027-02",
    start: int = 2,
    end: int = 3,
    opening: int = 300,
    transfers: int = -45,
    closing: int = 255,
) -> str:
    return (
        f"INSERT INTO statement VALUES (:dan, {number}, {previous}, '{period}', {start}, {end}, {opening}, 0, 0,"
        f" {transfers}, {closing}, 1)"
    )


def membership(customer: str = ":ann", parent: str = ":dan", *, cap: str = "NULL, NULL") -> str:
    return f"INSERT INTO membership VALUES ({customer}, {parent}, {cap})"


def transfer(
    transfer_id: str = "'tra_new'",
    source: str = ":dan",
    target: str = ":eli",
    *,
    amount: int = 10,
    from_seq: int = 2,
    to_seq: int = 1,
) -> str:
    return f"INSERT INTO transfer VALUES ({transfer_id}, {source}, {target}, {amount}, {from_seq}, {to_seq})"


ACCOUNT_ATTACKS = [
    # Credit lines.
    Attack("two lines of one number", "pk_credit_line", [line(seq=1)]),
    Attack("a line with another floor", "ck_credit_line_floor", [line(floor=-40)]),
    Attack("a line above zero", "ck_credit_line_floor", [line(limit=-5, floor=0)]),
    Attack("a line from no entry on", "fk_credit_line_entry", [line(entry_seq=99)]),
    Attack("an edited line", "tr_credit_line_update", ["UPDATE credit_line SET limit_mils = 9, floor_mils = -9"]),
    Attack("a line that never was", "tr_credit_line_delete", ["DELETE FROM credit_line"]),
    Attack(
        "a limit without a line",
        "tr_wallet_line",
        ["UPDATE wallet SET credit_limit_mils = 900, floor_mils = -900 WHERE customer_id = :ann"],
    ),
    Attack(
        "an older line",
        "tr_wallet_line",
        [line(), "UPDATE wallet SET credit_limit_mils = 100, floor_mils = 0 WHERE customer_id = :dan"],
    ),
    Attack(
        "a wallet that begins on credit",
        "tr_wallet_insert",
        [
            "INSERT INTO wallet (customer_id, name, seq, balance_mils, created_at, credit_limit_mils, floor_mils)"
            " VALUES ('cus_eve', 'eve', 0, 0, 1, 5, -5)",
            entry("opening", 0, customer="'cus_eve'", seq=0, prev_seq="NULL", prev_balance=0),
        ],
    ),
    # Statements.
    Attack(
        "two statements of one number",
        "pk_statement",
        [statement(number=1, previous="NULL", start=0, opening=0, transfers=255)],
    ),
    Attack("one month closed twice", "uq_statement_period", [statement(period="2027-01")]),
    Attack("a statement after none", "fk_statement_previous", [statement(number=3, previous="2")]),
    Attack("a gap between statements", "ck_statement_chain", [statement(number=3, previous="1")]),
    Attack(
        "a statement that begins in the middle",
        "fk_statement_previous",
        [statement(start=1, opening=500, transfers=-245)],
    ),
    Attack("a statement of another sum", "ck_statement_sum", [statement(transfers=-44)]),
    Attack("a statement of no entry", "fk_statement_entry", [statement(end=99)]),
    Attack("an edited statement", "tr_statement_update", ["UPDATE statement SET closed_at = 9"]),
    Attack("a statement that never was", "tr_statement_delete", ["DELETE FROM statement"]),
    # Teams.
    Attack("a member of two teams", "pk_membership", [membership(":eli", ":bob")]),
    Attack("one's own member", "ck_membership_parent", [membership(":ann", ":ann")]),
    Attack("a cap without a period", "ck_membership_cap", [membership(cap="5, NULL")]),
    Attack("a cap below nothing", "ck_membership_cap", [membership(cap="-5, 'day'")]),
    Attack("a member that is nobody", "fk_membership_customer", [membership("'cus_x'")]),
    Attack("a parent that is nobody", "fk_membership_parent", [membership(parent="'cus_x'")]),
    Attack("a member of a member", "tr_membership_insert", [membership(":ann", ":eli")]),
    Attack("a parent that becomes a member", "tr_membership_insert", [membership(":dan", ":ann")]),
    Attack("a member that changes teams", "tr_membership_update", ["UPDATE membership SET parent_id = :bob"]),
    Attack("leaving a team", "tr_membership_delete", ["DELETE FROM membership"]),
    # Transfers.
    Attack("one transfer twice", "pk_transfer", [transfer("'tra_1'")]),
    Attack("a transfer of nothing", "ck_transfer_amount", [transfer(amount=0)]),
    Attack("a transfer that was not sent", "fk_transfer_from", [transfer(from_seq=99)]),
    Attack("a transfer that did not arrive", "fk_transfer_to", [transfer(to_seq=99)]),
    Attack("a transfer to a stranger", "tr_transfer_insert", [transfer(target=":ann")]),
    Attack("an edited transfer", "tr_transfer_update", ["UPDATE transfer SET amount = 1"]),
    Attack("a transfer that never was", "tr_transfer_delete", ["DELETE FROM transfer"]),
    Attack("money from no transfer", "tr_entry_transfer", [entry("transfer_in", 10), wallet("10")]),
    Attack("money to no transfer", "tr_entry_transfer", [entry("transfer_out", -10), wallet("-10")]),
    # Draws.
    Attack("one request drawn for twice", "pk_draw", ["INSERT INTO draw VALUES ('elis', :eli, 1, 5)"]),
    Attack("drawing nothing", "ck_draw_drawn", ["INSERT INTO draw VALUES ('held', :eli, 1, 0)"]),
    Attack("drawing for no request", "fk_draw_reservation", ["INSERT INTO draw VALUES ('x', :eli, 1, 5)"]),
    Attack("drawing without a team", "fk_draw_member", ["INSERT INTO draw VALUES ('held', :ann, 1, 5)"]),
    Attack("drawing on another day", "tr_draw_update", ["UPDATE draw SET day = day - 1"]),
    Attack("drawing that is forgotten", "tr_draw_delete", ["DELETE FROM draw"]),
]
