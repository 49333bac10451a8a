"""Neuron empirical gradients of language models, measured at scale.

The public names load what they need when first used, so that `open_run` works with pyarrow, numpy and s3fs alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neg_service.measures.control.control import ControlResult, control
    from neg_service.measures.control.export import export_shift
    from neg_service.measures.control.exported import ExportedShift, load_shift
    from neg_service.measures.control.generation import Generated, generate
    from neg_service.measures.control.side_effects import SideEffects, side_effects
    from neg_service.measures.edits import Edit
    from neg_service.measures.integrated_gradients import IntegratedGradientsResult, integrated_gradients
    from neg_service.measures.intervene import InterveneResult, intervene
    from neg_service.measures.neg import NegResult, neg
    from neg_service.measures.neurgrad import NeurGradResult, neurgrad
    from neg_service.models.language_model import LanguageModel
    from neg_service.models.loading import load_model
    from neg_service.neurons import NeuronSet
    from neg_service.storage.catalogue import register_run
    from neg_service.storage.reader import Run, Runs, open_run, open_runs

__version__ = "0.1.0"

_HOME = {
    "ControlResult": "neg_service.measures.control.control",
    "Edit": "neg_service.measures.edits",
    "ExportedShift": "neg_service.measures.control.exported",
    "Generated": "neg_service.measures.control.generation",
    "IntegratedGradientsResult": "neg_service.measures.integrated_gradients",
    "InterveneResult": "neg_service.measures.intervene",
    "LanguageModel": "neg_service.models.language_model",
    "NegResult": "neg_service.measures.neg",
    "NeurGradResult": "neg_service.measures.neurgrad",
    "NeuronSet": "neg_service.neurons",
    "Run": "neg_service.storage.reader",
    "Runs": "neg_service.storage.reader",
    "SideEffects": "neg_service.measures.control.side_effects",
    "control": "neg_service.measures.control.control",
    "export_shift": "neg_service.measures.control.export",
    "generate": "neg_service.measures.control.generation",
    "integrated_gradients": "neg_service.measures.integrated_gradients",
    "intervene": "neg_service.measures.intervene",
    "load_model": "neg_service.models.loading",
    "load_shift": "neg_service.measures.control.exported",
    "neg": "neg_service.measures.neg",
    "neurgrad": "neg_service.measures.neurgrad",
    "open_run": "neg_service.storage.reader",
    "open_runs": "neg_service.storage.reader",
    "register_run": "neg_service.storage.catalogue",
    "side_effects": "neg_service.measures.control.side_effects",
}
__all__ = [
    "ControlResult",
    "Edit",
    "ExportedShift",
    "Generated",
    "IntegratedGradientsResult",
    "InterveneResult",
    "LanguageModel",
    "NegResult",
    "NeurGradResult",
    "NeuronSet",
    "Run",
    "Runs",
    "SideEffects",
    "control",
    "export_shift",
    "generate",
    "integrated_gradients",
    "intervene",
    "load_model",
    "load_shift",
    "neg",
    "neurgrad",
    "open_run",
    "open_runs",
    "register_run",
    "side_effects",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
