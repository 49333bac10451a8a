"""Which engine runs a model: the fastest one that takes it and passes the self-check.

What its configuration rules out is refused without weights (`candidates`); the rest is tried on the loaded model
(`select_engine`), where an engine that gives other numbers than the plain model is not used. Where none is left the
model is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from neg_service.errors import ModelError, one_line
from neg_service.memory import is_out_of_memory
from neg_service.models.engines.base import Engine, LoadedModel, MismatchError
from neg_service.models.engines.comparisons import CHECK_TOKENS
from neg_service.models.engines.full_sequence import FullSequenceEngine, UnpaddedEngine
from neg_service.models.engines.kv_cache import KeyValueCacheEngine
from neg_service.models.engines.recurrent_state import RecurrentStateEngine
from neg_service.models.engines.self_check import SelfCheck, check_engine, check_plain, name_of
from neg_service.models.engines.shared_prefix import SharedPrefixEngine

# The fastest first.
ENGINES: tuple[type[Engine], ...] = (
    SharedPrefixEngine,
    KeyValueCacheEngine,
    RecurrentStateEngine,
    FullSequenceEngine,
    UnpaddedEngine,
)


@dataclass(frozen=True)
class Selection:
    """The engine that was chosen, what the self-check found of it, and why each faster one is not it, by name."""

    engine: Engine
    check: SelfCheck
    rejected: dict[str, str] = field(default_factory=dict)


def candidates(model: PreTrainedModel, read_at: str) -> dict[type[Engine], str | None]:
    """The engines for models that are read at a kind of token, each with why it cannot run this one, if so.

    What a configuration tells is enough: the model may be without weights.
    """
    return {engine: engine.refusal(model) for engine in ENGINES if read_at in engine.reads_at}


def select_engine(model: LoadedModel) -> Selection:
    """Compare engines with the plain model on a few tokens, and choose the first that fits.

    Raises:
        ModelError: no engine fits; for each, a deviation beyond its tolerance, or why it does not run.
    """
    check_plain(model)
    rejected: dict[str, str] = {}
    for kind, refusal in candidates(model.module, model.read_at).items():
        if refusal is not None:
            rejected[kind.name] = refusal
            continue
        engine = kind(model)
        try:
            return Selection(engine, check_engine(engine), rejected)
        except MismatchError as error:
            rejected[kind.name] = str(error)
        except (MemoryError, TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise ModelError(
                    f"self-check of {name_of(model)}: the graph of {CHECK_TOKENS} tokens does not fit into the "
                    f"memory of {model.device} beside the weights: use a larger device, or a smaller model.source "
                    "or model.dtype",
                    change="model.source",
                ) from error
            own = "" if model.module._supports_attention_backend else "its attention is code of its own; "
            rejected[kind.name] = f"{own}does not run: {one_line(error)}"
    reasons = "; ".join(f"{engine}: {reason}" for engine, reason in rejected.items())
    raise ModelError(
        f"self-check of {name_of(model)}: {reasons}: choose another model.source or model.dtype", change="model.source"
    )
