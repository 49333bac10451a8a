"""What of a model's output is measured: a target's probability, its logarithm, its log-odds, or its logit.

With p the probability of target k, z its logit, and w_j = p_j / Σ_j p_j over the prompt's other targets j:

    readout            against      value                                unit
    probability        -            p_k                                  probability
    log_probability    -            log p_k                              nats
    log_odds           -            log p_k - log(1 - p_k)               nats; against the whole vocabulary's rest
    log_odds           j            log p_k - log p_j                    nats
    log_odds           others       log p_k - log Σ_j p_j                nats
    logit              -            z_k                                  logits
    logit              j            z_k - z_j                            logits
    logit              others       z_k - mean_j z_j                     logits

Changes are never had by subtracting values: the difference readout gives Δ log p and Δz (`readout.py`), and

    Δ log odds  =  Δ log p - log1p(-expm1(Δ log p)·p / (1 - p))
    Δ against others  =  Δz_k - log1p(Σ_j w_j·expm1(Δz_j))

Each value's gradient is a combination of the targets' own, with coefficients that depend on the prompt's output alone.

Axes: K targets of a prompt, C of them that are measured, M neurons, I interventions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.measures.readouts import Readouts
from neg_service.models.transfer import indices
from neg_service.prompts.prompt import Prompt


@dataclass(frozen=True)
class Output:
    """What is measured of one prompt's targets.

    kept: those that are measured [C], in their order: all but the one that the others are compared with. against: that
    one's place, None where there is none.
    """

    readouts: Readouts
    n_targets: int
    against: int | None = None

    @classmethod
    def of(cls, readouts: Readouts, prompt: Prompt) -> Output:
        """Of a prompt.

        Raises:
            PromptError: it has no such target, or no other.
        """
        return cls(readouts, len(prompt.targets), readouts.place(prompt))

    @property
    def kept(self) -> tuple[int, ...]:
        """See above."""
        return tuple(k for k in range(self.n_targets) if k != self.against)

    def of_kept(self, value_k: Tensor) -> Tensor:
        """Of each target, those of the targets that are measured."""
        return value_k if self.against is None else value_k[indices(self.kept, value_k.device)]

    @property
    def differentiates_logits(self) -> bool:
        """Whether gradients are combined of those of logits; otherwise of those of log p."""
        return self.readouts.readout == "logit" and not self.readouts.is_contrast

    def change(self, log_p_ik: Tensor, logit_ik: Tensor, p_k: Tensor, rest_k: Tensor) -> Tensor:
        """The change of each value [..., C], float64, from Δ log p and Δz [..., K].

        p_k, rest_k: probabilities without the change, and all others' beside each, float64.
        """
        readout, kept = self.readouts.readout, list(self.kept)
        if self.readouts.is_contrast:
            return self._contrasted(logit_ik.double(), p_k)[..., kept]
        if readout == "logit":
            return logit_ik.double()
        change_ik = log_p_ik.double()
        if readout == "probability":
            return p_k * change_ik.expm1()
        if readout == "log_odds":
            return change_ik - torch.log1p(-change_ik.expm1() * (p_k / rest_k))
        return change_ik

    def _contrasted(self, logit_ik: Tensor, p_k: Tensor) -> Tensor:
        if self.against is not None:
            return logit_ik - logit_ik[..., self.against, None]
        if self.readouts.readout == "logit":
            # The mean of all but the own one.
            return (logit_ik - logit_ik.mean(-1, keepdim=True)) * (self.n_targets / (self.n_targets - 1))
        others_kk = _others(p_k)
        return logit_ik - torch.log1p(logit_ik.expm1() @ others_kk.T)

    def gradients(self, slope_km: Tensor, p_k: Tensor, rest_k: Tensor) -> Tensor:
        """The gradient of each value [C, M], from those of log p or, see above, of logits [K, M]."""
        kept = list(self.kept)
        if self.readouts.readout in ("log_probability", "logit") and not self.readouts.is_contrast:
            return slope_km
        if self.readouts.is_contrast:
            return self._coefficients(p_k)[kept].to(slope_km.dtype) @ slope_km
        return slope_km * (p_k if self.readouts.readout == "probability" else 1 / rest_k).to(slope_km.dtype)[:, None]

    def _coefficients(self, p_k: Tensor) -> Tensor:
        """[K, K]: of each target's value, what it takes of each target's gradient."""
        own_kk = torch.eye(self.n_targets, dtype=torch.float64, device=p_k.device)
        if self.against is not None:
            return own_kk - own_kk[self.against]
        if self.readouts.readout == "logit":
            return own_kk - (1 - own_kk) / (self.n_targets - 1)
        return own_kk - _others(p_k)

    def depends(self, is_there_nk: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether what is there for each target [n, K] is there for each value [n, C]: also for what it is compared
        with."""
        if self.readouts.is_contrast:
            others = range(self.n_targets) if self.against is None else [self.against]
            is_there_nk = is_there_nk | is_there_nk[:, list(others)].any(1, keepdims=True)
        return is_there_nk[:, list(self.kept)]

    def noise(self, p_k: Tensor, rest_k: Tensor) -> Tensor:
        """How much further than Δ log p each value's change is off [C], float64."""
        own_p_c = self.of_kept(p_k)
        if self.readouts.readout == "probability":
            return own_p_c
        if self.readouts.readout == "log_odds" and not self.readouts.is_contrast:
            return 1 / self.of_kept(rest_k)
        # A logit has errors that the sum over the vocabulary takes off a probability; a contrast has those of two.
        return torch.full_like(own_p_c, 1.0 if self.readouts.readout == "log_probability" else 2.0)


def _others(p_k: Tensor) -> Tensor:
    """w [K, K]: what each other target has of all others' probability, zero of the own one."""
    others_kk = p_k.expand(len(p_k), -1) * (1 - torch.eye(len(p_k), dtype=p_k.dtype, device=p_k.device))
    return others_kk / others_kk.sum(1, keepdim=True)
