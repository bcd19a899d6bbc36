"""A trace leads from a request to the batches that it ran in, and to whoever shared them."""

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments import tracing
from tests.support.app import SLUG, App
from tests.support.payloads import actions, npy, png


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "TRACER", provider.get_tracer("tests"))
    yield exporter
    provider.shutdown()


async def rollout(app: App, headers: dict[str, str], seed: int = 0) -> str:
    files = {"start_frame": png(), "actions": npy(actions())}
    form = {"params": json.dumps({"model": SLUG, "seed": seed})}
    answer = await app.http.post("/v1/rollouts", headers=headers, files=files, data=form)
    assert answer.status_code == 200
    return answer.headers["X-DreamEngine-Request-Id"]


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def attribute(span: ReadableSpan, name: str) -> object:
    assert span.attributes is not None
    return span.attributes[name]


async def test_every_step_links_to_the_chunk_of_each_request_in_its_batch(
    app: App, recorded: InMemorySpanExporter
) -> None:
    headers, _ = app.key()
    ids = await asyncio.gather(*(rollout(app, headers, seed) for seed in range(3)))
    requests = named(recorded, "POST /v1/rollouts")
    assert {attribute(span, "dream.request_id") for span in requests} == set(ids)
    chunks = {span.context.span_id: span for span in named(recorded, "chunk")}
    assert len(chunks) == 3 * 4
    assert {span.parent.span_id for span in chunks.values() if span.parent} == {
        span.context.span_id for span in requests
    }
    steps = named(recorded, "engine.step")
    linked = [{link.context.span_id for link in step.links} for step in steps]
    assert set().union(*linked) == set(chunks)
    for step, spans in zip(steps, linked, strict=True):
        assert attribute(step, "dream.rows") == len(spans)  # one candidate each
        for span_id in spans:
            chunk = chunks[span_id]
            order = [chunk.start_time, step.start_time, step.end_time, chunk.end_time]
            assert order == sorted(order, key=lambda at: at or 0)
    assert max(map(len, linked)) > 1, "nothing was batched"


async def test_the_reservation_is_part_of_its_request(app: App, recorded: InMemorySpanExporter) -> None:
    headers, _ = app.key()
    await rollout(app, headers)
    (reserve,), (request,) = named(recorded, "reserve"), named(recorded, "POST /v1/rollouts")
    assert reserve.parent is not None
    assert reserve.parent.span_id == request.context.span_id
    assert attribute(request, "http.response.status_code") == 200


async def test_a_clients_own_trace_is_linked_to_and_decides_nothing(app: App, recorded: InMemorySpanExporter) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    for sent in (f"00-{trace_id}-b7ad6b7169203331-01", "rubbish", ""):
        await app.http.get("/healthz", headers={"traceparent": sent})
    spans = named(recorded, "GET /healthz")
    assert [[f"{link.context.trace_id:032x}" for link in span.links] for span in spans] == [[trace_id], [], []]
    assert all(span.parent is None and f"{span.context.trace_id:032x}" != trace_id for span in spans)


async def test_spans_hold_no_key_and_no_customer(app: App, recorded: InMemorySpanExporter) -> None:
    headers, customer_id = app.key()
    await rollout(app, headers)
    await app.http.get("/v1/rollouts/of_mine?key=secret", headers=headers)
    told = " ".join(span.to_json() for span in recorded.get_finished_spans())
    private = (headers["Authorization"].split()[1], customer_id, "secret", "of_mine")
    assert not [each for each in private if each in told]


async def test_without_tracing_rows_carry_nothing(app: App) -> None:
    rows = []
    step = app.model.engine._advance
    app.model.engine._advance = lambda active: (rows.extend(active), step(active))[1]  # type: ignore[method-assign]
    headers, _ = app.key()
    await rollout(app, headers)
    assert rows
    assert {active.job.rows[active.index].traceparent for active in rows} == {""}


def test_tracing_is_off_unless_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    assert tracing.tracer_provider("ingress") is None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert tracing.tracer_provider("ingress") is None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ValueError, match="there are `otlp` and `none`"):
        tracing.tracer_provider("ingress")


def test_spans_are_sent_where_the_standard_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        provider = tracing.tracer_provider("replica")
        assert provider is not None
        provider.get_tracer("tests").start_span("engine.step").end()
        provider.shutdown()
        server.shutdown()
    ((path, body),) = received
    assert path == "/v1/traces"
    assert b"engine.step" in body
    assert b"dream-engine-cluster" in body
