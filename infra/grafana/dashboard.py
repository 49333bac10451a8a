"""The dashboard as code: `python -m infra.grafana.dashboard` writes dashboard.json beside this file (`make dashboard`).

What Grafana reads is made by its own builders, of the version for Grafana 10.1, whose dashboards later ones read. Here
stand the questions that the panels ask, and what each of them means. A row of the dashboard is `ROWS`' entry; panels
lie from left to right, 24 columns wide, in lines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TimeZoneBrowser,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

FILE = Path(__file__).with_name("dashboard.json")
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_STAT_HEIGHT, _SERIES_HEIGHT = 5, 8
RUN = '{run=~"$run"}'
FAILURES = "ray_neg_shard_failures_total" + RUN


@dataclass(frozen=True)
class Panel:
    """A question, or several, with the unit of the answers; `asked` are expressions with their legends.

    A number is the last value where it is not a line over time. red_from: from which value on a number is red.
    """

    title: str
    meaning: str
    unit: str
    width: int
    asked: Sequence[tuple[str, str]]
    is_number: bool = False
    is_stacked: bool = False
    is_instant: bool = False
    most: float | None = None
    red_from: float | None = None
    shows_name: bool = False


def number(
    title: str, meaning: str, unit: str, width: int, expression: str, legend: str = "{{run}}", **more: Any
) -> Panel:
    """A panel of one number for each run."""
    return Panel(title, meaning, unit, width, [(expression, legend)], is_number=True, **more)


def line(title: str, meaning: str, unit: str, width: int, *asked: tuple[str, str], **more: Any) -> Panel:
    """A panel of lines over time."""
    return Panel(title, meaning, unit, width, asked, **more)


def per_second(metric: str) -> tuple[str, str]:
    """The pace of a total, for each run."""
    return f"sum by (run) (rate({metric}{RUN}[5m]))", "{{run}}"


def hours(metric: str) -> str:
    """Hours that a run has spent, over its drivers heard of in the time looked at: each counts since it began."""
    return f"sum by (run) (max_over_time({metric}{RUN}[$__range])) / 3600"


def slowest(share: float) -> str:
    """The seconds that this share of shards did not exceed."""
    return f"histogram_quantile({share}, sum by (le) (rate(ray_neg_shard_seconds_bucket{RUN}[10m])))"


ROWS: dict[str, list[Panel]] = {
    "How far": [
        number(
            "Done",
            "Share of the shards of this start that are stored. A start counts only what was not done before it.",
            "percentunit", 4,
            'sum by (run) (ray_neg_shards{run=~"$run",state="done"}) / sum by (run) (ray_neg_shards{run=~"$run"})',
            most=1,
        ),
        number(
            "Time left",
            "At the pace since the first replica was ready, as the driver tells it; nothing before the first shard "
            "is done.",
            "s", 4, f"min by (run) (ray_neg_seconds_left{RUN})",
        ),
        number(
            "Replicas that are ready", "Replicas with a loaded and checked model.",
            "none", 4, 'sum by (run) (ray_neg_replicas{run=~"$run",state="ready"})',
        ),
        number(
            "Shards failed", "Shards that were given up after failing too often; the run's end names their errors.",
            "none", 4, 'sum by (run) (ray_neg_shards{run=~"$run",state="failed"})', red_from=1,
        ),
        number(
            "Driver last heard of",
            "How long ago; it says so every second or so while it works. Nothing when the run has ended.",
            "s", 4, f"time() - max by (run) (ray_neg_heartbeat_timestamp_seconds{RUN})",
        ),
        number(
            "Last shard stored",
            "How long ago, in this start; nothing before the first one, and when the run has ended.",
            "s", 4, f"time() - max by (run) (ray_neg_last_shard_timestamp_seconds{RUN})",
        ),
        number(
            "Left undone",
            "Shards that were not done when the run was last heard of, within a week: of runs that work, were left, "
            "or ended with shards given up.",
            "none", 12, f"last_over_time(neg:shards_left{RUN}[7d]) > 0", is_instant=True,
        ),
        number(
            "Versions", "What the driver runs with: this package, Ray, torch, transformers, Python.",
            "none", 12,
            f"max by (run, version, ray, torch, transformers, python) (ray_neg_build_info{RUN})",
            "{{run}}: {{version}}, ray {{ray}}, torch {{torch}}, transformers {{transformers}}, python {{python}}",
            shows_name=True,
        ),
    ],
    "What is done": [
        line(
            "Prompts a second", "Prompts that were measured and stored.",
            "reqps", 8, per_second("ray_neg_prompts_total"),
        ),
        line(
            "Neurons a second", "Neurons measured, counted anew for each prompt.",
            "ops", 8, per_second("ray_neg_neurons_total"),
        ),
        line(
            "Interventions or gradients a second",
            "Rows that ran through layers: one for each intervention of a sweep, one for each target of NeurGrad.",
            "ops", 8, per_second("ray_neg_rows_total"),
        ),
        line(
            "Shards by state", "Of this start: waiting, under way, done, failed.",
            "none", 8, (f"sum by (state) (ray_neg_shards{RUN})", "{{state}}"), is_stacked=True,
        ),
        line(
            "Seconds a shard",
            "From when a replica was asked for a shard to when it was stored; two are in flight each, so this is about "
            "twice the time of computing.",
            "s", 8, (slowest(0.5), "median"), (slowest(0.95), "slowest of twenty"),
        ),
        line(
            "Pace, of that of the best hour",
            "Prompts a second, over those of the best hour of the last six: a quarter and less, for long, is an alert.",
            "percentunit", 8,
            (
                f"sum by (run) (rate(ray_neg_prompts_total{RUN}[10m])) / on (run) "
                f"max_over_time(sum by (run) (rate(ray_neg_prompts_total{RUN}[1h]))[6h:10m])",
                "{{run}}",
            ),
        ),
    ],
    "What goes wrong": [
        line(
            "Shards that came back undone, an hour",
            "By what was done about it: tried again, in smaller batches, on another replica, moved from a node that is "
            "gone, or quarantined.",
            "none", 8,
            (
                f"sum by (action) ((increase({FAILURES}[1h]) and last_over_time({FAILURES}[1h] offset 1h)) "
                f"or ({FAILURES} unless last_over_time({FAILURES}[1h] offset 1h)))",
                "{{action}}",
            ),
        ),
        line(
            "Replicas", "Ready, and starting: loading a model, or waiting for room in the cluster.",
            "none", 8, (f"sum by (state) (ray_neg_replicas{RUN})", "{{state}}"), is_stacked=True,
        ),
        line(
            "Waiting for storage",
            "Share of a replica's time in which it computed nothing because parts were being put; 1 while the store "
            "is away.",
            "percentunit", 8,
            (
                f"sum by (run) (rate(ray_neg_storage_wait_seconds_total{RUN}[5m])) / on (run) "
                '(sum by (run) (ray_neg_replicas{run=~"$run",state="ready"}) > 0)',
                "{{run}}",
            ),
            most=1,
        ),
    ],
    "What it costs": [
        number(
            "GPU-hours", "GPUs that replicas held, times hours: of starts heard of in the time looked at, as a whole.",
            "none", 8, hours("ray_neg_gpu_seconds_total"), is_instant=True,
        ),
        number(
            "CPU-hours", "CPUs that replicas held, times hours: of starts heard of in the time looked at, as a whole.",
            "none", 8, hours("ray_neg_cpu_seconds_total"), is_instant=True,
        ),
        number(
            "Spent on shards that are stored",
            "Share of what replicas held in which they computed such shards; the rest went into loading, waiting, and "
            "what was lost.",
            "percentunit", 8,
            f"{hours('ray_neg_computed_cpu_seconds_total')} / ({hours('ray_neg_cpu_seconds_total')})",
            most=1, is_instant=True,
        ),
    ],
    "Machines": [
        line("Bytes to storage", "Parts put, after compression.", "Bps", 8, per_second("ray_neg_stored_bytes_total")),
        line(
            "GPUs in use", "Of all GPUs of the cluster, by Ray's own measurement; empty where there is none.",
            "percent", 8, ("avg(ray_node_gpus_utilization)", "mean"), ("min(ray_node_gpus_utilization)", "least"),
            most=100,
        ),
        line("Memory of nodes", "Used memory of each node.", "bytes", 8, ("ray_node_mem_used", "{{ip}}")),
    ],
}  # fmt: skip


def built() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    made = (
        dashboard.Dashboard("neg_service")
        .uid("neg-service")
        .description("Runs of neg_service on a Ray cluster: how far, how fast, and what goes wrong.")
        .tags(["neg_service", "ray"])
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-6h", "now")
        .timezone(TimeZoneBrowser)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_run_variable())
    )
    ids = count(1)
    for title, panels in ROWS.items():
        made = made.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels:
            made = made.with_panel((_number(panel) if panel.is_number else _line(panel)).id(next(ids)))
    found: dict[str, Any] = json.loads(JSONEncoder(sort_keys=True).encode(made.build()))
    return found


def text() -> str:
    """What stands in the file."""
    return json.dumps(built(), indent=1, ensure_ascii=False) + "\n"


def _run_variable() -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable("run")
        .label("Run")
        .datasource(_SOURCE)
        .query({"query": "label_values(ray_neg_shards, run)", "refId": "runs"})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_DESC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _number(panel: Panel) -> stat.Panel:
    made = (
        stat.Panel()
        .height(_STAT_HEIGHT)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields(""))
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.NONE if panel.is_instant or panel.shows_name else BigValueGraphMode.AREA)
    )
    if panel.shows_name:
        made = made.text_mode(BigValueTextMode.NAME)
    steps = [Threshold(color="green")]
    if panel.red_from is not None:
        steps.append(Threshold(color="red", value=panel.red_from))
    made = made.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    return _asking(made, panel)


def _line(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .height(_SERIES_HEIGHT)
        .fill_opacity(60 if panel.is_stacked else 10)
        .line_width(1)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if panel.is_stacked:
        made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    return _asking(made, panel)


def _asking(made: Any, panel: Panel) -> Any:
    """What panels of all kinds have; the builders of each kind share no type."""
    made = made.title(panel.title).description(panel.meaning).unit(panel.unit).span(panel.width).min(0)
    made = made.datasource(_SOURCE)
    if panel.most is not None:
        made = made.max(panel.most)
    for letter, (expression, legend) in zip("ABC", panel.asked, strict=False):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter).datasource(_SOURCE)
        made = made.with_target(query.instant() if panel.is_instant else query)
    return made


if __name__ == "__main__":
    FILE.write_text(text())
