"""The measure `intervene`: joint edits of any sets of neurons, and what they do. What is computed: one level up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from neg_service import schema
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes, has_experts, layers_of_model, prompt_bytes
from neg_service.measures.edits import CheckedEdit, Edit, checked_edits, read_edits
from neg_service.measures.tables import key_columns, prompt_tables, table_of
from neg_service.measures.targets import check_at
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.schema import Table
from neg_service.settings import at_setting, basis_setting, setting

if TYPE_CHECKING:
    from neg_service.measures.intervene import Effects
    from neg_service.models.inspection import ModelInfo


@dataclass
class InterveneOptions:
    """See `conf/measure/intervene.yaml`."""

    name: str = "intervene"
    basis: str = basis_setting()
    at: str = at_setting()
    edits: Any = setting(
        None,
        "A .json or .jsonl file of edits, or the list itself. Each has `neurons`, one of shift, scale, set, enhance, "
        "suppress, and optionally a name: [{name: off, neurons: [[29, 864], [20, 1011]], scale: 0}]",
        kind=str | list[Edit] | None,
    )


class Intervene(Measure[InterveneOptions]):
    """Probabilities and predictions before and after edits."""

    Options = InterveneOptions
    NAMES = ("intervene",)
    TAKES_SEQUENCES = True
    TAKES_PLACES = True

    def with_files_read(self) -> Self:
        """The edits themselves in the place of their file."""
        return type(self)(replace(self.options, edits=read_edits(self.options.edits)))

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse layers, for edits name their neurons, and edits that the model cannot do, too."""
        if neurons.choose == "all" and neurons.layers != "all":
            raise ConfigurationError(
                "measure.edits names the neurons; leave it at all", setting="neurons.layers", value=neurons.layers
            )
        super().validate(info, neurons, prompts)
        check_at(self.options.at)
        checked_edits(self.options.edits, layers_of_model(info))

    def fingerprint_inputs(self) -> dict[str, Any]:
        """All options, with the edits in full."""
        options = self.options
        at = {} if options.at == "readout" else {"at": options.at}
        return {"name": options.name, "basis": options.basis, "edits": options.edits, **at}

    def describe_neurons(self, info: ModelInfo, neurons: NeuronsConfig) -> str:
        """Those of the edits."""
        return "those of measure.edits"

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts` and `intervene`."""
        edited = Table(schema.intervene(has_experts(sizes)), "change of the probability", schema.PROBABILITY)
        return {**schema.prompt_tables(has_experts(sizes)), "intervene": edited}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """A row of numbers for each target and edit."""
        n_edits = len(self.options.edits)
        edited = {"intervene": int(40 * n_edits * n_targets)}
        return Cost({**prompt_bytes(info), **edited}, 1 + n_edits, "interventions", passes=1.0)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """Rows by edit, then target."""
        from neg_service.measures.intervene import effects

        model, basis = shard.model, self.options.basis
        sizes = model.feed_forward
        edits = checked_edits(self.options.edits, layers_of_model(sizes))
        dtype = str(model.dtype).removeprefix("torch.")
        each = self.options.at == "each"
        for index, found in effects(model, shard.prompts, edits, basis, shard.budget, each):
            prompt = shard.prompts[index]
            probability_k = found.probability_k.astype(np.float32)
            of_prompt = prompt_tables(prompt, probability_k, found.routing, has_experts(sizes), found.token_log_p)
            table = _table(schema.intervene(has_experts(sizes)), prompt, found, edits, basis, dtype)
            yield index, {**of_prompt, "intervene": table}


def _table(
    table_schema: pa.Schema,
    prompt: EncodedPrompt,
    found: Effects,
    edits: Sequence[CheckedEdit],
    basis: str,
    dtype: str,
) -> pa.Table:
    e, k = found.delta_p_ek.shape
    after_ek = found.probability_k + found.delta_p_ek
    return table_of(
        table_schema,
        e * k,
        **key_columns(prompt, np.tile(np.arange(k), e)),
        edit=np.repeat(np.array([edit.name for edit in edits], dtype=object), k),
        basis=basis,
        dtype=dtype,
        probability_before=np.tile(found.probability_k, e),
        probability=after_ek.ravel(),
        delta_p=found.delta_p_ek.ravel(),
        prediction_before=np.full(e * k, found.probability_k.argmax()),
        prediction=np.repeat(after_ek.argmax(1), k),
        n_routed=np.repeat(found.n_routed_e, k),
    )
