"""What a scan would do, and what it did, in words for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neg_service.errors import StorageError, shortened
from neg_service.measures.choice import count_of
from neg_service.places import literal, without_credentials
from neg_service.report.console import aligned, bytes_text, describe_tables
from neg_service.storage.reader import Run, open_run, reading

if TYPE_CHECKING:
    from neg_service.cluster.prepare import Prepared
    from neg_service.cluster.scan import Summary


# So many rows are tokenised for a plan: some seconds. A scan looks at all before it starts.
_ROWS_CHECKED = 10_000


def describe_plan(prepared: Prepared) -> str:
    """What a scan would do, and what it would cost.

    Raises:
        PromptError: what is wrong with one of the first rows, which the scan would refuse.
    """
    info, plan = prepared.info, prepared.plan
    source = without_credentials(prepared.config.dataset.source)
    tables = [f"{bytes_text(size):>10}  {table}" for table, size in plan.bytes_of_table.items()]
    return "plan (nothing was done)\n" + aligned(
        [
            (
                "model",
                f"{info.name}: {info.architecture}, {info.described_neurons}",
            ),
            ("identity", info.identity),
            ("engine", _engine(prepared)),
            (
                "prompts",
                f"{plan.n_prompts} with {plan.n_targets} targets, from {source}",
            ),
            ("checked", _checked(prepared)),
            *_chat(prepared),
            *_extends(prepared),
            ("measure", ", ".join(f"{key}={_short(value)}" for key, value in prepared.identity["measure"].items())),
            ("neurons", _neurons(prepared)),
            (plan.rows_are, f"{plan.n_rows}"),
            ("shards", f"{plan.n_shards} of up to {min(plan.shard_size, plan.n_prompts)} prompts"),
            (
                "bytes",
                "\n".join([f"{bytes_text(plan.total_bytes):>10}  in all, before compression", *tables]),
            ),
            ("replica", f"about {bytes_text(prepared.memory)} of memory"),
            *_ranking(prepared),
            ("results", prepared.uri),
        ]
    )


def _engine(prepared: Prepared) -> str:
    """The engine that the configuration admits; of rows that are whole prompts, how much work that is."""
    info, encoding = prepared.info, prepared.encoding
    found = f"{info.engine}, unless the self-check chooses another: a row is {info.row_is}"
    if not info.rows_are_prompts:
        return found
    samples = [len(encoding[i].ids) for i in sorted({0, len(encoding) // 2, len(encoding) - 1})]
    return f"{found}, of {sum(samples) / len(samples):.0f} tokens: so many times the work of a row of one token"


def _checked(prepared: Prepared) -> str:
    """Which rows were tokenised, and found right."""
    encoding = prepared.encoding
    encoding[:_ROWS_CHECKED]
    if len(encoding) <= _ROWS_CHECKED:
        return "all rows with their targets"
    return f"the first {_ROWS_CHECKED} rows with their targets; the others when it starts"


def _chat(prepared: Prepared) -> list[tuple[str, str]]:
    """The first of the prompts that a chat template wrote, as the model reads it."""
    first = prepared.prompts[0]
    return [] if first.messages is None else [("chat", f"{first.id!r} is read as {shortened(first.text)}")]


def _ranking(prepared: Prepared) -> list[tuple[str, str]]:
    """The scan that comes first, where there is one."""
    if prepared.ranking is None:
        return []
    plan, uri = prepared.ranking.plan, prepared.ranking.uri
    return [("ranking", f"{plan.n_rows} gradients, {plan.n_shards} shards, {bytes_text(plan.total_bytes)}, at {uri}")]


def _extends(prepared: Prepared) -> list[tuple[str, str]]:
    """The run whose prompts and shards come first, where there is one."""
    base = prepared.base
    return [] if base is None else [("extends", f"{base.n_prompts} prompts in {base.n_shards} shards of {base.uri}")]


def _neurons(prepared: Prepared) -> str:
    chosen = prepared.config.neurons
    first = ", which a scan of all neurons finds first" if chosen.choose == "top" and chosen.over == "dataset" else ""
    return prepared.measure.describe_neurons(prepared.info, chosen) + first


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"[{value[0]}, {value[1]}, ..., {value[-1]}] ({len(value)})"
    return str(value)


def describe_summary(prepared: Prepared, summary: Summary) -> str:
    """What a scan did, and how to load it."""
    results = open_run(summary.uri, prepared.config.storage.endpoint_url)
    try:
        with reading(results):
            return _described(prepared, summary, results)
    except StorageError as error:
        raise StorageError(f"{summary.shards_done} of {summary.n_shards} shards are stored, but {error}") from error


def _described(prepared: Prepared, summary: Summary, results: Run) -> str:
    plan, info = prepared.plan, prepared.info
    n_neurons = count_of(prepared.config.neurons, info.layer_neurons)
    main = results.tables[-1]
    rows = [
        ("prompts", f"{plan.n_prompts} ({plan.n_targets} targets)"),
        *_extends(prepared),
        ("shards", f"{summary.shards_done} of {summary.n_shards} done"),
    ]
    if results.values_of_neurons and "target" in results.schemas[results.values_of_neurons[0]].names:
        rows.append(("neurons", f"{n_neurons} for each target"))
    if prepared.base is not None:
        rows.append(("in both runs", f"{prepared.base.n_prompts + plan.n_prompts} prompts, of which is told:"))
    rows += describe_tables(results)
    if summary.n_prompts_now:
        rows += [
            ("rate", f"{summary.n_prompts_now / summary.seconds:.3g} prompts/s in {summary.seconds:.1f} s"),
            ("written", bytes_text(summary.bytes_now)),
        ]
    rows.append(("results", summary.uri))
    if summary.failed:
        rows.append(("failed", "\n".join(f"shard {i}: {error}" for i, error in sorted(summary.failed.items()))))
    if summary.shards_before == summary.n_shards:
        heading = "this run was finished already; nothing was done"
    elif summary.failed:
        heading = f"incomplete: {len(summary.failed)} shards failed; the same command tries them again"
    else:
        heading = "done"
    endpoint_url = prepared.config.storage.endpoint_url
    where = ", ".join(literal(one) for one in (summary.uri, endpoint_url) if one)
    snippet = (
        "import neg_service\n"
        f"run = neg_service.open_run({where})\n"
        f'table = run.table("{main}").head(1000)  # pyarrow; .to_pandas(), polars.from_arrow, duckdb.sql'
    )
    return f"\n{heading}\n{aligned(rows)}\n\nload it:\n\n{snippet}\n"
