"""OpenTelemetry traces: a request's spans in the ingress, and the engine's steps, linked to what they ran for.

Off, and next to nothing, unless the environment says `OTEL_TRACES_EXPORTER=otlp`; the SDK reads the rest of the
standard `OTEL_*` variables itself. Spans hold ids and numbers: no key, no payload, no customer.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanContext, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

TRACER: Tracer | None = None
"""This process's, once `configure_tracing` has turned tracing on."""
_OFF = nullcontext[Span](INVALID_SPAN)
_PROPAGATOR = TraceContextTextMapPropagator()
_HEADER = "traceparent"

Attribute = str | int | float | bool


def configure_tracing(process: str) -> None:
    """Once per process. Raises as `tracer_provider` does."""
    global TRACER
    provider = tracer_provider(process)
    if provider is not None:
        TRACER = provider.get_tracer("dream-engine-cluster")


def tracer_provider(process: str) -> "TracerProvider | None":
    """None unless tracing is on.

    Raises:
        ValueError: the environment asks for an exporter that there is not.
        ImportError: the exporter is not installed.
    """
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "none") or "none"
    if exporter == "none":
        return None
    if exporter != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER={exporter}: there are `otlp` and `none`")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ImportError("OTEL_TRACES_EXPORTER=otlp: install the exporter with pip install '.[trace]'") from None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "dream-engine-cluster"}
    provider = TracerProvider(resource=Resource.create({**name, "dream.process": process}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def span(name: str, attributes: Mapping[str, Attribute]) -> AbstractContextManager[Span]:
    """Current while it lasts. What is raised in it is its status; the text of it may name what a span must not."""
    if TRACER is None:
        return _OFF
    return TRACER.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    )


def request_span(request_id: str, client_traceparent: str) -> AbstractContextManager[Span]:
    """Of a request from outside: a trace of its own, so that no client decides what is sampled, linked to its own."""
    if TRACER is None:
        return _OFF
    return TRACER.start_as_current_span(
        "request",
        kind=SpanKind.SERVER,
        attributes={"dream.request_id": request_id},
        links=_links([client_traceparent]),
        record_exception=False,
        set_status_on_exception=False,
    )


def traceparent() -> str:
    """Names the current span for another process; empty where there is none, or nobody records it."""
    if TRACER is None or not trace.get_current_span().is_recording():
        return ""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier[_HEADER]


def record_step(traceparents: Iterable[str], started_ns: int, ended_ns: int, rows: int) -> None:
    """One forward of the engine, with a link to each chunk that had rows in it. `*_ns` are POSIX."""
    if TRACER is None:
        return
    links = _links(dict.fromkeys(traceparents))
    if links:
        step = TRACER.start_span("engine.step", links=links, start_time=started_ns, attributes={"dream.rows": rows})
        step.end(ended_ns)


def _links(traceparents: Iterable[str]) -> list[Link]:
    return [Link(context) for each in traceparents if each and (context := _context_of(each)).is_valid]


def _context_of(traceparent: str) -> SpanContext:
    return trace.get_current_span(_PROPAGATOR.extract({_HEADER: traceparent})).get_span_context()
