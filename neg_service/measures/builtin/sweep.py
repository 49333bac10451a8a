"""The measure `sweep`: NEG by intervention of chosen neurons, for every target. What is computed: one level up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from neg_service import schema
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes, has_experts, layers_of_model, prompt_bytes
from neg_service.measures.choice import check_choice, chosen_neurons, count_of, n_used
from neg_service.measures.readouts import Readouts, against_setting, check_readouts, readout_setting
from neg_service.measures.shifts import GRIDS, SHIFTS, TOLERANCE, AdaptiveGrid, Grid, Sweep, chosen_grid
from neg_service.measures.targets import check_at
from neg_service.schema import Table
from neg_service.settings import at_setting, basis_setting, setting

if TYPE_CHECKING:
    from neg_service.models.inspection import ModelInfo
    from neg_service.models.language_model import LanguageModel
    from neg_service.prompts.prompt import EncodedPrompt, Prompt


# How many shifts the adaptive grid takes for a neuron on SmolLM2, and on mixtures, where choices of experts change.
_SHIFTS, _SHIFTS_OF_EXPERTS = 3.5, 20


@dataclass
class SweepOptions:
    """See `conf/measure/sweep.yaml`."""

    name: str = "sweep"
    basis: str = basis_setting()
    at: str = at_setting()
    shift: str = setting("magnitude", "a -> a + shift*sign(a); or signed: a -> a + shift", allowed=SHIFTS)
    grid: str = setting(
        "adaptive",
        "of every step up to max_shift as many as a neuron needs; full: all of them; coarse: 4 shifts, from which the "
        "full grid's curve is interpolated",
        allowed=GRIDS,
    )
    tolerance: float = setting(
        TOLERANCE, "of the adaptive grid: the share of |NEG| that it may be off, or the resolution, if that is larger"
    )
    max_shift: float = setting(2.0, "the largest shift, in units of activation")
    step: float = setting(0.1, "between shifts")
    shifts: Any = setting(None, "a list of shifts of your own, all run, in the place of max_shift and step")
    readout: str = readout_setting()
    against: Any = against_setting()
    keep_curves: bool = setting(False, "store the change of probability at each shift, 4 bytes for each shift and row")
    # The old name of cluster.batch_bytes.
    batch_bytes: Any = None


class NeuronSweep(Measure[SweepOptions]):
    """Every chosen neuron shifted, every target's probability read."""

    Options = SweepOptions
    NAMES = ("sweep",)
    TAKES_SEQUENCES = True
    TAKES_PLACES = True
    MEASURES_SINGLE_NEURONS = True

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse an unknown shift and a bad grid or choice of neurons, too."""
        super().validate(info, neurons, prompts)
        check_at(self.options.at)
        self.grid()
        check_readouts(self._readouts, prompts)
        check_choice(neurons, layers_of_model(info))

    def least_batch_bytes(self, info: ModelInfo) -> int:
        """Two rows of a short prompt: an intervention runs beside one without a shift."""
        return 2 * 4 * info.row_values

    def fingerprint_inputs(self) -> dict[str, Any]:
        """The options that decide the numbers; a grid is named by its shifts, however they were given."""
        options = self.options
        found: dict[str, Any] = {"name": options.name, "basis": options.basis, "shift": options.shift}
        if options.at != "readout":
            found["at"] = options.at
        found |= {"grid": options.grid, "shifts": self.grid().shifts.tolist(), "keep_curves": options.keep_curves}
        found |= self._readouts.fingerprint()
        grid = self.grid()
        if isinstance(grid, AdaptiveGrid):
            return found | {"tolerance": options.tolerance, "nodes": [stage.shifts.tolist() for stage in grid.stages]}
        # What is run in full is the same run, however it was asked for.
        found["grid"] = "full" if grid.interpolation is None else "coarse"
        if options.grid == "coarse":
            found |= {"max_shift": options.max_shift, "step": options.step}
        return found

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts` and `sweep`."""
        n_shifts = len(self.grid().shifts) if self.options.keep_curves else None
        readouts = self._readouts
        unit = readouts.unit(schema.PER_ACTIVATION if self.options.shift == "signed" else schema.PER_MAGNITUDE)
        of_sweep = schema.sweep(n_shifts, has_experts(sizes), readouts.is_plain)
        swept = Table(of_sweep, readouts.title("NEG"), unit, "neg")
        return {**schema.prompt_tables(has_experts(sizes)), "sweep": swept}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """A row of numbers for each target and neuron, an intervention for each neuron and shift."""
        grid = self.grid()
        if isinstance(grid, AdaptiveGrid):
            n_shifts = _SHIFTS_OF_EXPERTS if has_experts(info) else _SHIFTS
        else:
            # Where experts may change the two ends of an interpolated curve are run as well, at the least.
            n_shifts = len(grid.shifts) + 2 * (grid.interpolation is not None and has_experts(info))
        n, used = count_of(neurons, layers_of_model(info)), n_used(neurons, layers_of_model(info))
        # Eight numbers, and the key and marks of a row, which compress to little.
        row = 120 + (4 * len(grid.shifts) if self.options.keep_curves else 0)
        # A row begins at its neuron's layer.
        tables = {**prompt_bytes(info), "sweep": int(row * n * n_targets)}
        return Cost(tables, math.ceil(used * n_shifts), "interventions", passes=0.5)

    def calibrate(
        self, model: LanguageModel, prompts: Sequence[EncodedPrompt], neurons: NeuronsConfig
    ) -> dict[str, Any]:
        """The sweep's noise against a higher precision, of rows of one token; see `noise.py`.

        That of rows of several tokens is measured where such prompts are swept, on tokens that are always the same.
        """
        from neg_service.measures.batching import budget_of
        from neg_service.measures.noise import measure_noise

        if neurons.choose == "top":
            neurons = NeuronsConfig(neurons.layers)
        chosen = chosen_neurons(neurons, layers_of_model(model.feed_forward))
        budget = self.budget or budget_of(model)
        prompts = [replace(prompt.first_tokens(), at=None) for prompt in prompts]
        return {"noise": asdict(measure_noise(model, prompts, chosen, self._sweep, budget))}

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """Rows by target, then neuron."""
        from neg_service.measures.adaptive import RowNoise
        from neg_service.measures.sweep import sweep_rows

        noise = shard.calibration["noise"]
        of_rows = RowNoise(float(noise["sigma"]), bool(noise.get("is_per_row", False)))
        return sweep_rows(shard, self._sweep, of_rows, self.options.keep_curves, self._readouts)

    @property
    def _readouts(self) -> Readouts:
        return Readouts.checked(self.options.readout, self.options.against)

    @property
    def _sweep(self) -> Sweep:
        return Sweep(self.grid(), self.options.basis, self.options.shift, self.options.at == "each")

    def grid(self) -> Grid | AdaptiveGrid:
        """The shifts.

        Raises:
            ConfigurationError: they are none.
        """
        options = self.options
        if options.shifts is not None and not isinstance(options.shifts, list):
            raise ConfigurationError(
                setting="measure.shifts", value=options.shifts, allowed="a list of numbers such as [-1,1]"
            )
        return chosen_grid(options.grid, options.shifts, options.max_shift, options.step, options.tolerance)
