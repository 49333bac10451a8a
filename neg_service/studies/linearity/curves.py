"""How linear neurons are, from curves of Δp over shifts; and how strong they are, layer by layer.

Whether a curve counts as linear says `schema.LINEAR`. Each range of shifts is a sweep of its own over 40 shifts, so
that a wide range is not evaluated on fewer points than a narrow one. Curves of noise alone are left out and counted.

Axis: I curves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from neg_service.schema import LINEAR
from neg_service.studies.linearity.quality import Booleans, Doubles, Integers
from neg_service.studies.tables import Row, Rows

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


# Of a range as many shifts as the paper's.
_SHIFTS_UP = 20


def sweep_of_range(largest: float) -> dict[str, Any]:
    """The settings of a sweep over 40 shifts up to ±`largest`."""
    return {"name": "sweep", "grid": "adaptive", "max_shift": largest, "step": largest / _SHIFTS_UP}


def by_range(
    largest: float, r_i: Doubles, r2_i: Doubles, max_abs_delta_p_i: Doubles, layer_i: Integers, noise_i: Doubles,
    log_odds_r_i: Doubles,
) -> Rows:  # fmt: skip
    """How linear curves are over a range: a row for each layer, and one over all of them (`layer` is None).

    noise_i: [I] what the largest |Δp| has to exceed, or the curve is left out. log_odds_r_i: [I] r of the same curves
    in log-odds; NaN of one that has none.
    """
    moves = max_abs_delta_p_i > noise_i
    return [
        {"range": float(largest), "layer": layer}
        | _linear(r_i[chosen & moves], r2_i[chosen & moves], int((chosen & ~moves).sum()))
        | _in_log_odds(r_i[chosen & moves], log_odds_r_i[chosen & moves])
        for layer, chosen in _layers(layer_i)
    ]


def r_in_log_odds(shifts_s: Doubles, delta_p_is: Doubles, probability_i: Doubles) -> Doubles:
    """Pearson's r of shifts and the change of log-odds [I]; 0 where nothing changes, NaN where log-odds have no value.

    delta_p_is: [I, S] changes of probabilities that are probability_i [I] without a shift.
    """
    p_i1 = probability_i[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        change_is = np.log1p(delta_p_is / p_i1) - np.log1p(-delta_p_is / (1 - p_i1))
        centred_is, centred_s = change_is - change_is.mean(1, keepdims=True), shifts_s - shifts_s.mean()
        size_i = np.sqrt((centred_is**2).sum(1) * (centred_s @ centred_s))
        return np.where(size_i == 0, 0.0, (centred_is @ centred_s) / size_i)


def _in_log_odds(r: Doubles, log_odds_r: Doubles) -> Row:
    """How many curves are linear in log-odds, and straighter than in probability; comparisons with NaN are false."""
    straighter = float((np.abs(log_odds_r) > np.abs(r)).mean()) if len(r) else None
    return {"share_linear_log_odds": _share_linear(log_odds_r), "share_straighter_log_odds": straighter}


@dataclass(frozen=True)
class CurveRouting:
    """What experts have to do with curves.

    is_rerouted: [I] whether some shift had a layer above choose other experts. unused_layer: the layer of each curve
    that was left out because its prompt does not use the neuron's expert.
    """

    is_rerouted: Booleans
    unused_layer: Integers


def by_layer(
    r_i: Doubles, r2_i: Doubles, neg_i: Doubles, is_resolved_i: Booleans, layer_i: Integers,
    routing: CurveRouting | None = None,
) -> Rows:  # fmt: skip
    """Linearity, the spread of |NEG|, and the share of positive ones: a row for each layer, and one over all.

    routing: of models with experts, of which linearity is also told with and without other experts chosen above.
    """
    rows = []
    for layer, chosen in _layers(layer_i):
        moves = chosen & is_resolved_i
        neg, resolved = neg_i[chosen], neg_i[moves]
        spread = {f"neg_{_name(q)}": _quantile(np.abs(neg), q) for q in _QUANTILES}
        rows.append(
            {"layer": layer}
            | _linear(r_i[moves], r2_i[moves], int((chosen & ~moves).sum()))
            | spread
            | {"share_positive": float((resolved > 0).mean()) if len(resolved) else None, "n_resolved": len(resolved)}
            | ({} if routing is None else _by_routing(r_i, moves, routing, layer))
        )
    return rows


def _by_routing(r_i: Doubles, moves_i: Booleans, routing: CurveRouting, layer: int | None) -> Row:
    """The share of linear curves with and without other experts chosen above, of curves whose NEG is known."""
    rerouted, same = moves_i & routing.is_rerouted, moves_i & ~routing.is_rerouted
    return {
        "n_rerouted": int(rerouted.sum()),
        "share_linear_rerouted": _share_linear(r_i[rerouted]),
        "share_linear_same_experts": _share_linear(r_i[same]),
        "n_unused": int(np.sum(routing.unused_layer == layer)) if layer is not None else len(routing.unused_layer),
    }


def histogram(values: Doubles, n: int = 40) -> Rows:
    """Values between 0 and 1 in bins of equal width; what is below 0 (R² can be) is in the first."""
    counts, edges = np.histogram(np.clip(values, 0, 1), bins=n, range=(0, 1))
    return [{"low": float(edges[i]), "high": float(edges[i + 1]), "n": int(counts[i])} for i in range(n)]


def _linear(r: Doubles, r2: Doubles, without_effect: int) -> Row:
    return {
        "n": len(r),
        "n_without_effect": without_effect,
        "share_linear": _share_linear(r),
        **{f"r_{_name(q)}": _quantile(np.abs(r), q) for q in _QUANTILES},
        **{f"r2_{_name(q)}": _quantile(r2, q) for q in _QUANTILES},
    }


def _share_linear(r: Doubles) -> float | None:
    return float((np.abs(r) >= LINEAR).mean()) if len(r) else None


def _layers(layer_i: Integers) -> list[tuple[int | None, Booleans]]:
    everywhere: list[tuple[int | None, Booleans]] = [(None, np.ones(len(layer_i), dtype=bool))]
    return everywhere + [(int(layer), layer_i == layer) for layer in np.unique(layer_i)]


def _quantile(values: Doubles, q: float) -> float | None:
    return float(np.quantile(values, q)) if len(values) else None


def _name(q: float) -> str:
    return f"q{round(100 * q):02d}"
