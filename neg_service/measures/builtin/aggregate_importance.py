"""The measure `aggregate_importance`: how important each neuron is over a data set, as sums without gradients.

A neuron's importance on a prompt is its largest |NeurGrad| over the prompt's targets. A shard adds that up over its
prompts, so a data set of any size leaves a few numbers for each neuron and shard; `total` adds up the shards. This is
what `neurons.choose=top neurons.over=dataset` ranks by, with the readout of the measure that asks for it.

A neuron of an expert that a prompt does not use has none of it there.

Axes: K targets, N neurons of an MLP or expert, M neurons that act on a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.layer_neurons import NO_EXPERT
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes, layers_of_model, n_slots
from neg_service.measures.readouts import Readouts, against_setting, check_readouts, readout_setting
from neg_service.measures.sums import Sums
from neg_service.measures.tables import lists, mlp_columns, table_of, tell_of_underflow
from neg_service.measures.targets import check_at
from neg_service.prompts.prompt import Prompt
from neg_service.schema import Table
from neg_service.settings import at_setting, basis_setting

if TYPE_CHECKING:
    from neg_service.models.inspection import ModelInfo


@dataclass
class AggregateImportanceOptions:
    """See `conf/measure/aggregate_importance.yaml`."""

    name: str = "aggregate_importance"
    basis: str = basis_setting()
    at: str = at_setting()
    readout: str = readout_setting()
    against: Any = against_setting()


class AggregateImportance(Measure[AggregateImportanceOptions]):
    """Sums of each prompt's largest |NeurGrad|."""

    Options = AggregateImportanceOptions
    NAMES = ("aggregate_importance",)
    TAKES_SEQUENCES = True
    TAKES_PLACES = True

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts without a target to compare with, too."""
        super().validate(info, neurons, prompts)
        check_at(self.options.at)
        check_readouts(self._readouts, prompts)

    def fingerprint_inputs(self) -> dict[str, Any]:
        """Of probabilities at the readout position, what runs had before there was a choice."""
        given = {"name": self.options.name, "basis": self.options.basis}
        return given | ({} if self.options.at == "readout" else {"at": self.options.at}) | self._readouts.fingerprint()

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`aggregate_importance`."""
        note = "The mean over prompts of the largest |NeurGrad| over a prompt's targets."
        readouts = self._readouts
        return {
            "aggregate_importance": Table(
                schema.aggregate_importance(layers_of_model(sizes), readouts.is_plain),
                readouts.title("aggregate importance"),
                readouts.unit(schema.PER_MAGNITUDE),
                "aggregate_importance",
                note,
            )
        }

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """A shard's sums are spread over its prompts, of which there are mostly many."""
        return Cost({"aggregate_importance": n_slots(info, checked_layers(neurons, info.n_layers)) // 8}, n_targets)

    def measure(self, shard: ShardInput) -> dict[str, pa.Table]:
        """One shard's sums, in float64, where the order of the prompts hardly changes them."""
        from neg_service.measures.gradients import reduced_gradients
        from neg_service.measures.reductions import largest_size

        model, layers, basis, readouts = shard.model, shard.layers, self.options.basis, self._readouts
        wanted = [range(len(prompt.target_ids)) for prompt in shard.prompts]
        sums = Sums()
        for index, found in reduced_gradients(
            model, shard.prompts, wanted, basis, layers, shard.budget, largest_size, readouts,
            each=self.options.at == "each",
        ):  # fmt: skip
            tell_of_underflow(shard.prompts[index].prompt.id, found.token_log_p, readouts.readout)
            sums.add(found.slots, found.values[0])
        slots, importance_m = sums.slots(), sums.values()
        table_schema = schema.aggregate_importance(layers_of_model(model.feed_forward), readouts.is_plain)
        n = len(slots.size)
        table = table_of(
            table_schema,
            n,
            **mlp_columns(slots.layer, slots.expert),
            basis=basis,
            readout=readouts.label,
            n_prompts=np.full(n, len(shard.prompts)),
            aggregate_importance=lists(importance_m, slots.size, table_schema.field("aggregate_importance").type),
        )
        return {"aggregate_importance": table}

    @property
    def _readouts(self) -> Readouts:
        return Readouts.checked(self.options.readout, self.options.against)


def total(tables: Iterable[pa.Table]) -> dict[tuple[int, int], NDArray[np.float64]]:
    """The importance [N] of the neurons of each (layer, expert), from the rows of all shards, a part held at a time."""
    importance: dict[tuple[int, int], NDArray[np.float64]] = {}
    for table in tables:
        expert_r = table["expert"] if "expert" in table.column_names else pa.nulls(len(table), pa.int16())
        keys = zip(table["layer"].to_pylist(), expert_r.fill_null(NO_EXPERT).to_pylist(), strict=True)
        for key, one in zip(keys, table["aggregate_importance"].combine_chunks(), strict=True):
            importance[key] = one.values.to_numpy() + importance.get(key, 0.0)
        # Not to be held while the next one is read.
        del table
    return dict(sorted(importance.items()))
