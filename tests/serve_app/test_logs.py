"""What is logged can be found by a request's id, and gives nothing away."""

import json
from typing import Any

import pytest
import structlog

from deployments.logs import configure_logs
from tests.support.app import SLUG, App
from tests.support.payloads import actions, npy, png


def lines(captured: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in captured.splitlines() if line.startswith("{")]


async def test_whatever_a_failing_request_logs_has_its_id_and_no_secret(
    app: App, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs()
    try:
        monkeypatch.setattr(app.model.model, "step", lambda rows: 1 / 0)
        headers, _ = app.key()
        answer = await app.http.post(
            "/v1/rollouts",
            headers=headers,
            files={"start_frame": png(), "actions": npy(actions())},
            data={"params": json.dumps({"model": SLUG})},
        )
        await app.http.get("/v1/rollouts/x/video?expires=1&signature=5ec12e7", headers=headers)
    finally:
        structlog.reset_defaults()
    assert answer.status_code == 500
    told = capsys.readouterr().err
    logged = lines(told)
    mine = [line for line in logged if line.get("request_id") == answer.headers["X-DreamEngine-Request-Id"]]
    assert {"row_failed", "request"} <= {line["event"] for line in mine}
    assert all("request_id" in line and "timestamp" in line and "level" in line for line in logged)
    assert "5ec12e7" not in told
    assert headers["Authorization"].split()[1] not in told
