"""A customer's requests, in pages: every one once, in both directions, by each filter, and nobody else's."""

from typing import Any

import pytest

from billing import request_log
from billing.errors import UnknownCursor
from billing.request_log import RequestFilter, RequestLog
from tests.billing.conftest import Desk

NOON = 1_800_000_000.0
ALL = RequestFilter()


@pytest.fixture
def log(desk: Desk) -> RequestLog:
    return RequestLog(desk.engine)


class TestRequestLog:
    def test_a_request_says_what_became_of_its_money(self, desk: Desk, log: RequestLog):
        desk.clock.now = NOON
        account = desk.account(10_000)
        ids = [desk.ran(account, 4), desk.ran(account, 4, delivered=1), desk.ran(account, 4, delivered=0)]
        ids.append(desk.reserved(account, 4))
        page = log.page(account.customer_id, ALL, 10)
        assert [each.request_id for each in page.requests] == ids[::-1]
        assert [(each.state, each.cost_mils, each.reason) for each in page.requests] == [
            ("open", 20, ""),
            ("refunded", 0, "why"),
            ("partial", 5, "why"),
            ("succeeded", 20, ""),
        ]
        newest = page.requests[-1]
        assert (newest.model, newest.frames, newest.created_at, newest.settled_at) == ("m", 4, NOON, NOON)
        assert newest.detail == "predict · tiny-pusher · 4 frames"
        assert newest.key_last4 == account.token[-4:]

    def test_pages_lead_to_every_request_once_and_back(self, desk: Desk, log: RequestLog):
        """All with one time, which is where an order by time alone would repeat or skip."""
        account = desk.account(10_000)
        ids = [desk.ran(account) for _ in range(7)][::-1]
        forth, cursor = [], None
        while True:
            page = log.page(account.customer_id, ALL, 3, after=cursor)
            forth.append([each.request_id for each in page.requests])
            cursor = page.older
            if cursor is None:
                break
        assert forth == [ids[:3], ids[3:6], ids[6:]]
        assert page.newer == ids[6]
        back = log.page(account.customer_id, ALL, 3, before=page.newer)
        assert [each.request_id for each in back.requests] == ids[3:6]
        assert (back.older, back.newer) == (ids[5], ids[3])
        first = log.page(account.customer_id, ALL, 3, before=back.newer)
        assert [each.request_id for each in first.requests] == ids[:3]
        assert first.newer is None

    def test_a_page_of_exactly_all_is_the_last(self, desk: Desk, log: RequestLog):
        account = desk.account(10_000)
        for _ in range(3):
            desk.ran(account)
        assert log.page(account.customer_id, ALL, 3).older is None
        assert log.page(account.customer_id, ALL, 2).older is not None

    def test_what_is_new_is_found_from_the_newest_known(self, desk: Desk, log: RequestLog):
        account = desk.account(10_000)
        known = desk.ran(account)
        assert log.page(account.customer_id, ALL, 5, before=known).requests == ()
        new = [desk.ran(account) for _ in range(2)]
        page = log.page(account.customer_id, ALL, 5, before=known)
        assert [each.request_id for each in page.requests] == new[::-1]

    def test_each_filter_lets_through_what_it_says(self, desk: Desk, log: RequestLog):
        desk.clock.now = NOON
        account, other = desk.account(10_000, name="ann"), desk.account(0, name="ann")
        small = desk.ran(account, 1, "small")
        desk.clock.advance(10)
        large = desk.ran(other, 10, "large")
        desk.clock.advance(10)
        lost = desk.ran(account, 5, "large", delivered=0)

        def found(**chosen: Any) -> list[str]:
            where = RequestFilter(**chosen)
            return [each.request_id for each in log.page(account.customer_id, where, 10).requests]

        assert found(model="large") == [lost, large]
        assert found(key_id=other.key.key_id) == [large]
        assert found(state="refunded") == [lost]
        assert found(state="open") == []
        assert found(min_cost_mils=5) == [large, small]
        assert found(min_cost_mils=6, max_cost_mils=50) == [large]
        assert found(max_cost_mils=49) == [lost, small]
        assert found(since=NOON + 10) == [lost, large]
        assert found(until=NOON + 20) == [large, small]
        assert found(since=NOON + 10, until=NOON + 20, model="large", state="succeeded") == [large]
        assert found(model="large", max_cost_mils=0) == [lost]

    def test_a_page_examines_no_more_than_its_bound_and_says_where_to_go_on(
        self, desk: Desk, log: RequestLog, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(request_log, "MAX_EXAMINED", 4)
        account = desk.account(10_000)
        rare = desk.ran(account, model="rare")
        others = [desk.ran(account) for _ in range(6)]
        where = RequestFilter(model="rare")
        page = log.page(account.customer_id, where, 10)
        assert page.requests == ()
        assert page.older == others[2]
        page = log.page(account.customer_id, where, 10, after=page.older)
        assert [each.request_id for each in page.requests] == [rare]
        assert page.older is None

    def test_a_customer_sees_its_own_alone_and_no_other_cursor(self, desk: Desk, log: RequestLog):
        ann, bob = desk.account(1000), desk.account(1000)
        request_id = desk.ran(ann)
        assert log.page(bob.customer_id, ALL, 10).requests == ()
        assert log.request(bob.customer_id, request_id) is None
        assert log.request(ann.customer_id, request_id) == log.page(ann.customer_id, ALL, 1).requests[0]
        assert log.request(ann.customer_id, "req_never") is None
        for cursor in (request_id, "req_never"):
            with pytest.raises(UnknownCursor):
                log.page(bob.customer_id, ALL, 10, after=cursor)
            with pytest.raises(UnknownCursor):
                log.page(bob.customer_id, ALL, 10, before=cursor)
