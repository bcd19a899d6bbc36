"""Attacks on provisioned units.

Fay has two units of m since January, 100 mils and 60 frames each. Entry 2 charged January's. `fays` is open and covered
with its 49 frames; `fayp` was covered with 49 and delivered 10, so 39 came back: 59 of the 120 are used, in three rows.
"""

from tests.billing.attacks import Attack, entry, reservation, wallet


def provision(
    *,
    customer: str = ":fay",
    version: int = 2,
    previous: str = "1, '2027-01'",
    since: str = "2027-02",
    units: int = 2,
) -> str:
    return f"INSERT INTO provision VALUES ({customer}, 'm', {version}, {previous}, '{since}', {units}, 100, 60, 4, 1)"


def charge(
    *,
    period: str = "2027-02",
    version: int = 1,
    units: int = 2,
    amount: int = 200,
    frames: int = 120,
    entry_seq: int = 2,
) -> str:
    return (
        f"INSERT INTO unit_charge VALUES (:fay, 'm', '{period}', {version}, {units}, 100, 60, {amount}, {frames},"
        f" {entry_seq}, 1)"
    )


def covered(frames: int = 10, covered: int | None = None) -> str:
    return reservation(
        customer=":fay", key=":fay_key", frames=frames, amount=0, model="'m'", covered=covered or frames, debit_seq=9
    )


def use(
    request: str = "'new'",
    *,
    seq: int = 4,
    previous: int = 3,
    before: int = 59,
    frames: int = 10,
    after: int | None = None,
    allotment: int = 120,
) -> str:
    after = before + frames if after is None else after
    return (
        f"INSERT INTO unit_use VALUES (:fay, 'm', '2027-01', {seq}, {previous}, {before}, {frames}, {after},"
        f" {allotment}, {request})"
    )


UNIT_ATTACKS = [
    # What is sold.
    Attack("two commitments of one number", "pk_provision", [provision(version=1, previous="NULL, NULL", units=3)]),
    Attack("a commitment that does not follow", "ck_provision_chain", [provision(version=3)]),
    Attack("fewer units than none", "ck_provision_terms", [provision(units=-1)]),
    Attack(
        "units for nobody",
        "fk_provision_wallet",
        [provision(customer="'cus_x'", version=1, previous="NULL, NULL")],
    ),
    Attack(
        "a commitment after none",
        "fk_provision_previous",
        [provision(version=3, previous="2, '2027-02'", since="2027-03")],
    ),
    Attack("other units for a month that was charged", "tr_provision_insert", [provision(since="2027-01")]),
    Attack("edited units", "tr_provision_update", ["UPDATE provision SET unit_frames = 1000"]),
    Attack("units that were never sold", "tr_provision_delete", ["DELETE FROM provision"]),
    # What is charged.
    Attack("a month charged twice", "pk_unit_charge", [charge(period="2027-01")]),
    Attack("units for less than they cost", "ck_unit_charge_amount", [charge(amount=100)]),
    Attack("more frames than the units have", "ck_unit_charge_amount", [charge(frames=121)]),
    Attack("units that nobody sold", "fk_unit_charge_provision", [charge(units=3, amount=300, frames=180)]),
    Attack("units that nobody paid", "fk_unit_charge_entry", [charge(entry_seq=99)]),
    Attack("units of another version", "tr_unit_charge_insert", [charge(version=2)]),
    Attack("an edited charge", "tr_unit_charge_update", ["UPDATE unit_charge SET charged_at = 9"]),
    Attack("a charge that never was", "tr_unit_charge_delete", ["DELETE FROM unit_charge"]),
    Attack("a fee for no units", "tr_entry_fee", [entry("fee", -10), wallet("-10")]),
    # What is used.
    Attack("free work that no units cover", "fk_reservation_covered", [covered()]),
    Attack(
        "more frames covered than were asked for",
        "ck_reservation_covered",
        [reservation(frames=10, amount=-5, covered=11)],
    ),
    Attack(
        "covered frames that cost something",
        "ck_reservation_amount",
        [reservation(customer=":fay", key=":fay_key", frames=10, amount=50, model="'m'", covered=10), use()],
    ),
    Attack(
        "covering a request afterwards",
        "tr_reservation_update",
        ["UPDATE reservation SET covered = 10 WHERE request_id = 'held'"],
    ),
    Attack("two uses of one number", "pk_unit_use", [covered(), use(seq=3, previous=2, before=98)]),
    Attack("one request covered twice", "uq_unit_use_request", [use("'fays'", frames=49)]),
    Attack("a use that does not follow", "ck_unit_use_chain", [covered(), use(seq=5)]),
    Attack("more than the allotment", "ck_unit_use_sum", [covered(70), use(frames=70)]),
    Attack("a use of another sum", "ck_unit_use_sum", [covered(), use(after=68)]),
    Attack("another allotment than was paid", "fk_unit_use_charge", [covered(), use(allotment=1000)]),
    Attack("a use after none", "fk_unit_use_previous", [covered(), use(seq=5, previous=4)]),
    Attack("giving back what is still needed", "tr_unit_use_insert", [use("'fays'", frames=-49)]),
    Attack("giving back what was delivered", "tr_unit_use_insert", [use("'fayp'", frames=-49)]),
    Attack("using for no request", "tr_unit_use_insert", [use()]),
    Attack("using for another's request", "tr_unit_use_insert", [use("'bobs'")]),
    Attack("an edited use", "tr_unit_use_update", ["UPDATE unit_use SET request_id = 'x'"]),
    Attack("a use that never was", "tr_unit_use_delete", ["DELETE FROM unit_use"]),
]
