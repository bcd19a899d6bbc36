"""What a customer reads about its use: balance in rollouts and hours, requests, usage, statements, warnings, CSV."""

import csv
import io
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy.exc import OperationalError

from billing.commands import ChargeUnits, CustomerId, KeyId, KeyTerms, RequestId, Reserve, SetKeyTerms, Settle, SetUnits
from billing.keys import mint_request_id
from billing.money import Mils
from billing.statements import Month
from serve_app.routes import requests as request_routes
from serve_app.routes import usage as usage_routes
from tests.support.app import App, running_app
from tests.support.payloads import actions, npy, png

pytestmark = pytest.mark.asyncio(loop_scope="module")

READS = [
    "/v1/requests",
    "/v1/billing/usage",
    "/v1/billing/statements",
    "/v1/billing/events",
    "/v1/billing/transactions",
    "/v1/billing/units",
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    async with running_app(tmp_path_factory.mktemp("usage")) as running:
        yield running


@dataclass
class Customer:
    """One with a key, who used something."""

    app: App
    headers: dict[str, str]
    customer_id: CustomerId
    key_id: KeyId

    def ran(self, frames: int = 49, model: str = "tiny-pusher", delivered: int | None = None, **more: Any) -> RequestId:
        command = Reserve(
            request_id=mint_request_id(),
            key_id=self.key_id,
            frames=frames,
            mils_per_frame=Mils(5),
            detail=f"predict · {model} · {frames} frames",
            lease_s=60.0,
            model=model,
        )
        self.app.ledger.apply(replace(command, **more))
        self.app.ledger.apply(Settle(command.request_id, frames if delivered is None else delivered, "engine failed"))
        return command.request_id

    def terms(self, **terms: Any) -> None:
        self.app.ledger.apply(SetKeyTerms(self.key_id, KeyTerms(**terms)))

    async def get(self, path: str, status: int = 200, **query: Any) -> Any:
        answer = await self.answer(path, **query)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def answer(self, path: str, accept: str = "", **query: Any) -> httpx.Response:
        headers = self.headers | ({"Accept": accept} if accept else {})
        return await self.app.http.get(path, headers=headers, params=query)

    async def table(self, path: str, **query: Any) -> list[dict[str, str]]:
        answer = await self.answer(path, format="csv", **query)
        assert answer.status_code == 200, answer.text
        assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
        return list(csv.DictReader(io.StringIO(answer.text)))


@pytest.fixture
def customer(app: App) -> Customer:
    headers, customer_id = app.key(credits_mils=10_000)
    key_id = next(each.key_id for each in app.ledger.reader.keys() if each.customer_id == customer_id)  # noqa: SIM118
    return Customer(app, headers, customer_id, key_id)


class TestAccess:
    @pytest.mark.parametrize("path", [*READS, "/v1/requests/req_1", "/v1/billing/statements/2027-01"])
    async def test_a_key_is_needed(self, app: App, path: str) -> None:
        assert (await app.http.get(path)).status_code == 401

    @pytest.mark.parametrize("path", READS)
    async def test_a_key_that_may_only_read_may_read(self, customer: Customer, path: str) -> None:
        customer.terms(scope="read")
        await customer.get(path)

    async def test_nobody_sees_anothers_requests(self, app: App, customer: Customer) -> None:
        request_id = customer.ran()
        headers, _ = app.key()
        answer = await app.http.get(f"/v1/requests/{request_id}", headers=headers)
        assert answer.status_code == 404
        for query in ({"after": request_id}, {"before": request_id}):
            refused = await app.http.get("/v1/requests", headers=headers, params=query)
            assert refused.status_code == 422
        assert (await app.http.get("/v1/requests", headers=headers)).json()["data"] == []


class TestBalance:
    async def test_it_is_said_in_rollouts_and_hours_too(self, customer: Customer) -> None:
        said = await customer.get("/v1/billing/balance")
        assert (said["balance_mils"], said["spendable_mils"], said["debt_mils"]) == (10_000, 10_000, 0)
        assert (said["model"], said["rollouts_left"]) == ("tiny-pusher", 40)
        assert said["mpc_hours_left"] == round(10_000 / 70_560_000, 4)  # $7,056 an hour
        assert (said["spending_mils_per_hour"], said["hours_left"]) == (0, None)

    async def test_what_was_spent_in_the_last_minute_says_for_how_long_it_goes_on(self, customer: Customer) -> None:
        customer.ran(frames=49)
        customer.ran(frames=49, delivered=0)
        said = await customer.get("/v1/billing/balance")
        assert said["balance_mils"] == 9_755
        assert said["spending_mils_per_hour"] == 245 * 60
        assert said["hours_left"] == round(9_755 / (245 * 60), 4)


class TestRequests:
    async def test_a_request_says_all_that_is_known_of_it(self, customer: Customer) -> None:
        request_id = customer.ran(frames=49, delivered=12)
        said = await customer.get(f"/v1/requests/{request_id}")
        assert (await customer.get("/v1/requests"))["data"] == [said]
        created, settled = said.pop("created"), said.pop("settled")
        assert time.time() - 60 < created <= settled <= time.time()
        assert said == {
            "id": request_id,
            "object": "request",
            "model": "tiny-pusher",
            "key_id": customer.key_id,
            "key_last4": customer.headers["Authorization"][-4:],
            "key_label": "",
            "state": "partial",
            "frames": 49,
            "frames_delivered": 12,
            "frames_covered": 0,
            "reserved_mils": 245,
            "refunded_mils": 185,
            "cost_mils": 60,
            "cost_usd": 0.006,
            "reason": "engine failed",
            "detail": "predict · tiny-pusher · 49 frames",
        }

    async def test_a_real_rollout_is_in_it(self, app: App, customer: Customer) -> None:
        files = {"frame": png(), "actions": npy(actions(12))}
        answer = await app.http.post("/v1/predict", headers=customer.headers, files=files)
        (logged,) = (await customer.get("/v1/requests"))["data"]
        assert logged["id"] == answer.headers["X-DreamEngine-Request-Id"]
        assert (logged["model"], logged["frames"], logged["reserved_mils"]) == ("tiny-pusher", 13, 65)

    async def test_cursors_lead_through_all_and_back(self, customer: Customer) -> None:
        ids = [customer.ran(frames=1) for _ in range(5)][::-1]
        first = await customer.get("/v1/requests", limit=2)
        assert first["previous_cursor"] is None
        second = await customer.get("/v1/requests", limit=2, after=first["next_cursor"])
        third = await customer.get("/v1/requests", limit=2, after=second["next_cursor"])
        assert [each["id"] for page in (first, second, third) for each in page["data"]] == ids
        assert third["next_cursor"] is None
        back = await customer.get("/v1/requests", limit=2, before=third["previous_cursor"])
        assert back["data"] == second["data"]
        assert (await customer.get("/v1/requests", limit=2, before=back["previous_cursor"]))["data"] == first["data"]

    async def test_filters_are_taken_together(self, customer: Customer) -> None:
        small, large = customer.ran(frames=1), customer.ran(frames=40, model="other")
        lost = customer.ran(frames=2, delivered=0)

        async def found(**query: Any) -> list[str]:
            return [each["id"] for each in (await customer.get("/v1/requests", **query))["data"]]

        assert await found(model="other") == [large]
        assert await found(state="refunded") == [lost]
        assert await found(key=customer.key_id, max_cost_mils=5) == [lost, small]
        assert await found(min_cost_mils=5, max_cost_mils=5) == [small]
        assert await found(since=time.time() + 60) == []
        assert await found(until="2027-01-01T00:00:00Z", since="2020-01-01") == [lost, large, small]

    @pytest.mark.parametrize(
        ("query", "field"),
        [
            ({"limit": 0}, "limit"),
            ({"limit": "many"}, "limit"),
            ({"state": "lost"}, "state"),
            ({"since": "yesterday"}, "since"),
            ({"since": "1e400"}, "since"),
            ({"min_cost_mils": -1}, "min_cost_mils"),
            ({"max_cost_mils": 2**53}, "max_cost_mils"),
            ({"after": "req_1"}, "after"),
            ({"before": "x" * 5000}, "before"),
            ({"after": "a", "before": "b"}, "before"),
            ({"format": "xml"}, "format"),
            ({"format": "csv", "before": "a"}, "before"),
        ],
        ids=str,
    )
    async def test_what_cannot_be_meant_is_refused_by_its_name(
        self, customer: Customer, query: dict[str, Any], field: str
    ) -> None:
        assert (await customer.get("/v1/requests", 422, **query))["detail"].startswith(field)

    async def test_a_longer_page_than_there_is_means_the_longest(self, customer: Customer) -> None:
        customer.ran(frames=1)
        assert len((await customer.get("/v1/requests", limit=10**6))["data"]) == 1


class TestUsage:
    async def test_it_adds_up_to_what_left_the_balance(self, customer: Customer) -> None:
        customer.ran(frames=10)
        customer.ran(frames=10, delivered=4)
        customer.ran(frames=3, model="other")
        said = await customer.get("/v1/billing/usage")
        assert (said["requests"], said["frames"], said["frames_delivered"]) == (3, 23, 17)
        assert (said["cost_mils"], said["cost_usd"]) == (85, 0.0085)
        assert said["cost_mils"] == 10_000 - (await customer.get("/v1/billing/balance"))["balance_mils"]
        assert said["group_by"] == ["day", "model", "key"]
        today = time.strftime("%Y-%m-%d", time.gmtime())
        assert said["data"][0] == {
            "day": today,
            "model": "other",
            "key_id": customer.key_id,
            "requests": 1,
            "frames": 3,
            "frames_delivered": 3,
            "reserved_mils": 15,
            "refunded_mils": 0,
            "cost_mils": 15,
            "cost_usd": 0.0015,
        }
        by_model = await customer.get("/v1/billing/usage", group_by=["model"])
        assert [(line["day"], line["model"], line["cost_mils"]) for line in by_model["data"]] == [
            (None, "other", 15),
            (None, "tiny-pusher", 70),
        ]

    @pytest.mark.parametrize(
        ("query", "field"),
        [
            ({"since": 2_000_000_000, "until": 1_000_000_000}, "since"),
            ({"since": 1_000_000_000, "until": 1_000_000_000 + 367 * 86_400}, "since"),
            ({"group_by": "customer"}, "group_by"),
        ],
        ids=str,
    )
    async def test_an_unbounded_question_is_refused(
        self, customer: Customer, query: dict[str, Any], field: str
    ) -> None:
        assert (await customer.get("/v1/billing/usage", 422, **query))["detail"].startswith(field)


class TestStatements:
    async def test_the_current_month_is_there_as_it_stands(self, customer: Customer) -> None:
        customer.ran(frames=10, delivered=4)
        (statement,) = (await customer.get("/v1/billing/statements"))["data"]
        month = Month.of(time.time())
        assert statement == await customer.get(f"/v1/billing/statements/{month}")
        assert (statement["month"], statement["closed"]) == (str(month), False)
        assert (statement["from_seq"], statement["to_seq"], statement["entries"]) == (0, 3, 3)
        assert (statement["opening_balance_mils"], statement["credits_mils"]) == (0, 10_000)
        assert (statement["debits_mils"], statement["refunds_mils"], statement["spent_usd"]) == (-50, 30, 0.002)
        assert statement["closing_balance_mils"] == 9_980

    async def test_the_csv_of_a_month_is_its_entries(self, customer: Customer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(usage_routes, "CSV_PART", 2)
        request_id = customer.ran(frames=10, delivered=4)
        rows = await customer.table(f"/v1/billing/statements/{Month.of(time.time())}")
        assert [(row["seq"], row["kind"], row["amount_mils"], row["balance_after_mils"]) for row in rows] == [
            ("1", "credit", "10000", "10000"),
            ("2", "debit", "-50", "9950"),
            ("3", "refund", "30", "9980"),
        ]
        assert rows[1]["id"] == rows[2]["id"] == request_id

    async def test_another_month_is_not_found_or_not_understood(self, customer: Customer) -> None:
        now = Month.of(time.time())
        for month in (now.previous, now.following):
            await customer.get(f"/v1/billing/statements/{month}", 404)
        for month in ("2027", "2027-13", "0001-01", "9999-12", "2027-1"):
            await customer.get(f"/v1/billing/statements/{month}", 422)
        await customer.get("/v1/billing/statements", 422, before="soon")
        assert (await customer.get("/v1/billing/statements", before=str(now)))["data"] == []

    async def test_a_table_of_months_has_a_line_for_each(self, customer: Customer) -> None:
        (row,) = await customer.table("/v1/billing/statements")
        assert (row["closing_balance_mils"], row["closed"]) == ("10000", "False")


class TestEvents:
    async def test_a_budget_that_comes_to_its_levels_says_so_once(self, customer: Customer) -> None:
        customer.terms(daily_budget_mils=Mils(300))
        customer.ran(frames=45)
        customer.ran(frames=1)
        (event,) = (await customer.get("/v1/billing/events"))["data"]
        assert (event["type"], event["period"], event["level_percent"]) == ("budget.warning", "day", 75)
        assert (event["limit_mils"], event["spent_mils"], event["key_id"]) == (300, 225, customer.key_id)
        assert event["period_start"] == time.time() // 86_400 * 86_400
        assert event["message"] == "$0.0225 of this key's $0.03 per day are spent"
        customer.ran(frames=14)
        said = await customer.get("/v1/billing/events", limit=1)
        assert [each["level_percent"] for each in said["data"]] == [90]
        rest = await customer.get("/v1/billing/events", after=said["next_cursor"])
        assert (rest["data"], rest["next_cursor"]) == ([event], None)
        await customer.get("/v1/billing/events", 422, after="evt_1")


class TestTransactions:
    async def test_a_page_goes_on_before_its_last(self, customer: Customer) -> None:
        for _ in range(3):
            customer.ran(frames=1)
        first = await customer.get("/v1/billing/transactions", limit=2)
        assert [row["seq"] for row in first["transactions"]] == [4, 3]
        rest = await customer.get("/v1/billing/transactions", before_seq=3)
        assert [row["seq"] for row in rest["transactions"]] == [2, 1]
        await customer.get("/v1/billing/transactions", 422, before_seq=0)
        await customer.get("/v1/billing/transactions", 422, before_seq=2**63)


class TestCsv:
    @pytest.mark.parametrize(
        ("accept", "query", "is_csv"),
        [
            ("text/csv", {}, True),
            ("text/csv; header=present, */*;q=0.1", {}, True),
            ("TEXT/CSV", {}, True),
            ("application/json, text/csv", {}, False),
            ("*/*", {}, False),
            ("", {"format": "csv"}, True),
            ("text/csv", {"format": "json"}, False),
        ],
    )
    @pytest.mark.parametrize("path", ["/v1/requests", "/v1/billing/usage", "/v1/billing/statements"])
    async def test_it_is_asked_for_by_the_header_or_by_the_query(
        self, customer: Customer, path: str, accept: str, query: dict[str, str], is_csv: bool
    ) -> None:
        answer = await customer.answer(path, accept, **query)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("text/csv" if is_csv else "application/json")
        assert ("attachment" in answer.headers.get("Content-Disposition", "")) == is_csv

    async def test_a_long_table_is_read_in_parts_and_ends_at_its_bound(
        self, customer: Customer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(request_routes, "CSV_PART", 2)
        ids = [customer.ran(frames=1) for _ in range(5)][::-1]
        assert [row["id"] for row in await customer.table("/v1/requests")] == ids
        assert [row["id"] for row in await customer.table("/v1/requests", limit=3)] == ids[:3]
        assert [row["id"] for row in await customer.table("/v1/requests", after=ids[2])] == ids[3:]
        monkeypatch.setattr(request_routes, "MAX_CSV_ROWS", 4)
        assert [row["id"] for row in await customer.table("/v1/requests", limit=10**6)] == ids[:4]

    async def test_a_table_of_nothing_has_its_head(self, customer: Customer) -> None:
        answer = await customer.answer("/v1/requests", format="csv")
        assert answer.text.startswith("id,model,key_id,key_last4,key_label,state,frames,")

    @pytest.mark.parametrize("label", ["=1+1", "+1", "-1", "@SUM(A1)", '=HYPERLINK("http://x","y")', "=a,b"])
    async def test_no_text_of_ours_is_a_formula(self, customer: Customer, label: str) -> None:
        customer.terms(label=label)
        customer.ran(frames=1)
        (row,) = await customer.table("/v1/requests")
        assert row["key_label"] == f"'{label}"

    async def test_numbers_stay_numbers_also_below_zero(self, customer: Customer) -> None:
        customer.ran(frames=1)
        (row,) = await customer.table("/v1/billing/statements")
        assert row["debits_mils"] == "-5"

    async def test_a_database_that_is_away_is_said_before_the_table_begins(
        self, customer: Customer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(*_: Any, **__: Any) -> None:
            raise OperationalError("SELECT", {}, Exception("gone"))

        monkeypatch.setattr(type(customer.app.services.request_log), "page", away)
        answer = await customer.answer("/v1/requests", format="csv")
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "2"


class TestUnits:
    async def test_frames_that_units_pay_for_cost_nothing_and_are_counted(self, customer: Customer) -> None:
        month = time.strftime("%Y-%m", time.gmtime())
        units = SetUnits(customer.customer_id, "tiny-pusher", 1, month, 2, Mils(100), 30, 0)
        customer.app.ledger.apply(units)
        customer.app.ledger.apply(ChargeUnits())
        request_id = customer.ran(frames=49)
        customer.ran(frames=49)
        [row] = (await customer.get("/v1/billing/units"))["data"]
        assert row.pop("charged") <= time.time()
        assert row == {
            "model": "tiny-pusher",
            "month": month,
            "units": 2,
            "unit_mils": 100,
            "unit_frames": 30,
            "frames": 60,
            "frames_used": 60,
            "frames_left": 0,
        }
        logged = await customer.get(f"/v1/requests/{request_id}")
        assert (logged["frames_covered"], logged["cost_mils"], logged["state"]) == (49, 0, "succeeded")
        assert logged["detail"].endswith("49 of 49 frames provisioned")
        assert (await customer.get("/v1/billing/usage"))["cost_mils"] == 38 * 5
        assert (await customer.get("/v1/billing/balance"))["balance_mils"] == 10_000 - 200 - 38 * 5
        rows = (await customer.get("/v1/billing/transactions"))["transactions"]
        assert [(row["kind"], row["amount_mils"]) for row in rows[:3]] == [
            ("debit", -190),
            ("debit", 0),
            ("debit", -200),
        ]
