"""What breaks in a real cluster, and what it costs the customer: nothing that was not delivered."""

import base64
import contextlib
import io
import json
import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from billing import invariants
from billing.database import open_database
from tests.support.cluster import PATIENCE_S, Cluster, eventually
from tests.support.models import DIE, RAISE, SLEEP_S
from tests.support.payloads import actions, npy, png
from tests.support.video import decode


@pytest.fixture
def http(stand_in_cluster: Cluster) -> Iterator[httpx.Client]:
    """A new customer with $1, who has never been charged."""
    with stand_in_cluster.http_of(stand_in_cluster.new_customer()) as client:
        yield client


@pytest.fixture(autouse=True)
def the_ledger_audits_clean(stand_in_cluster: Cluster) -> Iterator[None]:
    yield
    database = open_database(f"sqlite:///{stand_in_cluster.data_dir / 'ledger.db'}")
    assert invariants.audit(database) == []
    database.dispose()


def amounts(http: httpx.Client) -> list[int]:
    rows = http.get("/v1/billing/transactions").json()["transactions"]
    return [row["amount_mils"] for row in reversed(rows)]


def rows(http: httpx.Client, state: str) -> int:
    return int(http.get("/v1/status").json()["models"]["tiny-pusher"][f"{state}_rows"])


def idle(http: httpx.Client) -> bool:
    return rows(http, "running") == rows(http, "queued") == 0


def predict(http: httpx.Client, values: np.ndarray, **options: float) -> httpx.Response:
    return http.post("/v1/predict", files={"frame": png(), "actions": npy(values)}, **options)  # type: ignore[arg-type]


def slow(seconds_per_step: float, seed: int = 0) -> np.ndarray:
    values = actions(seed=seed)
    values[:, SLEEP_S] = seconds_per_step
    return values


@contextlib.contextmanager
def sent(
    http: httpx.Client, path: str, candidates: list[np.ndarray], receive_bytes: int = 2**20, all_but: int = 0
) -> Iterator[socket.socket]:
    """The connection of a request that was sent, `all_but` its last bytes, and whose client hangs up at the end."""
    parts = [("frame", png()), *(("actions", npy(candidate)) for candidate in candidates)]
    request = http.build_request("POST", path, files=parts)
    head = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
    with narrow_connection(request.url.host, request.url.port, receive_bytes) as connection:
        connection.sendall("\r\n".join(head).encode() + request.read()[: -all_but or None])
        yield connection


def narrow_connection(host: str | None, port: int | None, receive_bytes: int) -> socket.socket:
    """One whose kernel takes about so many bytes before it is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect((host, port))
    return connection


def unanswered(connections: list[socket.socket]) -> bool:
    """Fails with the answer if there is one."""
    readable, _, _ = select.select(connections, [], [], 0)
    assert not readable, readable[0].recv(4096)
    return True


@dataclass(frozen=True)
class Widowed:
    """Customers whose ingress was killed, before all else here: leases take their time."""

    in_a_rollout: httpx.Client
    in_a_session: httpx.Client
    session: dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def widowed(stand_in_cluster: Cluster) -> Iterator[Widowed]:
    with (
        stand_in_cluster.http_of(stand_in_cluster.new_customer()) as http,
        stand_in_cluster.http_of(stand_in_cluster.new_customer()) as steering,
    ):
        session = steering.post("/v1/sessions", files={"initial_frame": png()}, data={"model": "tiny-pusher"}).json()
        with (
            connect(session["ws_url"], additional_headers=bearer(steering)) as socket,
            ThreadPoolExecutor(1) as pool,
        ):
            stream(socket, actions(12))
            answer = pool.submit(predict, http, slow(2.0))
            eventually(lambda: amounts(http) == [10_000, -245] and not idle(http))
            (ingress,) = stand_in_cluster.processes("ServeReplica:dream-engine:ingress")
            ingress.kill()
            with contextlib.suppress(httpx.TransportError):  # the connection broke
                assert answer.result(PATIENCE_S).status_code >= 500
            with pytest.raises(ConnectionClosed):
                stream(socket, actions(12))
        eventually(lambda: answers(http), timeout_s=PATIENCE_S)
        # Its grant would hold for 30 s, but its replica stops the chunk and says so.
        eventually(lambda: idle(http), timeout_s=10)
        yield Widowed(http, steering, session)


def bearer(http: httpx.Client) -> dict[str, str]:
    return {"Authorization": http.headers["Authorization"]}


def stream(session: ClientConnection, values: np.ndarray) -> list[dict[str, Any]]:
    """Submit actions to a session, and read up to their end."""
    session.send(json.dumps({"type": "submit_actions", "actions": values.tolist()}))
    messages = [json.loads(session.recv(timeout=PATIENCE_S))]
    while messages[-1]["type"] not in ("rollout_complete", "error"):
        messages.append(json.loads(session.recv(timeout=PATIENCE_S)))
    return messages


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_a_replica_killed_in_the_middle_of_a_rollout_costs_nothing_or_delivers_all_frames(
    stand_in_cluster: Cluster, http: httpx.Client
) -> None:
    (replica,) = stand_in_cluster.processes("model-tiny-pusher")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(predict, http, slow(0.1))
        eventually(lambda: http.get("/v1/status").json()["models"]["tiny-pusher"]["running_rows"] == 1)
        replica.kill()
        response = answer.result(PATIENCE_S)
    if response.status_code == 200:
        assert len(decode(response.content)) == 49
        assert amounts(http) == [10_000, -245]
    else:
        assert response.status_code >= 500
        assert sum(amounts(http)) == 10_000
    assert predict(http, actions(seed=1)).status_code == 200
    eventually(lambda: idle(http))


def test_work_that_kills_every_replica_it_reaches_is_given_up_and_refunded(http: httpx.Client) -> None:
    deadly = actions()
    deadly[12, DIE] = 1
    response = predict(http, deadly)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "ENGINE_FAILED"
    assert amounts(http) == [10_000, -245, 245]
    assert predict(http, actions(seed=2)).status_code == 200


def test_a_model_that_raises_for_one_candidate_of_eight_refunds_the_batch_and_names_the_candidate(
    http: httpx.Client,
) -> None:
    candidates = [actions(seed=seed) for seed in range(8)]
    candidates[5][0, RAISE] = 1
    parts = [("frame", png()), *(("actions", npy(candidate)) for candidate in candidates)]
    response = http.post("/v1/predict/batch", files=parts)
    assert response.status_code == 500
    assert "candidate 5" in response.json()["detail"]
    assert "poisoned" not in response.text
    assert amounts(http) == [10_000, -1_960, 1_960]


def test_a_client_that_hangs_up_within_its_body_is_charged_nothing(http: httpx.Client) -> None:
    with sent(http, "/v1/predict", [actions()], all_but=1_000):
        pass
    assert predict(http, actions(seed=7)).status_code == 200
    assert amounts(http) == [10_000, -245]


def test_a_client_that_hangs_up_is_refunded_and_its_work_leaves_the_replica(http: httpx.Client) -> None:
    eventually(lambda: idle(http), timeout_s=60)  # a killed ingress's grant is held until it times out
    with sent(http, "/v1/predict", [slow(0.5)]) as connection:
        eventually(lambda: unanswered([connection]) and rows(http, "running") == 1 and len(amounts(http)) == 2)
    eventually(lambda: amounts(http) == [10_000, -245, 245])
    eventually(lambda: idle(http))


def test_a_client_that_hangs_up_while_it_is_queued_is_refunded_and_leaves_the_queue(
    stand_in_cluster: Cluster, http: httpx.Client
) -> None:
    """Two batches of 16 are what the replica takes; both give up too, while they run and wait in it."""

    eventually(lambda: idle(http))
    with contextlib.ExitStack() as stack:
        batches = [stack.enter_context(sent(http, "/v1/predict/batch", [slow(0.5, seed)] * 16)) for seed in range(2)]
        eventually(lambda: unanswered(batches) and rows(http, "running") == 32)
        with stand_in_cluster.http_of(stand_in_cluster.new_customer()) as waiting:
            with sent(waiting, "/v1/predict", [actions()]) as connection:
                eventually(lambda: unanswered([*batches, connection]) and rows(http, "queued") == 1)
            eventually(lambda: rows(http, "queued") == 0 and amounts(waiting) == [10_000, -245, 245])
        assert unanswered(batches)
    eventually(lambda: idle(http))
    eventually(lambda: sum(amounts(http)) == 10_000)


def test_a_deadline_that_cannot_be_met_is_answered_504_and_refunded(http: httpx.Client) -> None:
    parts = {"files": {"frame": png(), "actions": npy(slow(0.2))}, "data": {"deadline_ms": "1000"}}
    response = http.post("/v1/predict/batch", **parts)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "DEADLINE_EXCEEDED")
    assert amounts(http) == [10_000, -245, 245]
    eventually(lambda: idle(http))


def test_a_killed_ledger_is_back_without_losing_or_doubling_anything(
    stand_in_cluster: Cluster, http: httpx.Client
) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(predict, http, slow(0.1))
        eventually(lambda: amounts(http) == [10_000, -245])
        (ledger,) = stand_in_cluster.processes("LedgerActor")
        ledger.kill()
        assert predict(http, actions(seed=3)).status_code == 200
        assert running.result(PATIENCE_S).status_code == 200
    assert sorted(amounts(http)) == [-245, -245, 10_000]
    eventually(lambda: idle(http))


def test_a_ledger_whose_database_is_away_for_seconds_comes_back_with_it(
    stand_in_cluster: Cluster, http: httpx.Client
) -> None:
    """Until then nothing runs that is not paid for: 503, and no frame for free."""
    database = stand_in_cluster.data_dir / "ledger.db"
    files = [path for path in stand_in_cluster.data_dir.iterdir() if path.name.startswith("ledger.db")]
    (ledger,) = stand_in_cluster.processes("LedgerActor")
    for path in files:
        path.rename(path.with_name(f"away-{path.name}"))
    database.write_text("not a database " * 1000)
    ledger.kill()
    response = predict(http, actions(seed=5))
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    database.unlink()
    for path in files:
        path.with_name(f"away-{path.name}").rename(path)
    eventually(lambda: predict(http, actions(seed=6)).status_code == 200)
    eventually(lambda: sum(amounts(http)) == 10_000 - 245)  # a reservation that came through late is taken back


def test_a_killed_scheduler_is_back_and_running_rollouts_finish(stand_in_cluster: Cluster, http: httpx.Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(predict, http, slow(0.1))
        eventually(lambda: amounts(http) == [10_000, -245])
        for scheduler in stand_in_cluster.processes("SchedulerActor"):
            scheduler.kill()
        assert running.result(PATIENCE_S).status_code == 200
    assert predict(http, actions(seed=4)).status_code == 200
    assert sum(amounts(http)) == 10_000 - 2 * 245


def test_a_client_that_leaves_a_stream_pays_for_the_frames_that_were_sent(http: httpx.Client) -> None:
    """The first chunk is sent while the second is made, which takes seconds; over Serve's own proxy."""
    values = actions(48)
    values[12:, SLEEP_S] = 0.3
    with http.stream(
        "POST", "/v1/predict", params={"stream": "jpeg"}, files={"frame": png(), "actions": npy(values)}
    ) as answer:
        received = b""
        for part in answer.iter_bytes():
            received += part
            if received.count(b"X-DreamEngine-Frame: ") == 13:
                break
    eventually(lambda: len(amounts(http)) == 3)
    assert amounts(http) == [10_000, -245, 245 - 13 * 5]


def test_a_client_that_takes_nothing_of_a_stream_is_cut_off_and_what_it_did_not_make_way_for_is_never_made(
    stand_in_cluster: Cluster,
) -> None:
    """1,200 pictures of noise are 15 MB. Serve's own proxy would take them all."""
    with (
        stand_in_cluster.http_of(stand_in_cluster.new_customer()) as http,
        sent(http, "/v1/predict?stream=png", [actions(1200)], receive_bytes=2**16),
    ):
        eventually(lambda: len(amounts(http)) == 3)
        *_, refund = amounts(http)
        assert 100 * 5 < 6005 - refund < 900 * 5
        eventually(lambda: idle(http))


def test_a_client_that_reads_nothing_of_a_session_is_closed_and_pays_for_what_was_sent(
    stand_in_cluster: Cluster,
) -> None:
    with stand_in_cluster.http_of(stand_in_cluster.new_customer()) as http:
        envelope = http.post("/v1/sessions", files={"initial_frame": png()}, data={"model": "tiny-pusher"}).json()
        address = urlsplit(envelope["ws_url"])
        with (
            narrow_connection(address.hostname, address.port, receive_bytes=2**16) as raw,
            connect(
                envelope["ws_url"], sock=raw, additional_headers=bearer(http), max_queue=1, close_timeout=0
            ) as session,
        ):
            session.send(json.dumps({"type": "submit_actions", "actions": actions(1200).tolist()}))
            eventually(lambda: len(amounts(http)) == 3)
            *_, refund = amounts(http)
            assert 100 * 5 < 6005 - refund < 900 * 5
        assert http.get(f"/v1/sessions/{envelope['id']}").json()["state"] == "closed"


def test_a_lost_replica_costs_a_session_nothing_but_time(stand_in_cluster: Cluster) -> None:
    """The chunk runs again from the last frame; the same pixels arrive."""
    with stand_in_cluster.http_of(stand_in_cluster.new_customer()) as http:
        envelope = http.post("/v1/sessions", files={"initial_frame": png()}, data={"model": "tiny-pusher"}).json()
        values = actions(24)
        values[12:, SLEEP_S] = 0.5
        levels = []
        with connect(envelope["ws_url"], additional_headers=bearer(http)) as socket:
            assert json.loads(socket.recv())["type"] == "session_started"
            socket.send(json.dumps({"type": "submit_actions", "actions": values.tolist()}))
            while (message := json.loads(socket.recv(timeout=PATIENCE_S)))["type"] != "rollout_complete":
                assert message["type"] in ("frame", "billing"), message
                if message["type"] == "frame":
                    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(message["data"]))))
                    levels.append(int(picture[0, 0, 0]))
                if message["type"] == "frame" and message["index"] == 12:
                    (replica,) = stand_in_cluster.processes("model-tiny-pusher")
                    replica.kill()
        assert [(level - levels[0]) % 256 for level in levels] == list(range(25))
        eventually(lambda: sum(amounts(http)) == 10_000 - 25 * 5)


def test_what_a_killed_ingress_ran_is_refunded_when_its_lease_runs_out(widowed: Widowed) -> None:
    http = widowed.in_a_rollout
    eventually(lambda: amounts(http) == [10_000, -245, 245], timeout_s=60)
    eventually(lambda: idle(http))


def test_a_session_of_a_killed_ingress_is_refunded_whole_and_its_customer_begins_another(widowed: Widowed) -> None:
    """Nobody is left who knows how many of its frames arrived."""
    http = widowed.in_a_session
    eventually(lambda: amounts(http) == [10_000, -6_005, 6_005], timeout_s=60)
    assert http.delete(f"/v1/sessions/{widowed.session['id']}").json()["cost_mils"] == 0
    again = http.post("/v1/sessions", files={"initial_frame": png()}, data={"model": "tiny-pusher"}).json()
    with connect(again["ws_url"], additional_headers=bearer(http)) as session:
        assert stream(session, actions(12))[-1]["frames_streamed_total"] == 13
    eventually(lambda: sum(amounts(http)) == 10_000 - 13 * 5)
