"""Extending a finished run: what has to be as it was, and which prompts are left to compute.

`job.extend=URI` makes a run of its own, whose data set begins with the prompts of the run at URI, in their order. It
computes the shards of the prompts behind them, and is read together with the other's parts, which stay where they are
and are never written to (`storage/extension.py`). All else has to be as it was: what differs is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, overload

from neg_service.cluster.ranking import needs_ranking
from neg_service.config import ScanConfig
from neg_service.errors import ConfigurationError, DestinationError, PromptError
from neg_service.measures.base import Measure
from neg_service.places import without_credentials
from neg_service.prompts.encoding import Encode
from neg_service.prompts.prompt import Prompt, digest
from neg_service.schema import SCHEMA_VERSION
from neg_service.storage.neurons import NEURONS_FILE
from neg_service.storage.reader import Run, open_run, reading
from neg_service.storage.run import require_same

# So many ids of prompts that differ are named.
_NAMED = 3
_COLUMNS = ("prompt_id", "prompt", "targets", "answer")


class Window(Sequence[Prompt]):
    """Some of the prompts of a data set, which lie next to each other; texts stay where they are."""

    def __init__(self, prompts: Sequence[Prompt], start: int, stop: int) -> None:
        """Those at the places from `start` to before `stop`."""
        self._prompts, self._places = prompts, range(start, stop)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, place: int | slice) -> Prompt | Sequence[Prompt]:
        """One prompt, or several."""
        places = self._places[place]
        if isinstance(places, int):
            return self._prompts[places]
        if places.step == 1:
            return self._prompts[places.start : max(places.start, places.stop)]
        return [self._prompts[index] for index in places]

    def __iter__(self) -> Iterator[Prompt]:
        """All; those of a file are read a block at a time."""
        return islice(iter(self._prompts), self._places.start, self._places.stop)


def opened_base(config: ScanConfig, uri: str) -> Run:
    """The run at `uri`, which `job.extend` names, or the run that is resumed.

    Raises:
        ConfigurationError: there is none, it is not finished or of another schema, or its neurons would be others with
            more prompts.
    """
    base = open_run(uri, config.storage.endpoint_url, key="job.extend")
    if (version := base.config.get("schema_version")) != SCHEMA_VERSION:
        raise DestinationError(
            f"was stored by another version (schema {version}; this one writes {SCHEMA_VERSION}), and a run has "
            "parts of one schema: scan the whole data set again",
            setting="job.extend",
            value=base.uri,
        )
    if needs_ranking(config.neurons):
        raise ConfigurationError(
            "neurons.over=dataset ranks neurons over all prompts, so that more prompts make them others than the run "
            "has measured: scan the whole data set again, or the new prompts alone with the run's neurons: "
            f"neurons=list neurons.list={base.uri}/{NEURONS_FILE}",
            setting="job.extend",
            value=base.uri,
        )
    if missing := set(range(base.n_shards)) - base.done():
        raise ConfigurationError(
            f"is not finished: {len(missing)} of its {base.n_shards} shards are not done, the first is {min(missing)}; "
            "the command that began it goes on with it",
            setting="job.extend",
            value=base.uri,
        )
    return base


def require_prompts_of(base: Run, prompts: Sequence[Prompt], source: str, encode: Encode) -> None:
    """Refuse a data set that does not begin with the prompts of `base`, or adds none.

    `encode` is asked only where what differs is the place of neurons, of which runs store the token.

    Raises:
        PromptError: saying how many are missing, changed or moved, and which.
    """
    n_before = base.n_prompts
    begins_alike = len(prompts) >= n_before and digest(islice(prompts, n_before)) == base.config["prompts"]["sha256"]
    if begins_alike and len(prompts) > n_before:
        return
    if begins_alike:
        raise PromptError(
            f"has the same {n_before} prompts as job.extend={base.uri}, and none behind them: there is nothing to add",
            setting="dataset.source",
            value=without_credentials(source),
        )
    raise PromptError(
        f"does not begin with the {n_before} prompts of job.extend={base.uri}: {_differences(base, prompts, encode)}",
        setting="dataset.source",
        value=without_credentials(source),
    )


def require_settings_of(base: Run, identity: Mapping[str, Any]) -> None:
    """Refuse an extension whose identity differs from that of `base` in more than its prompts.

    Raises:
        DestinationError: naming each field that differs, with both values.
    """
    before = base.config
    as_before = {key: value for key, value in identity.items() if key != "extends"}
    as_before |= {key: before[key] for key in ("prompts", "extends") if key in before}
    as_before["plan"] = {**identity["plan"], "shards": before["plan"]["shards"]}
    stored = {"fingerprint": base.fingerprint, "identity": before}
    require_same(
        base.directory.store, stored, as_before,
        "job.extend adds prompts and changes nothing else: ask for the same, or scan the whole data set without it",
    )  # fmt: skip


def calibration_for(base: Run, measure: Measure[Any]) -> dict[str, Any]:
    """What run.json is to say of calibration, so that what is added is measured as `base` was: by the same numbers.

    Raises:
        DestinationError: the run does not say its calibration.
    """
    if not measure.has_to_calibrate:
        return {}
    found = base.about.get("calibration")
    if found is None:
        raise DestinationError(
            f"does not say how {measure.name} was calibrated, so that new prompts could not be measured alike: scan "
            "the whole data set again",
            setting="job.extend",
            value=base.uri,
        )
    return {"calibration": found}


def _differences(base: Run, prompts: Sequence[Prompt], encode: Encode) -> str:
    """How the first prompts differ from those that a run has stored, and what to do."""
    advice = "the prompts of the run have to come first, as they were and in their order"
    if "prompts" not in base.tables or not set(_COLUMNS) <= set(base.schemas["prompts"].names):
        return advice
    given = {
        prompt.id: (place, prompt.text, hash((prompt.targets, prompt.answer))) for place, prompt in enumerate(prompts)
    }
    missing, changed, moved, only_targets = [], [], [], 0
    for place, (prompt_id, text, own) in enumerate(_stored(base)):
        if prompt_id not in given:
            missing.append(prompt_id)
            continue
        place_now, text_now, own_now = given[prompt_id]
        if (text, own) != (text_now, own_now):
            changed.append(prompt_id)
            only_targets += text == text_now
        elif place != place_now:
            moved.append(prompt_id)
    kinds = {"missing": missing, "changed": changed, "in another place": moved}
    said = [
        f"{len(ids)} {'is' if len(ids) == 1 else 'are'} {kind} ({_named(ids)})" for kind, ids in kinds.items() if ids
    ]
    if changed and only_targets == len(changed):
        advice += (
            "; where rows have an answer and no targets, these are drawn from the answers of all rows: give the old "
            "rows the targets that the run's table prompts has"
        )
    if not said and (ids := _otherwise(base, prompts, encode)):
        have = "has" if len(ids) == 1 else "have"
        said = [f"{len(ids)} {have} another at, other messages or other wordings ({_named(ids)})"]
    if not said:
        said = ["their texts, targets and answers are as they were, so that something else differs, such as wanted"]
    return "; ".join([", ".join(said), advice])


def _stored(base: Run) -> Iterator[tuple[str, str, int]]:
    """The id, the text, and a hash of the rest, of the prompts of a run in their order."""
    with reading(base):
        for batch in base.table("prompts", columns=_COLUMNS).to_batches():
            for row in batch.to_pylist():
                yield row["prompt_id"], row["prompt"], hash((tuple(row["targets"]), row["answer"]))


def _otherwise(base: Run, prompts: Sequence[Prompt], encode: Encode) -> list[str]:
    """The ids of prompts whose text is as it was, and whose neurons' token, messages or wordings are others."""
    columns = [name for name in ("position", "messages", "wordings") if name in base.schemas["prompts"].names]
    stored: list[dict[str, Any]] = []
    with reading(base):
        for batch in base.table("prompts", columns=columns).to_batches():
            stored += batch.to_pylist()
    found = []
    for one, before in zip(encode(islice(prompts, len(stored))), stored, strict=True):
        messages = [{"role": role, "content": content} for role, content in one.prompt.messages or ()]
        wordings = [text for text, _ in one.prompt.wordings or ()]
        now = {"position": one.at, "messages": messages, "wordings": wordings}
        if any(before[name] != now[name] for name in columns):
            found.append(one.prompt.id)
    return found


def _named(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:_NAMED])) + ", ..." * (len(ids) > _NAMED)
