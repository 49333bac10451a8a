"""python -m jobs.demo: scan the facts, sweep a sample of neurons on a few, steer these, and show what was found.

Takes the settings of `jobs.scan`, for the scan of NeurGrad; `measure` and `neurons` of what follows are the demo's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.descriptions import describe_plan, describe_summary
from jobs.entry import EXIT_INCOMPLETE, start
from jobs.report import write_report
from neg_service.config import NeuronsConfig, ScanConfig, typed
from neg_service.errors import ConfigurationError
from neg_service.places import below, parent_of
from neg_service.prompts.prompt import Prompt
from neg_service.report.console import agreement, aligned, columns, strongest
from neg_service.report.control import results_text
from neg_service.storage.reader import Run, open_run

if TYPE_CHECKING:
    from neg_service.cluster.prepare import Prepared
    from neg_service.cluster.scan import Summary

EXAMPLES = ("capital/0/France", "opposite/0/hot", "next-month/0/March")
SWEPT_PROMPTS, SWEPT_NEURONS_A_LAYER = 3, 10
WANTED = 0.9


def demo(config: DictConfig) -> int:
    """Scan and sweep, then show neurons, agreement and plots."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.prepare import prepare
    from neg_service.cluster.scan import run
    from neg_service.report.plots import neurgrad_over_layers

    prepared = prepare(typed(ScanConfig, config))
    if prepared.config.job.dry_run:
        print(describe_plan(prepared))
        return 0
    if prepared.config.job.forecast:
        raise ConfigurationError("the demo is a scan and a sweep: ask jobs.scan", setting="job.forecast", value="true")
    summary = run(prepared)
    print(describe_summary(prepared, summary))
    results = open_run(summary.uri, prepared.config.storage.endpoint_url)
    examples = _examples(results, prepared.prompts)
    if "neurgrad" in results.tables:
        for prompt in examples:
            answer = prompt.targets[prompt.answer or 0]
            print(f"\n{prompt.text!r} -> {answer!r}: its strongest neurons")
            print(_neurons(results, prompt.id, answer))
        _put_plot(results, "plots/neurgrad_over_layers.png", neurgrad_over_layers(results))
    else:
        print("no examples of neurons: they need measure.keep=all")
    swept, steered = _sweep(prepared), _control(prepared)
    out = below(parent_of(summary.uri) or summary.uri, "report")
    page = write_report([summary.uri, swept.uri, steered.uri], out, prepared.config.storage.endpoint_url)
    print(f"\nreport: {page}")
    return EXIT_INCOMPLETE if summary.failed or swept.failed or steered.failed else 0


def _examples(results: Run, prompts: Sequence[Prompt]) -> list[Prompt]:
    stored = set(results.table("prompts").to_table(columns=["prompt_id"])["prompt_id"].to_pylist())
    kept = [prompt for prompt in prompts if prompt.id in stored]
    return [prompt for prompt in kept if prompt.id in EXAMPLES] or kept[:SWEPT_PROMPTS]


def _sweep(prepared: Prepared) -> Summary:
    """Measure NEG by intervention, and show how straight the curves are and how well NeurGrad predicts them."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.prepare import prepare
    from neg_service.cluster.scan import run
    from neg_service.report.plots import neg_against_neurgrad

    config = prepared.config
    count = min(SWEPT_NEURONS_A_LAYER, prepared.info.n_neurons)
    sweep = prepare(
        replace(
            config,
            measure={"name": "sweep", "basis": config.measure["basis"]},
            neurons=NeuronsConfig(config.neurons.layers, choose="sample", count=count),
            job=replace(
                config.job, limit=min(SWEPT_PROMPTS, len(prepared.prompts)), shard_size=1, resume=None, extend=None
            ),
        )
    )
    print(f"\nNEG by intervention: about {sweep.plan.n_rows} interventions on {sweep.plan.n_prompts} prompts")
    summary = run(sweep)
    results = open_run(summary.uri, config.storage.endpoint_url)
    print(aligned([*agreement(results), ("results", summary.uri)]))
    _put_plot(results, "plots/neg_against_neurgrad.png", neg_against_neurgrad(results))
    return summary


def _control(prepared: Prepared) -> Summary:
    """Give a few answers a wanted probability, and show what it took."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.prepare import prepare
    from neg_service.cluster.scan import run

    config, prompts = prepared.config, prepared.prompts[:SWEPT_PROMPTS]
    has_answers = all(prompt.answer is not None for prompt in prompts)
    measure = {"name": "control", "basis": config.measure["basis"], "keep": "answer" if has_answers else "all"}
    control = prepare(
        replace(
            config,
            measure={**measure, "probability": WANTED, "tolerance": 0.01},
            dataset=replace(config.dataset, not_one_token="skip"),
            job=replace(config.job, limit=len(prompts), shard_size=1, resume=None, extend=None),
        )
    )
    print(f"\nControl: the least joint shifts of neurons that give answers a probability of {WANTED:g}")
    summary = run(control)
    results = open_run(summary.uri, config.storage.endpoint_url)
    print(f"{results_text(results)}\nresults: {summary.uri}")
    return summary


def _put_plot(results: Run, key: str, image: bytes) -> None:
    results.directory.store.put(key, image)
    print(f"\nplot: {results.uri}/{key}")


def _neurons(results: Run, prompt_id: str, target: str) -> str:
    rows = [
        (
            f"{neuron.layer}",
            f"{neuron.index}",
            f"{neuron.values['neurgrad']:+.2e}",
            f"{neuron.values['activation']:+.3f}",
        )
        for neuron in strongest(results, prompt_id, target, 5)
    ]
    return columns(("layer", "neuron", "NeurGrad", "activation"), rows)


if __name__ == "__main__":
    start("demo", demo, ScanConfig)
