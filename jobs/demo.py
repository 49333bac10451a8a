"""python -m jobs.demo: a scan of the facts, then what a person wants to see first: neurons, and a plot.

Takes the same settings as `jobs.scan`.
"""

from __future__ import annotations

from omegaconf import DictConfig

from jobs.entry import EXIT_INCOMPLETE, start
from jobs.scan import describe_plan, describe_summary
from neg_service.cluster.scan import prepare, run
from neg_service.config import ScanConfig, typed
from neg_service.report.console import columns, strongest
from neg_service.report.plots import neurgrad_over_layers
from neg_service.storage.reader import Run, open_run

EXAMPLES = ("capital/0/France", "opposite/0/hot", "next-month/0/March")
PLOT = "plots/neurgrad_over_layers.png"


def demo(config: DictConfig) -> int:
    """Scan, then show the strongest neurons of a few facts and plot their strength over layers."""
    prepared = prepare(typed(ScanConfig, config))
    if prepared.config.job.dry_run:
        print(describe_plan(prepared))
        return 0
    summary = run(prepared)
    print(describe_summary(prepared, summary))
    results = open_run(summary.uri, prepared.config.storage.endpoint_url)
    if "neurgrad" not in results.tables:
        print("no examples and no plot: they need measure.keep=all")
        return EXIT_INCOMPLETE if summary.set_aside else 0
    stored = set(results.table("prompts").to_table(columns=["prompt_id"])["prompt_id"].to_pylist())
    kept = [prompt for prompt in prepared.prompts if prompt.id in stored]
    for prompt in [p for p in kept if p.id in EXAMPLES] or kept[:3]:
        answer = prompt.targets[prompt.answer or 0]
        print(f"\n{prompt.text!r} -> {answer!r}: its strongest neurons")
        print(_neurons(results, prompt.id, answer))
    results.directory.store.put(PLOT, neurgrad_over_layers(results))
    print(f"\nplot: {results.uri}/{PLOT}")
    return EXIT_INCOMPLETE if summary.set_aside else 0


def _neurons(results: Run, prompt_id: str, target: str) -> str:
    rows = [
        (f"{neuron.layer}", f"{neuron.index}", f"{neuron.neurgrad:+.2e}", f"{neuron.activation:+.3f}")
        for neuron in strongest(results, prompt_id, target, 5)
    ]
    return columns(("layer", "neuron", "NeurGrad", "activation"), rows)


if __name__ == "__main__":
    start("scan", demo)
