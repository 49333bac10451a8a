"""python -m jobs.tasks: what the tasks of MCEval8K are, and how a row of one is put to a model. `--help` says more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from jobs.entry import start
from neg_service.config import DatasetConfig, JobConfig, typed
from neg_service.settings import holds

if TYPE_CHECKING:
    from neg_service.prompts.prompt import Prompt


@dataclass
class TokensOf:
    """The model whose tokens an example is shown with."""

    source: str | None = None


@dataclass
class TasksConfig:
    """Everything that `python -m jobs.tasks` is told."""

    task: Any = field(default=None, metadata=holds(str | list[str] | None))
    model: TokensOf = field(default_factory=TokensOf)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    job: JobConfig = field(default_factory=JobConfig)


def tasks(config: DictConfig) -> int:
    """Without a task the list of them, else an example of each that was named."""
    # Slow to load: see `entry.py`.
    from neg_service.prompts.mceval8k import chosen_tasks, load_tasks

    if config.task is None:
        print(_listed())
        return 0
    dataset = typed(DatasetConfig, config.dataset, "dataset")
    for name in chosen_tasks(config.task):
        dataset.task = name
        prompts = load_tasks(dataset)
        print(_described(name, prompts[0], len(prompts), dataset, config.model.source))
    return 0


def _listed() -> str:
    from neg_service.prompts.tasks import GENRES, TASKS
    from neg_service.prompts.templates import templates_of
    from neg_service.report.console import columns

    rows = []
    for genre in GENRES:
        for task in TASKS.values():
            if task.genre == genre:
                templates = templates_of(task)
                languages = ", ".join(templates["default"])
                rows.append((genre, task.name, f"{task.n_labels}", languages, ", ".join(templates)))
    return columns(("genre", "task", "labels", "languages", "templates"), rows, text=(0, 1, 3, 4))


def _described(name: str, prompt: Prompt, count: int, dataset: DatasetConfig, model_source: str | None) -> str:
    tokens = ""
    if model_source is not None:
        # Slow to load: see `entry.py`.
        from neg_service.models.inspection import inspect_model, mask_token_of
        from neg_service.models.loading import load_tokenizer
        from neg_service.models.source import fetch
        from neg_service.prompts.mceval8k import as_masked
        from neg_service.prompts.tokens import encode

        local = fetch(model_source, with_weights=False)
        tokenizer, info = load_tokenizer(local), inspect_model(local)
        mask_token = mask_token_of(tokenizer, info.name, info.n_input_ids) if info.is_masked else None
        prompt = as_masked(prompt) if info.is_masked else prompt
        (encoded,) = encode(tokenizer, [prompt], info.context_length, mask_token, model=info)
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(list(encoded.target_ids))))
        tokens = f"--- {len(encoded.ids)} tokens; the labels are the tokens {names}\n"
    labels = " or ".join(map(repr, prompt.targets))
    return (
        f"--- {name}, template {dataset.template}: {count} prompts of {dataset.split}; this is {prompt.id}\n"
        f"{prompt.text}\n"
        f"--- labels {labels}; right is {prompt.targets[prompt.answer or 0]!r}\n"
        f"{tokens}"
    )


if __name__ == "__main__":
    start("tasks", tasks, TasksConfig)
