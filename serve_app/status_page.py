"""The public status page: one HTML document without scripts, fonts or anything else to fetch."""

from collections.abc import Mapping
from html import escape

from serve_app.schemas import LatencyQuarter, ModelStatus, Status

REFRESH_S = 30
WIDTH, HEIGHT = 480, 48
"""Of a sparkline, in pixels."""
QUARTERS_PER_DAY = 96
BAR_WIDTH = WIDTH / QUARTERS_PER_DAY - 1
QUARTER_S = 900.0

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#1d2330;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin:2rem 0 .3rem}
table{border-collapse:collapse;width:100%}th,td{text-align:right;padding:.15rem .5rem;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}th{font-weight:600;border-bottom:1px solid #ccd}
.operational{color:#0a7d3c}.degraded_performance{color:#a86400}.major_outage{color:#b3261e}
svg{display:block;margin:.5rem 0;background:#f5f6f9}p{margin:.3rem 0}small{color:#5b6478}
@media(prefers-color-scheme:dark){body{color:#e4e7ee;background:#14171e}svg{background:#1d222c}th{border-color:#343b49}}
"""
WORDS = {"operational": "operational", "degraded_performance": "degraded", "major_outage": "not available"}


def status_page(status: Status, health: Mapping[str, str]) -> str:
    """`health` gives each model's state in Statuspage's words."""
    sections = "".join(_section(slug, model, health[slug]) for slug, model in status.models.items())
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<meta http-equiv=refresh content={REFRESH_S}>"
        f"<title>Dream Engine Cluster: status</title><style>{STYLE}</style></head><body>"
        f"<h1>Dream Engine Cluster</h1><p>Ledger: audits {escape(status.ledger.audits)}. "
        f"<small>Version {escape(status.version)}, up {_duration(status.uptime_s)}.</small></p>"
        f"{sections}</body></html>"
    )


def _section(slug: str, model: ModelStatus, health: str) -> str:
    booting = "?" if model.booting_replicas is None else str(model.booting_replicas)
    rates = "".join(
        f"<tr><td>last {escape(name)}</td><td>{rate.requests:,}</td><td>{rate.error_rate:.2%}</td>"
        f"<td>{rate.refund_rate:.2%}</td></tr>"
        for name, rate in model.rates.items()
    )
    times = "".join(
        f"<tr><td>{name}</td><td>{each.p50:,.0f} ms</td><td>{each.p90:,.0f} ms</td><td>{each.p99:,.0f} ms</td></tr>"
        for name, each in (("queue", model.queue_ms), ("inference", model.infer_ms), ("whole request", model.total_ms))
        if each is not None
    )
    return (
        f"<h2>{escape(slug)} <span class={health}>{WORDS[health]}</span></h2>"
        f"<p>{model.replicas} replicas serve, {booting} start; {model.utilisation:.0%} busy, "
        f"{model.queued_rows} candidates wait. {_headroom(model)}"
        f"<small>A replica that is asked for now serves in about {model.cold_start_s:,.0f} s.</small></p>"
        f"{sparkline(model.quarters)}"
        f"<table><tr><th>latency, last 24 h<th>p50<th>p90<th>p99</tr>{times}</table>"
        f"<table><tr><th>outcomes<th>requests<th>errors<th>refunds</tr>{rates}</table>"
    )


def _headroom(model: ModelStatus) -> str:
    if model.headroom_rollouts_per_s is None or model.capacity_rollouts_per_s is None:
        return ""
    return f"Room for {model.headroom_rollouts_per_s:,.1f} of {model.capacity_rollouts_per_s:,.1f} rollouts a second. "


def sparkline(quarters: list[LatencyQuarter]) -> str:
    """p50 and p99 of the whole request by quarters of an hour, as an SVG; a gap where nobody asked."""
    measured = [(each.started_at, each.total_ms) for each in quarters if each.total_ms is not None]
    if not measured:
        return "<p><small>No requests in the last 24 hours.</small></p>"
    newest = measured[-1][0]
    highest = max(times.p99 for _, times in measured) or 1.0
    bars = []
    for started_at, times in measured:
        x = WIDTH - (1 + (newest - started_at) / QUARTER_S) * WIDTH / QUARTERS_PER_DAY
        for value, colour in ((times.p99, "#9db4dd"), (times.p50, "#3465a4")):
            height = max(1.0, HEIGHT * value / highest)
            place = f'x="{x:.1f}" y="{HEIGHT - height:.1f}" width="{BAR_WIDTH:.1f}" height="{height:.1f}"'
            bars.append(f'<rect {place} fill="{colour}"/>')
    label = f"latency of the last 24 hours, p50 and p99, highest {highest:,.0f} ms"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" height="{HEIGHT}" preserveAspectRatio="none" role="img"'
        f' aria-label="{label}">{"".join(bars)}</svg><p><small>{label}</small></p>'
    )


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min"
