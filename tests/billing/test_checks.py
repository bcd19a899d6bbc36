"""Commands that the ledger refuses to read."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.checks import (
    MAX_DEDUPE_WINDOW_S,
    MAX_DETAIL_CHARS,
    MAX_ID_CHARS,
    MAX_LEASE_S,
    malformed,
    printable,
)
from billing.commands import Command, CreateKey, ExpireLeases, Grant, Heartbeat, Rejected, Reserve, RevokeKey, Settle
from billing.money import MAX_MILS, Mils

RESERVE = Reserve("req_1", "key_1", 49, Mils(5), "predict", 60.0)
SETTLE = Settle("req_1", 49, "")
HEARTBEAT = Heartbeat(("req_1", "req_2"), 60.0)
GRANT = Grant("cus_1", Mils(1), "adm_1", "")
CREATE_KEY = CreateKey("key_1", "0" * 64, "abcd", "ann", "cus_1", Mils(0), 50.0, 200)
REVOKE_KEY = RevokeKey("key_1")

KEYED = replace(RESERVE, idempotency_key="k", payload_sha256="0" * 64, dedupe_window_s=60.0)
NOT_SHA256S = ["0" * 63, "0" * 65, "G" * 64, "A" * 64, None]
NOT_WINDOWS = [-1.0, math.nan, math.inf, MAX_DEDUPE_WINDOW_S + 1, "60", None, True]
NOT_IDS = ["", " ", " padded", "a\nb", "a\x00b", "\ud800", "x" * (MAX_ID_CHARS + 1), None, 7]
NOT_COUNTS = [-1, 1.0, True, "1", None, math.nan, MAX_MILS + 1]
NOT_LEASES = [0, -1.0, math.nan, math.inf, MAX_LEASE_S + 1, "60", None, True]


@pytest.mark.parametrize("command", [RESERVE, KEYED, SETTLE, HEARTBEAT, GRANT, CREATE_KEY, REVOKE_KEY, ExpireLeases()])
def test_a_right_command_passes(command: Command):
    assert malformed(command) is None


WRONG = (
    [(RESERVE, "request_id", value) for value in NOT_IDS]
    + [(RESERVE, "key_id", value) for value in NOT_IDS]
    + [(RESERVE, "frames", value) for value in [0, *NOT_COUNTS]]
    + [(RESERVE, "mils_per_frame", value) for value in [0, *NOT_COUNTS]]
    + [(RESERVE, "detail", None)]
    + [(RESERVE, "lease_s", value) for value in NOT_LEASES]
    + [(KEYED, "idempotency_key", value) for value in ["a\nb", "\x00", "\ud800", "x" * 257, None, 7]]
    + [(KEYED, "payload_sha256", value) for value in ["", *NOT_SHA256S]]
    + [(replace(KEYED, idempotency_key=""), "payload_sha256", "")]
    + [(replace(KEYED, dedupe_window_s=0), "payload_sha256", "")]
    + [(KEYED, "dedupe_window_s", value) for value in NOT_WINDOWS]
    + [(SETTLE, "request_id", value) for value in NOT_IDS]
    + [(SETTLE, "frames_delivered", value) for value in NOT_COUNTS]
    + [(SETTLE, "reason", None)]
    + [(HEARTBEAT, "request_ids", ("req_1", value)) for value in NOT_IDS]
    + [(HEARTBEAT, "request_ids", value) for value in [None, "req_1", ["req_1"]]]
    + [(HEARTBEAT, "lease_s", value) for value in NOT_LEASES]
    + [(GRANT, "customer_id", value) for value in NOT_IDS]
    + [(GRANT, "public_id", value) for value in NOT_IDS]
    + [(GRANT, "amount_mils", value) for value in [0, *NOT_COUNTS]]
    + [(CREATE_KEY, "customer_name", value) for value in NOT_IDS]
    + [(CREATE_KEY, "customer_id", value) for value in NOT_IDS]
    + [(CREATE_KEY, "initial_credits_mils", value) for value in NOT_COUNTS]
    + [(CREATE_KEY, "sha256", value) for value in ["", *NOT_SHA256S]]
    + [(CREATE_KEY, "last4", value) for value in ["", "abc", "abcde", "ab\nc", "äöüß", None]]
    + [(CREATE_KEY, "refill_per_s", value) for value in [0, -1, math.nan, math.inf, None, True]]
    + [(CREATE_KEY, "burst", value) for value in [0, *NOT_COUNTS]]
    + [(REVOKE_KEY, "key_id", value) for value in NOT_IDS]
)


@pytest.mark.parametrize(("command", "field", "value"), WRONG)
def test_a_wrong_field_is_named(command: Command, field: str, value: object):
    reason = malformed(replace(command, **{field: value}))
    assert reason is not None
    assert reason.startswith(field)


GARBAGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.text()),
    st.tuples(st.none()),
    st.tuples(st.text(), st.integers()),
    st.dictionaries(st.text(), st.text()),
)


@given(data=st.data())
def test_no_garbage_in_any_field_breaks_the_check_itself(data: st.DataObject):
    command = data.draw(st.sampled_from([RESERVE, SETTLE, HEARTBEAT, GRANT, CREATE_KEY, REVOKE_KEY]))
    garbled = type(command)(*(data.draw(GARBAGE) for _ in fields(command)))
    reason = malformed(garbled)
    assert reason is None or reason


@pytest.mark.parametrize("thing", [None, "Reserve", object(), Rejected("")])
def test_what_is_not_a_command_is_said_so(thing: object):
    assert "is not a command" in str(malformed(thing))


def test_a_price_that_overflows_is_refused_though_its_factors_are_fine():
    assert malformed(replace(RESERVE, frames=2**30, mils_per_frame=Mils(2**30))) is not None
    assert malformed(replace(RESERVE, frames=1, mils_per_frame=MAX_MILS)) is None


@given(st.text(max_size=1000))
def test_printable_text_is_one_bounded_line_that_can_be_stored(text: str):
    line = printable(text)
    assert line.isprintable()
    assert len(line) <= MAX_DETAIL_CHARS
    line.encode()


def test_printable_keeps_what_people_write():
    assert printable("predict · tiny-pusher · 49 frames") == "predict · tiny-pusher · 49 frames"
