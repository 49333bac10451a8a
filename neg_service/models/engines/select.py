"""Which engine runs a model: the fastest one that takes it and passes the self-check, or the one that is asked for.

What its configuration rules out is refused without weights (`candidates`); the rest is tried on the loaded model
(`select_engine`), where an engine that gives other numbers than the plain model is not used. Where none is left the
model is refused. An engine that refines another (`Engine.refines`) is tried once that one has passed, whose check holds
for both; where it does not fit the other one stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from neg_service.errors import ModelError, one_line
from neg_service.memory import is_out_of_memory
from neg_service.models.engines.base import Engine, LoadedModel, MismatchError
from neg_service.models.engines.comparisons import CHECK_TOKENS
from neg_service.models.engines.difference_check import compared
from neg_service.models.engines.differences import DifferencesEngine
from neg_service.models.engines.full_sequence import FullSequenceEngine, UnpaddedEngine
from neg_service.models.engines.kv_cache import KeyValueCacheEngine
from neg_service.models.engines.recurrent_state import RecurrentStateEngine
from neg_service.models.engines.self_check import SelfCheck, check_engine, check_plain, name_of
from neg_service.models.engines.shared_prefix import SharedPrefixEngine
from neg_service.models.engines.tree_check import check_trees

# The fastest first.
ENGINES: tuple[type[Engine], ...] = (
    DifferencesEngine,
    SharedPrefixEngine,
    KeyValueCacheEngine,
    RecurrentStateEngine,
    FullSequenceEngine,
    UnpaddedEngine,
)

AUTO = "auto"
# In the reason of an engine that failed in another way than by its numbers, for which something may have been missing.
DOES_NOT_RUN = "does not run"
_DOES_NOT_RUN = (MemoryError, TypeError, AttributeError, LookupError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Selection:
    """The engine that was chosen, what the self-check found of it, and why each faster one is not it, by name.

    Of one that would have refined the engine it says so, too.
    """

    engine: Engine
    check: SelfCheck
    rejected: dict[str, str] = field(default_factory=dict)


def candidates(model: PreTrainedModel, read_at: str) -> dict[type[Engine], str | None]:
    """The engines for models that are read at a kind of token, each with why it cannot run this one, if so.

    What a configuration tells is enough: the model may be without weights.
    """
    return {engine: engine.refusal(model) for engine in ENGINES if read_at in engine.reads_at}


def select_engine(model: LoadedModel, wanted: str = AUTO) -> Selection:
    """Compare engines with the plain model on a few tokens, and choose the first that fits, or the one that is wanted.

    Raises:
        ModelError: no engine fits; for each, a deviation beyond its tolerance, or why it does not run.
    """
    check_plain(model)
    tried = candidates(model.module, model.read_at)
    finer = {kind.refines: kind for kind in tried if kind.refines is not None}
    if wanted != AUTO:
        tried = _asked_for(model, tried, wanted)
    rejected: dict[str, str] = {}
    for kind, refusal in tried.items():
        if kind.refines is not None:
            continue
        if refusal is not None:
            rejected[kind.name] = refusal
            continue
        found = _tried(kind(model), rejected)
        if found is None:
            continue
        if kind in finer and wanted in (AUTO, finer[kind].name):
            found = _refined(found, finer[kind])
        if wanted not in (AUTO, found.engine.name):
            rejected = found.rejected
            break
        return found
    reasons = "; ".join(f"{engine}: {reason}" for engine, reason in rejected.items())
    if wanted != AUTO:
        raise ModelError(
            f"{name_of(model)}: {reasons}", setting="model.engine", value=wanted, allowed=f"{AUTO}, or one that fits"
        )
    raise ModelError(
        f"self-check of {name_of(model)}: {reasons}: choose another model.source or model.dtype", change="model.source"
    )


def select_for_trees(selection: Selection, wanted: str = AUTO) -> Selection:
    """The engine for rows of several tokens: the one that was selected if it runs trees, else whole sequences.

    Raises:
        ModelError: a masked model; an engine that was asked for and cannot; none can, with what each is off by.
    """
    engine = selection.engine
    model = engine.model
    if model.mask_token is not None:
        raise ModelError(
            f"{name_of(model)} is a masked model, which predicts one token in the place of its mask",
            setting="dataset.not_one_token", value="sequence", allowed="error or skip",
        )  # fmt: skip
    rejected: dict[str, str] = {}
    found = _with_trees(selection, rejected)
    if found is None and wanted == AUTO and not isinstance(engine, FullSequenceEngine):
        slow = _tried(FullSequenceEngine(model), rejected)
        found = None if slow is None else _with_trees(slow, rejected)
    if found is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        raise ModelError(
            f"{name_of(model)}, targets of several tokens, or neurons at another token than the last: {reasons}",
            setting="model.engine", value=wanted,
            allowed=f"{AUTO}, {SharedPrefixEngine.name} or {FullSequenceEngine.name}, whichever fits, or neither "
            "dataset.not_one_token=sequence nor rows with at",
        )  # fmt: skip
    return replace(found, rejected={**selection.rejected, **rejected})


def _with_trees(selection: Selection, rejected: dict[str, str]) -> Selection | None:
    """The selection if its engine's rows of several tokens are right; else why not goes to `rejected`."""
    engine, check = selection.engine, selection.check
    if not engine.runs_trees:
        rejected[engine.name] = "runs rows of one token"
        return None
    try:
        return replace(selection, check=replace(check, tried=(*check.tried, check_trees(engine))))
    except MismatchError as error:
        rejected[engine.name] = str(error)
    except _DOES_NOT_RUN as error:
        if is_out_of_memory(error):
            raise _too_large(engine.model) from error
        rejected[engine.name] = f"{DOES_NOT_RUN} rows of several tokens: {one_line(error)}"
    return None


def _asked_for(
    model: LoadedModel, tried: dict[type[Engine], str | None], wanted: str
) -> dict[type[Engine], str | None]:
    """The engine that is wanted, and the one that it refines; what refuses it refuses both.

    Raises:
        ModelError: it does not read prompts where this model's are read.
    """
    asked = next((kind for kind in tried if kind.name == wanted), None)
    if asked is None:
        names = ", ".join(kind.name for kind in tried)
        raise ModelError(
            f"{name_of(model)} is read at its {model.read_at}", setting="model.engine", value=wanted,
            allowed=f"{AUTO}, or one of {names}",
        )  # fmt: skip
    if (refusal := tried[asked]) is not None:
        raise ModelError(
            f"{name_of(model)}: {refusal}", setting="model.engine", value=wanted, allowed=f"{AUTO}, or one that fits"
        )
    return {asked.refines or asked: None}


def _tried(engine: Engine, rejected: dict[str, str]) -> Selection | None:
    """The engine if it fits; else why not goes to `rejected`.

    Raises:
        ModelError: the check does not fit into memory.
    """
    model = engine.model
    try:
        return Selection(engine, check_engine(engine), rejected)
    except MismatchError as error:
        rejected[engine.name] = str(error)
    except _DOES_NOT_RUN as error:
        if is_out_of_memory(error):
            raise _too_large(model) from error
        own = "" if model.module._supports_attention_backend else "its attention is code of its own; "
        rejected[engine.name] = f"{own}{DOES_NOT_RUN}: {one_line(error)}"
    return None


def _refined(found: Selection, kind: type[Engine]) -> Selection:
    """The selection with an engine of a finer kind, or, where that does not fit, with why not.

    Raises:
        ModelError: the check does not fit into memory.
    """
    model = found.engine.model
    reason = kind.refusal(model.module)
    if reason is None:
        try:
            engine = kind(model)
            own = compared(engine, found.engine)
            check = replace(
                found.check, differences=own.deviation, together=own.together, tried=(*found.check.tried, own.tried)
            )
            return Selection(engine, check, found.rejected)
        except MismatchError as error:
            reason = str(error)
        except _DOES_NOT_RUN as error:
            if is_out_of_memory(error):
                raise _too_large(model) from error
            reason = f"{DOES_NOT_RUN}: {one_line(error)}"
    return replace(found, rejected={**found.rejected, kind.name: reason})


def _too_large(model: LoadedModel) -> ModelError:
    return ModelError(
        f"self-check of {name_of(model)}: the graph of {CHECK_TOKENS} tokens does not fit into the "
        f"memory of {model.device} beside the weights: use a larger device, or a smaller model.source "
        "or model.dtype",
        change="model.source",
    )
