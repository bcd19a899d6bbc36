"""Which sessions the directory still counts, after those who held them fell silent."""

import numpy as np
import pytest

from billing.commands import CustomerId, KeyId, RequestId
from billing.money import Mils
from deployments.session_directory import SILENT_S, UNCLAIMED_S, SessionDirectory, SessionRecord
from deployments.sessions import CONNECT_WITHIN_S, POLL_S

ME = CustomerId("me")


def record(name: str) -> SessionRecord:
    return SessionRecord(
        request_id=RequestId(name),
        customer_id=ME,
        key_id=KeyId("key"),
        model="tiny-pusher",
        start_frame=np.zeros((2, 2, 3), np.uint8),
        seed=0,
        num_steps=1,
        guidance=0.0,
        budget_frames=13,
        mils_per_frame=Mils(5),
        per_frames=1,
        created_at=0.0,
    )


@pytest.fixture
def now() -> list[float]:
    return [1000.0]


@pytest.fixture
def directory(now: list[float]) -> SessionDirectory:
    """Of one session per customer."""
    return SessionDirectory(1, 10, clock=lambda: now[0])


async def test_a_session_whose_owner_fell_silent_counts_no_more(directory: SessionDirectory, now: list[float]) -> None:
    await directory.create(record("first"))
    now[0] += CONNECT_WITHIN_S
    await directory.claim(RequestId("first"), ME, "an ingress")
    now[0] += SILENT_S
    assert await directory.create(record("second")) == "too many"
    now[0] += 0.1
    assert await directory.create(record("second")) is None
    assert await directory.find(RequestId("first")) is None


async def test_an_owner_that_asks_whether_to_end_is_heard_of(directory: SessionDirectory, now: list[float]) -> None:
    assert 2 * POLL_S < SILENT_S
    await directory.create(record("first"))
    await directory.claim(RequestId("first"), ME, "an ingress")
    now[0] += SILENT_S
    assert await directory.wait_closing(RequestId("first"), 0) == "open"
    now[0] += SILENT_S
    assert await directory.create(record("second")) == "too many"


async def test_a_session_waits_for_its_client_as_long_as_it_was_promised(
    directory: SessionDirectory, now: list[float]
) -> None:
    assert UNCLAIMED_S > CONNECT_WITHIN_S
    await directory.create(record("first"))
    now[0] += CONNECT_WITHIN_S
    assert await directory.create(record("second")) == "too many"
    now[0] += UNCLAIMED_S
    assert await directory.create(record("second")) is None
