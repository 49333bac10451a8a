"""What was run: models, data, software, machines, accuracy and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neg_service.layer_neurons import LayerNeurons, described_layers
from neg_service.report.console import accuracy, dequantised_text, has_experts
from neg_service.report.page import Grid, Section
from neg_service.report.sections.loading import Loaded
from neg_service.storage.reader import Run

_HEAD = (
    "run", "model", "layers × neurons", "data", "measure", "settings", "prompts", "accuracy", "shards",
    "s a prompt", "began",
)  # fmt: skip

_LONG = 40
# Settings of a measure that say how a table is kept, or what others say already.
_LEFT_OUT = ("name", "keep_curves", "max_shift", "step")


def overview(loaded: Loaded) -> Section:
    """The first section."""
    of_studies = [run for study in loaded.studies for run in study.runs.values()]
    runs = list({run.uri: run for run in [*loaded.runs, *of_studies]}.values())
    text = (
        "Accuracy is the share of prompts whose right answer is the most probable of their targets. Seconds a prompt "
        "are those that one replica computes; a run that was interrupted does not say."
    )
    if engines := sorted({run.about["engine"] for run in runs if run.about.get("engine")}):
        text += f" Engine: {', '.join(engines)}."
    for made in dict.fromkeys(filter(None, (_made_from(run.about) for run in runs))):
        text += f" Weights of {made}."
    grids = []
    if loaded.studies:
        head = ("what", "name", "model", "data", "runs")
        rows = [
            (
                study.kind,
                study.name,
                _model_of(study.about.get("model", {})),
                _data_of(study.about.get("dataset", {})),
                str(len(study.about.get("runs", []))),
            )
            for study in loaded.studies
        ]
        grids.append(Grid("Studies and probes", "", head, rows, numeric=(4,)))
    named = [run for study in loaded.studies if study.names_runs for run in study.runs.values()]
    if listed := list({run.uri: run for run in [*loaded.runs, *named]}.values()):
        grids.append(Grid("Runs", "", _HEAD, [_row(run) for run in listed], numeric=(6, 9)))
    if runs:
        grids.append(Grid("Software and machine", "", ("what", "which"), _software(runs) + _machines(runs)))
    return Section("runs", "What was run", text, grids)


def _row(run: Run) -> tuple[str, ...]:
    model = run.about.get("model", {})
    asked = run.config["model"]
    return (
        run.name,
        _model_of({"source": model.get("source", asked["identity"]), "dtype": asked["dtype"]}),
        _layers_of(run),
        _data_of(run.about.get("dataset", {})),
        str(run.config["measure"]["name"]),
        _settings(run),
        str(run.config["prompts"]["count"]),
        str(accuracy(run)) if "prompts" in run.tables and run.done() else "-",
        f"{len(run.done())} of {run.n_shards}",
        "-" if run.seconds_a_prompt is None else f"{run.seconds_a_prompt:.3g}",
        str(run.about.get("began", "-"))[:16].replace("T", " "),
    )


def _layers_of(run: Run) -> str:
    model = run.about.get("model", {})
    if has_experts(run):
        return described_layers([LayerNeurons(*own) for own in model["layer_neurons"]])
    return f"{model.get('layers', '?')} × {model.get('neurons_a_layer', '?')}"


def _made_from(about: Mapping[str, Any]) -> str:
    """What a run's weights were made from, if quantised: as its first replica said, or as it was planned."""
    model = about.get("model", {})
    made = about.get("dequantised", model.get("dequantised"))
    return "" if made is None else f"{model['source']}: {dequantised_text(made)}"


def _model_of(model: Mapping[str, Any]) -> str:
    return f"{model['source']}, {model.get('dtype', '?')}" if "source" in model else "-"


def _data_of(dataset: Mapping[str, Any]) -> str:
    source, tasks, split = str(dataset.get("source", "?")), dataset.get("task"), dataset.get("split")
    if len(source) > _LONG:
        source = "…/" + "/".join(source.rsplit("/", 2)[-2:])
    if tasks is None:
        return source
    named = tasks if isinstance(tasks, str) else ", ".join(tasks)
    splits = "" if split is None else f" {split if isinstance(split, str) else ', '.join(split)}"
    return f"{source}: {named}{splits}"


def _settings(run: Run) -> str:
    """What decides the numbers beside model and data: of the measure what is short, and which neurons."""
    measure, neurons = run.config["measure"], run.config.get("neurons", {})
    given = {key: value for key, value in measure.items() if key not in _LEFT_OUT}
    said = [f"{key} {value}" for key, value in given.items() if isinstance(value, str | int | float)]
    for key, value in given.items():
        if isinstance(value, list) and value:
            said.append(_listed(key, value))
    chosen = neurons.get("choose", "all")
    if chosen != "all":
        count = f"{neurons['count']} " if neurons.get("count") else ""
        per = f" a {neurons['per']}" if chosen == "sample" else ""
        said.append(f"neurons: {count}{chosen}{per}")
    layers, of = neurons.get("layers"), run.about.get("model", {}).get("layers")
    if isinstance(layers, list) and len(layers) != of:
        said.append(f"layers {', '.join(map(str, layers))}")
    return ", ".join(said)


def _listed(key: str, values: list[Any]) -> str:
    """Shifts to both sides by how far they go, a few other numbers one by one, and anything else by count."""
    if not all(isinstance(one, int | float) for one in values):
        return f"{len(values)} {key}"
    if min(values) < 0:
        return f"{len(values)} {key} up to ±{max(map(abs, values)):g}"
    return f"{key} {', '.join(f'{one:g}' for one in values)}" if len(values) <= 6 else f"{len(values)} {key}"


def _software(runs: list[Run]) -> list[tuple[str, str]]:
    versions = [run.about.get("versions", {}) for run in runs]
    names = dict.fromkeys(name for own in versions for name in own)
    return [(name, ", ".join(dict.fromkeys(own[name] for own in versions if name in own))) for name in names]


def _machines(runs: list[Run]) -> list[tuple[str, str]]:
    named = dict.fromkeys(str(run.about["runs_on"]) for run in runs if "runs_on" in run.about)
    of = {machine: [run.name for run in runs if run.about.get("runs_on") == machine] for machine in named}
    return [
        ("replicas ran on" if len(of) == 1 else f"replicas of {', '.join(names)} ran on", machine)
        for machine, names in of.items()
    ]
