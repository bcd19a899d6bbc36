"""The Grafana dashboard, made from one list of panels; `make dashboard` writes it to `serve_app/config`.

Import it into Grafana and choose the Prometheus that scrapes the cluster's `/metrics`.
"""

import json
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, COLUMNS = 8, 7, 3
"""Of a panel in Grafana's grid of 24 columns."""
BY_MODEL = '{model=~"$model"}'


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str
    """As Grafana names units."""
    queries: tuple[tuple[str, str], ...]
    """Expression and legend."""


def quantiles(metric: str, by: str = "model", where: str = BY_MODEL) -> tuple[tuple[str, str], ...]:
    rate = f"sum by (le, {by}) (rate({metric}_bucket{where}[$__rate_interval]))"
    return tuple((f"histogram_quantile({q}, {rate})", f"{{{{{by}}}}} p{q * 100:g}") for q in (0.5, 0.99))


def rate(metric: str, by: str, where: str = BY_MODEL) -> str:
    return f"sum by ({by}) (rate({metric}{where}[$__rate_interval]))"


def share_of_hits(cache: str) -> str:
    hits = rate(f"dream_{cache}_cache_hits_total", "model")
    return f"{hits} / ({hits} + {rate(f'dream_{cache}_cache_misses_total', 'model')})"


RAN = '{model=~"$model",outcome!="refused"}'

ROWS: dict[str, tuple[Panel, ...]] = {
    "Service": (
        Panel("Rollouts", "reqps", ((rate("dream_rollouts_total", "model, outcome"), "{{model}} {{outcome}}"),)),
        Panel(
            "Error and refund rate",
            "percentunit",
            (
                (
                    rate("dream_rollouts_total", "model", '{model=~"$model",outcome="failed"}')
                    + " / "
                    + rate("dream_rollouts_total", "model", RAN),
                    "{{model}} failed",
                ),
                (
                    rate("dream_rollouts_total", "model", '{model=~"$model",outcome=~"failed|canceled"}')
                    + " / "
                    + rate("dream_rollouts_total", "model", RAN),
                    "{{model}} refunded",
                ),
            ),
        ),
        Panel("Rollout", "s", quantiles("dream_rollout_seconds")),
        Panel("Queue", "s", quantiles("dream_rollout_queue_seconds")),
        Panel("Inference", "s", quantiles("dream_rollout_infer_seconds")),
        Panel("HTTP by status", "reqps", ((rate("dream_http_requests_total", "status", ""), "{{status}}"),)),
        Panel("HTTP by route, p99", "s", quantiles("dream_http_request_seconds", "route", "")[1:]),
        Panel("Parts that do not answer", "none", (("dream_part_up == 0", "{{part}} {{model}}"),)),
        Panel("Versions", "none", (("dream_build_info", "{{version}}"),)),
    ),
    "Money": (
        Panel(
            "Revenue",
            "currencyUSD",
            ((f"3600 * {rate('dream_ledger_captured_mils_total', 'model')} / 10000", "{{model}} per hour"),),
        ),
        Panel(
            "Refunds",
            "currencyUSD",
            ((f"3600 * {rate('dream_ledger_refunded_mils_total', 'model')} / 10000", "{{model}} per hour"),),
        ),
        Panel(
            "Frames billed per GPU-second",
            "none",
            (
                (
                    rate("dream_ledger_frames_billed_total", "model")
                    + " / "
                    + rate("dream_replica_gpu_seconds_total", "model"),
                    "{{model}} per GPU",
                ),
                (
                    rate("dream_ledger_frames_billed_total", "model")
                    + " / "
                    + rate("dream_replica_seconds_total", "model"),
                    "{{model}} per replica",
                ),
            ),
        ),
        Panel("Ledger entries", "ops", ((rate("dream_ledger_entries_total", "kind", ""), "{{kind}}"),)),
        Panel("Ledger commit", "s", quantiles("dream_ledger_commit_seconds", "job", "")),
        Panel("Commands in a commit", "none", quantiles("dream_ledger_commit_commands", "job", "")),
        Panel(
            "Audits",
            "none",
            (
                ("sum by (audit) (dream_ledger_audit_violations) > 0", "{{audit}}"),
                ("dream_ledger_audits_not_finished", "not finished"),
            ),
        ),
        Panel(
            "Age and length of the last audits",
            "s",
            (
                ("time() - dream_ledger_audit_timestamp_seconds", "age"),
                ("dream_ledger_audit_duration_seconds", "length"),
            ),
        ),
        Panel(
            "Stripe",
            "none",
            (
                ("dream_stripe_difference_cents", "difference, cents"),
                ("dream_stripe_inbox_age_seconds", "inbox, seconds"),
            ),
        ),
    ),
    "Capacity": (
        Panel(
            "Headroom in rollouts",
            "reqps",
            (
                (f"dream_headroom_rollouts_per_second{BY_MODEL}", "{{model}} headroom"),
                (f"dream_capacity_rollouts_per_second{BY_MODEL}", "{{model}} capacity"),
            ),
        ),
        Panel("Replicas", "none", ((f"dream_replicas{BY_MODEL}", "{{model}} {{state}}"),)),
        Panel(
            "Cold starts",
            "s",
            (
                *quantiles("dream_replica_boot_seconds"),
                (f"increase(dream_replica_boot_seconds_sum{BY_MODEL}[1h])", "{{model}} spent in an hour"),
            ),
        ),
        Panel(
            "Queue by class",
            "none",
            (
                (f"dream_scheduler_queued_rows{BY_MODEL}", "{{model}} {{service_class}} rows"),
                (f"dream_scheduler_queued_row_steps{BY_MODEL}", "{{model}} {{service_class}} row-steps"),
            ),
        ),
        Panel("Grant, p99", "s", quantiles("dream_scheduler_grant_seconds", "service_class")[1:]),
        Panel(
            "Chunks without a grant",
            "ops",
            ((rate("dream_scheduler_refusals_total", "service_class, reason"), "{{service_class}} {{reason}}"),),
        ),
    ),
    "Engine": (
        Panel("Step", "s", quantiles("dream_engine_step_seconds")),
        Panel("Rows in a forward", "none", quantiles("dream_engine_step_rows")),
        Panel(
            "How full batches are",
            "percentunit",
            (
                (
                    rate("dream_engine_step_rows_sum", "model") + " / " + rate("dream_engine_places_total", "model"),
                    "{{model}}",
                ),
            ),
        ),
        Panel(
            "Rows running and places",
            "none",
            (
                (f"dream_scheduler_running_rows{BY_MODEL}", "{{model}} running"),
                (f"dream_scheduler_capacity_rows{BY_MODEL}", "{{model}} places"),
            ),
        ),
        Panel(
            "Trouble",
            "ops",
            (
                (rate("dream_engine_rows_failed_total", "model"), "{{model}} rows failed"),
                (rate("dream_engine_bisections_total", "model"), "{{model}} halved"),
                (rate("dream_engine_out_of_memory_total", "model"), "{{model}} out of memory"),
            ),
        ),
        Panel(
            "Caches",
            "percentunit",
            (
                (share_of_hits("latent"), "{{model}} start frames known"),
                (share_of_hits("context"), "{{model}} contexts known"),
            ),
        ),
        Panel(
            "Caches, size",
            "bytes",
            (
                (f"dream_latent_cache_bytes{BY_MODEL}", "{{model}} start frames"),
                (f"dream_context_cache_bytes{BY_MODEL}", "{{model}} contexts"),
            ),
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": WIDTH * COLUMNS, "h": 1},
            }
        )
        for index, panel in enumerate(members):
            place = {"x": index % COLUMNS * WIDTH, "y": y + 1 + index // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(_panel(len(panels) + 1, panel, place))
        y += 1 + -(-len(members) // COLUMNS) * HEIGHT
    return {
        "uid": "dream-engine-cluster",
        "title": "Dream Engine Cluster",
        "tags": ["dream-engine"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                {
                    "name": "model",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": "label_values(dream_replicas, model)",
                    "includeAll": True,
                    "multi": True,
                    "refresh": 2,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def _panel(panel_id: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": panel_id,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
