"""An evaluation's results as files: a parquet table, what could not be used, a summary, a page with plots and clips."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.jobs.records import Record, write_whole

CLIPS = 9
"""Shown of each: the worst, the middle, the best."""
WIDTH, HEIGHT = 640, 220
BOOTSTRAPS = 2_000
HORIZONS = (1, 12, 24, 48, 96, 192, 384, 768)
METRICS = ("psnr_db", "copy_first_psnr_db", "ssim", "lpips")
TITLES = {"psnr_db": "PSNR, dB", "copy_first_psnr_db": "of the start frame", "ssim": "SSIM", "lpips": "LPIPS"}
TICKS = 4
COLOURS = ("#3465a4", "#c4562a", "#5b8a3c")

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2330}
table{border-collapse:collapse}th,td{text-align:right;padding:.15rem .7rem;font-variant-numeric:tabular-nums}
th{border-bottom:1px solid #ccd}td:first-child,th:first-child{text-align:left}
figure{display:inline-block;margin:.3rem}video{width:256px;image-rendering:pixelated}figcaption{font-size:.8rem}
"""


def write_report(out: Path, found: Mapping[str, Sequence[Record]], asked: Mapping[str, int], model: str) -> Path:
    """`found` has one set of records, or two to compare, of so many episodes as were `asked` for; returns the page."""
    import pyarrow
    from pyarrow import parquet

    out.mkdir(parents=True, exist_ok=True)
    rows = [{"policy": name, **asdict(record)} for name, records in found.items() for record in records]
    good = [row for row in rows if row["status"] == "ok"]
    schema = None if good else pyarrow.schema([("policy", pyarrow.string()), ("episode_id", pyarrow.string())])
    table = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(good, schema=schema), table)
    write_whole(out / "episodes.parquet", table.getvalue())
    bad = [{key: row[key] for key in ("policy", "episode_id", "reason")} for row in rows if row["status"] == "bad"]
    write_whole(out / "bad.jsonl", "".join(json.dumps(row) + "\n" for row in bad))
    summary = summarise(found, asked)
    write_whole(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_whole(out / "table.md", _markdown(summary, model))
    page = out / "report.html"
    write_whole(page, _page(found, summary, bad, model))
    return page


def summarise(found: Mapping[str, Sequence[Record]], asked: Mapping[str, int]) -> dict[str, Any]:
    """Means over episodes of each episode's mean over frames; at a horizon, over its frames up to there, of those
    episodes that are so long."""
    summary: dict[str, Any] = {}
    for name, records in found.items():
        good = [record for record in records if record.status == "ok"]
        figures: dict[str, Any] = {
            "episodes": len(good),
            "bad": sum(record.status == "bad" for record in records),
            "left": asked[name] - len(records),
            "frames": sum(record.num_frames for record in good),
            "cost_usd": round(sum(record.cost_usd for record in records), 4),
            **_metrics(good),
        }
        scores = [record.score for record in good if record.score is not None]
        if scores:
            figures["score"] = _mean_and_error(np.array(scores))
        lengths = [len(record.psnr_db) for record in good]
        figures["horizons"] = {
            str(horizon): {"episodes": sum(length >= horizon for length in lengths), **_metrics(good, horizon)}
            for horizon in HORIZONS
            if horizon <= max(lengths, default=0)
        }
        summary[name or "dataset"] = figures
    if len(found) == 2:
        summary["comparison"] = compare(*found.values())
    return summary


def _metrics(records: Sequence[Record], horizon: int | None = None) -> dict[str, dict[str, float]]:
    figures = {}
    for metric in METRICS:
        values = [
            np.mean(each[:horizon])
            for record in records
            if (each := getattr(record, metric)) and len(each) >= (horizon or 1)
        ]
        if values:
            figures[metric] = _mean_and_error(np.array(values))
    return figures


def compare(first: Sequence[Record], second: Sequence[Record]) -> dict[str, Any]:
    """Paired over the episodes that both have. The interval is a percentile bootstrap over episodes; `p_value` says how
    often differences of these sizes and random signs have so large a mean."""
    others = {record.episode_id: record.score for record in second if record.score is not None}
    pairs = [
        (each.score, others[each.episode_id]) for each in first if each.score is not None and each.episode_id in others
    ]
    if not pairs:
        return {"episodes": 0}
    differences = np.array([a - b for a, b in pairs])
    random, mean = np.random.default_rng(0), differences.mean()
    draws = [differences[random.integers(0, len(pairs), len(pairs))].mean() for _ in range(BOOTSTRAPS)]
    low, high = np.percentile(draws, (2.5, 97.5))
    flipped = [abs((differences * random.choice((-1, 1), len(pairs))).mean()) for _ in range(BOOTSTRAPS)]
    as_large = sum(each >= abs(mean) - 1e-12 for each in flipped)
    return {
        "episodes": len(pairs),
        "mean_difference": round(float(mean), 5),
        "interval_95": [round(float(low), 5), round(float(high), 5)],
        "p_value": round((1 + as_large) / (1 + BOOTSTRAPS), 5),
        "first_higher": int((differences > 0).sum()),
        "second_higher": int((differences < 0).sum()),
    }


def _mean_and_error(values: NDArray[np.float64]) -> dict[str, float]:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": round(float(values.mean()), 4), "standard_error": round(float(error), 4)}


def _page(found: Mapping[str, Sequence[Record]], summary: Mapping[str, Any], bad: Sequence[Any], model: str) -> str:
    plots = "".join(
        f"<h2>{title}</h2>{_plot({name: _by_frame(records, metric) for name, records in found.items()})}"
        for metric, title in (
            ("psnr_db", "PSNR by frame, dB (dashed: the start frame shown all the time)"),
            ("ssim", "SSIM by frame"),
            ("lpips", "LPIPS by frame"),
        )
        if any(record.status == "ok" and getattr(record, metric) for records in found.values() for record in records)
    )
    unusable = "".join(f"<li>{escape(row['episode_id'])}: {escape(row['reason'])}</li>" for row in bad[:100])
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation of {escape(model)}</title>"
        f"<style>{STYLE}</style><h1>Evaluation of {escape(model)}</h1>{_facts(summary)}{_table(summary)}{plots}"
        f"<h2>Clips: recorded beside generated</h2>{''.join(_clips(name, records) for name, records in found.items())}"
        f"<h2>Episodes that could not be used: {len(bad)}</h2><ul>{unusable}</ul></html>"
    )


def _facts(summary: Mapping[str, Any]) -> str:
    lines = []
    for name, figures in summary.items():
        if name == "comparison":
            continue
        done, bad, left = figures["episodes"], figures["bad"], figures["left"]
        score = f"; score {_shown(figures['score'])}" if "score" in figures else ""
        lines.append(
            f"{escape(name)}: {done} episodes, {bad} that could not be used, {left} left; {figures['frames']} frames, "
            f"${figures['cost_usd']:.4f}{score}"
        )
    compared = summary.get("comparison", {"episodes": 0})
    if compared["episodes"]:
        first, second = (escape(name) for name in list(summary)[:2])
        low, high = compared["interval_95"]
        lines.append(
            f"<b>{first} scores {compared['mean_difference']:+g} against {second}</b> (95% interval {low:+g} to "
            f"{high:+g}, p = {compared['p_value']:g}) over {compared['episodes']} episodes that both have: higher in "
            f"{compared['first_higher']}, lower in {compared['second_higher']}"
        )
    return "".join(f"<p>{line}.</p>" for line in lines)


def _table(summary: Mapping[str, Any]) -> str:
    columns, rows = _means(summary)
    head = "".join(f"<th>{TITLES[metric]}" for metric in columns)
    body = "".join(
        f"<tr><td>{escape(title)}<td>{episodes}{''.join(f'<td>{cell}' for cell in cells)}</tr>"
        for title, episodes, cells in rows
    )
    return f"<table><tr><th>mean ± standard error<th>episodes{head}</tr>{body}</table>"


def _markdown(summary: Mapping[str, Any], model: str) -> str:
    """For `docs/RESULTS.md`."""
    columns, rows = _means(summary)
    lines = [f"| {model} | episodes | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    lines += [f"| {title} | {episodes} | {' | '.join(cells)} |" for title, episodes, cells in rows]
    if "comparison" in summary:
        lines += ["", *(f"- {key}: {value}" for key, value in summary["comparison"].items())]
    return "\n".join(lines) + "\n"


def _means(summary: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, int, list[str]]]]:
    """The metrics that there are; and a row for each horizon and for all frames: title, episodes, a cell per metric."""
    columns = [metric for metric in METRICS if any(metric in figures for figures in summary.values())]
    rows = []
    for name, figures in summary.items():
        if "horizons" not in figures:
            continue
        titled = {f"{name}, frames 1 to {horizon}": each for horizon, each in figures["horizons"].items()}
        for title, each in (titled | {f"{name}, all frames": figures}).items():
            rows.append(
                (title, each["episodes"], [_shown(each[metric]) if metric in each else "" for metric in columns])
            )
    return columns, rows


def _shown(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']} ± {figure['standard_error']}"


def _by_frame(records: Sequence[Record], metric: str) -> tuple[list[float], list[float]]:
    """Means by frame over the episodes that are so long; and, for PSNR, of the start frame shown all the time."""
    good = [record for record in records if record.status == "ok"]
    lines = []
    for each in (metric, f"copy_first_{metric}"):
        values = [series for record in good if (series := getattr(record, each, None))]
        longest = max(map(len, values), default=0)
        lines.append([float(np.mean([v[frame] for v in values if len(v) > frame])) for frame in range(longest)])
    return lines[0], lines[1]


def _plot(series: Mapping[str, tuple[list[float], list[float]]]) -> str:
    values = [value for lines in series.values() for line in lines for value in line]
    low, high = min(values), max(values)
    longest = max(len(line) for lines in series.values() for line in lines)
    span = high - low or 1.0

    across, up = (WIDTH - 50) / max(longest - 1, 1), (HEIGHT - 40) / span

    def points(line: Sequence[float]) -> str:
        return " ".join(
            f"{40 + index * across:.1f},{HEIGHT - 20 - (value - low) * up:.1f}" for index, value in enumerate(line)
        )

    drawn = ""
    for (name, (line, baseline)), colour in zip(series.items(), COLOURS, strict=False):
        drawn += f'<polyline points="{points(line)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        drawn += f'<polyline points="{points(baseline)}" fill="none" stroke="{colour}" stroke-dasharray="4"/>'
        drawn += (
            f'<text x="{WIDTH - 120}" y="{15 + 15 * list(series).index(name)}" fill="{colour}">{escape(name)}</text>'
        )
    axes = ""
    for tick in range(TICKS + 1):
        y, x = HEIGHT - 20 - tick / TICKS * (HEIGHT - 40), 40 + tick / TICKS * (WIDTH - 50)
        axes += f'<path d="M40 {y:.1f}H{WIDTH - 10}" stroke="#dde"/>'
        axes += f'<text y="{y + 4:.1f}">{low + tick / TICKS * span:.4g}</text>'
        frame = 1 + round(tick / TICKS * (longest - 1))
        axes += f'<text x="{x:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{frame}</text>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="11">{axes}{drawn}</svg>'


def _clips(name: str, records: Sequence[Record]) -> str:
    good = sorted((record for record in records if record.clip), key=lambda record: float(np.mean(record.psnr_db)))
    third = CLIPS // 3
    worst, rest = good[:third], good[third:]
    best_from = max(0, len(rest) - third)
    best, rest = rest[best_from:], rest[:best_from]
    middle_from = max(0, (len(rest) - third) // 2)
    shown = {"worst": worst, "middle": rest[middle_from : middle_from + third], "best": best}
    prefix = f"{escape(name)}/" if name else ""
    return "".join(
        f'<figure><video src="{prefix}{escape(record.clip)}" autoplay loop muted playsinline></video><figcaption>'
        f"{escape(name)} {which}: {escape(record.episode_id)}, {np.mean(record.psnr_db):.1f} dB</figcaption></figure>"
        for which, chosen in shown.items()
        for record in chosen
    )
