"""A language model ready to be measured: weights, tokenizer, where its neurons live, and proof that both fit.

The self-check is why numbers can be trusted on an architecture that nobody here has seen: before anything is
measured, the branches must reproduce the plain forward pass, the captured neurons must reproduce their MLP, and
a small poke must move the output as the gradient says.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from neg_service.errors import ConfigurationError, ModelError, one_line
from neg_service.models import branches
from neg_service.models.feed_forward import FeedForward, Site, find_feed_forward, visiting
from neg_service.models.rows import BranchRows, Rows
from neg_service.models.source import LocalModel, fetch, require_complete

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How far branch logits may be from plain ones, against the largest plain logit; how far a poke from the gradient.
# Measured deviations: about 1e-6 in float32, in float64 too where norms round to float32 regardless, and 1e-2 in
# bfloat16; an engine that is wrong is off by 0.1 and more.
LOGIT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
POKE_TOLERANCE = 0.05


@dataclass(frozen=True)
class ModelInfo:
    """What can be said of a model without loading its weights."""

    name: str
    identity: str
    architecture: str
    n_layers: int
    n_neurons: int
    context_length: int | None
    n_parameters: int
    is_gated: bool


@dataclass(frozen=True)
class SelfCheck:
    """The largest deviations that the self-check saw, all relative; `poke` is None where precision is too low."""

    logits: float
    neurons: float
    poke: float | None


class LanguageModel:
    """A causal language model in evaluation mode, with its tokenizer and its feed-forward neurons."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, *, name: str = "model", identity: str = "unknown"
    ) -> None:
        """Wrap a loaded model; its parameters are frozen.

        Raises:
            ModelError: an architecture whose neurons are not known.
        """
        _require_measurable(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.identity = identity
        self.feed_forward: FeedForward = find_feed_forward(model)
        self._headers: list[branches.Header] = []
        self._checked: SelfCheck | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs go; with several devices, the first layer's."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of weights and activations."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def context_length(self) -> int | None:
        """The most tokens a prompt may have; None where the configuration gives no limit."""
        return _context_length(self.model.config)

    def header(self, ids: Sequence[int], keep: int = 4) -> branches.Header:
        """Keys and values of a shared beginning, run once and kept while it is among the last `keep` used."""
        wanted = tuple(ids)
        header = next((known for known in self._headers if known.ids == wanted), None)
        if header is None:
            header = branches.run_header(self.model, wanted) if wanted else branches.Header()
        else:
            self._headers.remove(header)
        self._headers = [header, *self._headers[: keep - 1]]
        return header

    def rows(self, ids: Sequence[int], header: Sequence[int] = ()) -> Rows:
        """A prompt's tokens, ready to be run in rows; `header` are first ones that other prompts share."""
        return BranchRows(self.model, ids, self.header(header))

    def known_header(self, prompts: Sequence[Sequence[int]]) -> int:
        """Length of the longest header already run with which all `prompts` begin, leaving each its last token."""

        def serves(ids: tuple[int, ...]) -> bool:
            return all(len(prompt) > len(ids) and tuple(prompt[: len(ids)]) == ids for prompt in prompts)

        return max((len(known.ids) for known in self._headers if serves(known.ids)), default=0)

    def forget_headers(self) -> None:
        """Free the kept headers' memory."""
        self._headers = []

    def ensure_checked(self) -> SelfCheck:
        """The self-check, run when first needed and remembered.

        Raises:
            ModelError: see `self_check`.
        """
        if self._checked is None:
            self._checked = self.self_check()
        return self._checked

    def self_check(self) -> SelfCheck:
        """Compare the engine with the plain model on a few tokens; see the module's header.

        Raises:
            ModelError: a deviation beyond its tolerance, with both numbers, or an engine that does not run at all.
        """
        try:
            return self._self_check()
        except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"self-check of {self.name} ({type(self.model).__name__}): the engine does not run on it: "
                f"{one_line(error)}: choose another model.source"
            ) from error

    def _self_check(self) -> SelfCheck:
        ids = self._check_ids()
        tolerance = LOGIT_TOLERANCE[self.dtype]
        logits = self._check_logits(ids)
        neurons = self._check_neurons(ids)
        for what, deviation in (("branch logits", logits), ("captured neurons", neurons)):
            # Written so that NaN fails too.
            if not deviation <= tolerance:
                raise ModelError(
                    f"self-check of {self.name} ({type(self.model).__name__}): {what} are {deviation:.1e} off the "
                    f"plain forward pass, at most {tolerance:.0e} is allowed in {self.dtype}: choose another "
                    f"model.source or model.dtype"
                )
        poke = self._check_poke(ids) if self.dtype in (torch.float32, torch.float64) else None
        if poke is not None and not poke <= POKE_TOLERANCE:
            raise ModelError(
                f"self-check of {self.name} ({type(self.model).__name__}): a small shift of a neuron moves the "
                f"output {poke:.1e} (relative) away from what its gradient says, at most {POKE_TOLERANCE} is allowed"
            )
        return SelfCheck(logits, neurons, poke)

    def _check_ids(self) -> tuple[int, ...]:
        # All different: with equal tokens a prefix in the wrong order would go unseen.
        n_tokens = self.model.get_input_embeddings().weight.shape[0]
        return tuple(n_tokens * (2 * i + 1) // 24 for i in range(12))

    @torch.no_grad()
    def _plain_logits(self, ids: Sequence[int]) -> Tensor:
        # Every position's logits, because not every architecture can be asked for the last alone.
        logits: Tensor = self.model(torch.tensor([ids], device=self.device), use_cache=False).logits
        return logits[0, -1]

    @torch.no_grad()
    def _check_logits(self, ids: tuple[int, ...]) -> float:
        plain = self._plain_logits(ids)
        worst = 0.0
        # The same prompt, with and without a header, beside one of another length, with two branches each.
        for header_length in (0, len(ids) // 2):
            header = branches.run_header(self.model, ids[:header_length]) if header_length else branches.Header()
            prefix = branches.run_prefix(self.model, [ids, ids[: len(ids) - 2]], header)
            if len(prefix.keys_bgtd) != self.feed_forward.n_layers:
                raise ModelError(
                    f"{type(self.model).__name__} does not go through transformers' attention interface in "
                    f"{self.feed_forward.n_layers - len(prefix.keys_bgtd)} of its {self.feed_forward.n_layers} "
                    f"layers: choose another model.source"
                )
            logits = branches.run_branches(self.model, prefix, [2, 1])[:2]
            worst = max(worst, _deviation(logits, plain))
        return worst

    @torch.no_grad()
    def _check_neurons(self, ids: tuple[int, ...]) -> float:
        """The input of the down projection against what it should be made of: the activation, times up if gated."""
        found = self.feed_forward
        act = [Site(mlp.get_submodule(found.layout.act), "output", 0, found.n_neurons) for mlp in found.mlps]
        sites = {"act": act, "paper": found.sites("paper"), "hidden": found.sites("hidden")}
        seen: dict[tuple[str, int], Tensor] = {}

        def keep(name: str) -> AbstractContextManager[None]:
            return visiting(
                dict(enumerate(sites[name])),
                lambda layer, x: seen.update({(name, layer): sites[name][layer].neurons(x)}),
            )

        with keep("act"), keep("paper"), keep("hidden"):
            self._plain_logits(ids)
        worst = 0.0
        for layer in range(found.n_layers):
            rebuilt = seen["act", layer]
            if found.layout.is_gated:
                rebuilt = rebuilt * seen["paper", layer]
            worst = max(worst, _deviation(rebuilt, seen["hidden", layer]))
        return worst

    def _check_poke(self, ids: tuple[int, ...]) -> float:
        """In three layers, move the neuron that the engine calls steepest so that log p should change by 1 %."""
        found = self.feed_forward
        sites = dict(enumerate(found.sites("paper")))
        target = int(self._plain_logits(ids).argmax())
        captured: dict[int, Tensor] = {}

        def capture(layer: int, x: Tensor) -> Tensor | None:
            captured[layer] = x if x.requires_grad else x.detach().requires_grad_()
            return captured[layer]

        prefix = branches.run_prefix(self.model, [ids], branches.Header())
        with torch.enable_grad(), visiting(sites, capture):
            log_p = branches.run_branches(self.model, prefix, [1])[0].log_softmax(-1)[target]
            layers = sorted({0, found.n_layers // 2, found.n_layers - 1})
            gradients = torch.autograd.grad(log_p, [captured[layer] for layer in layers])
        worst = 0.0
        for layer, gradient in zip(layers, gradients, strict=True):
            slopes = sites[layer].neurons(gradient).reshape(-1, found.n_neurons)[-1]
            neuron = int(slopes.abs().argmax())
            step = 0.01 / float(slopes[neuron])
            moved = [self._log_p_with(sites, layer, neuron, shift, ids, target) for shift in (step, -step)]
            worst = max(worst, abs((moved[0] - moved[1]) / 0.02 - 1))
        return worst

    @torch.no_grad()
    def _log_p_with(
        self, sites: dict[int, Site], layer: int, neuron: int, shift: float, ids: Sequence[int], target: int
    ) -> float:
        site = sites[layer]

        def poke(_layer: int, x: Tensor) -> Tensor:
            poked = x.clone()
            site.neurons(poked).view(-1, site.size)[-1, neuron] += shift
            return poked

        with visiting({layer: site}, poke):
            return float(self._plain_logits(ids).double().log_softmax(-1)[target])


def load_model(
    source: str = "smollm2",
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model for measuring.

    Args:
        source: `smollm2` (the default model), a hub id, a directory with safetensors, or a .gguf file.
        revision: branch, tag or commit, for a hub id.
        dtype: float32, bfloat16 or float16; float32 computes without TF32.
        device: a torch device, or `auto`: a GPU if there is one.
        trust_remote_code: run Python code that comes with the model; off unless asked for.

    Raises:
        ModelError: nothing usable at `source`, or an architecture whose neurons are not known.
        ConfigurationError: an unknown dtype or a device that is not there.
    """
    chosen_dtype = checked_dtype(dtype)
    chosen_device = checked_device(device)
    local = fetch(source, revision, trust_remote_code=trust_remote_code)
    _be_quiet()
    if chosen_dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")
    model, report = _from_files(
        lambda: AutoModelForCausalLM.from_pretrained(
            local.directory,
            dtype=chosen_dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        ),
        source,
    )
    require_complete(source, report)
    model = model.to(chosen_device)
    return LanguageModel(model, load_tokenizer(local, trust_remote_code), name=local.name, identity=local.identity)


def load_tokenizer(local: LocalModel, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model's weights."""
    _be_quiet()
    return _from_files(
        lambda: AutoTokenizer.from_pretrained(local.directory, trust_remote_code=trust_remote_code),
        str(local.directory),
    )


def inspect_model(local: LocalModel, trust_remote_code: bool = False) -> ModelInfo:
    """Describe a model from its configuration alone: built without memory for weights.

    Raises:
        ModelError: an architecture whose neurons are not known, or not a causal language model.
    """
    _be_quiet()

    def build() -> PreTrainedModel:
        config = AutoConfig.from_pretrained(local.directory, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    model = _from_files(build, local.name)
    _require_measurable(model)
    found = find_feed_forward(model)
    return ModelInfo(
        name=local.name,
        identity=local.identity,
        architecture=type(model).__name__,
        n_layers=found.n_layers,
        n_neurons=found.n_neurons,
        context_length=_context_length(model.config),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        is_gated=found.layout.is_gated,
    )


def checked_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a name in the configuration."""
    if dtype not in DTYPES:
        raise ConfigurationError(f"model.dtype={dtype} is unknown; known are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def checked_device(device: str) -> torch.device:
    """The torch device of a name in the configuration, if it is there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"model.device={device} is not a device; use auto, cpu or cuda") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"model.device={device}: this machine has {torch.cuda.device_count()} GPUs; use auto or cpu"
        )
    return chosen


def _from_files(load: Any, source: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.source={source}: cannot be loaded: {one_line(error)}") from error


def _require_measurable(model: PreTrainedModel) -> None:
    """Refuse what the engine would get wrong without the self-check's seeing it."""
    if model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; a causal model is needed (model.source)")
    # These choose their angles by the longest position of a pass, so that one prompt would change another's.
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if found := kinds & {"longrope", "dynamic"}:
        raise ModelError(
            f"{type(model).__name__} has rotary angles that depend on a pass's longest position (rope_type "
            f"{found.pop()}), which batches of prompts cannot share: choose another model.source"
        )


def _context_length(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, against the largest expected value."""
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.double() - expected.double()).abs().max() / scale)


def _be_quiet() -> None:
    """A progress bar over weight tensors tells a person nothing here, and would break the scan's own."""
    transformers_logging.disable_progress_bar()


def set_threads(threads: int) -> None:
    """How many CPU threads torch uses in this process."""
    torch.set_num_threads(max(1, threads))
