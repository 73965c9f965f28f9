"""Make a language model forget chosen facts: fast, robustly, and without harm to the rest.

Collapse of Irrelevant Representations (Sondej & Yang, arXiv 2509.11816) on Hugging Face transformers::

    report = cir.unlearn(model, tokenizer, "facts.jsonl", retain=text, config=cir.CIRConfig(budget=0.001))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cir.config import CIRConfig, EditConfig
    from cir.data.facts import Fact, Probe, load_facts
    from cir.editing.editor import Editor
    from cir.editing.edits import Edit
    from cir.editing.errors import AlreadyForgottenError, EditError, UnknownFactError
    from cir.forgetting.events import RoundEvent, StepEvent
    from cir.forgetting.fitting import Subspaces
    from cir.forgetting.locate import locate
    from cir.forgetting.planning import plan
    from cir.forgetting.profiling import profile
    from cir.forgetting.report import Report, hash_facts
    from cir.forgetting.unlearn import unlearn
    from cir.hub import push_to_hub
    from cir.measures import NonFiniteError, evaluate
    from cir.model.checkpoints import load_model
    from cir.proof.benchmarks import benchmark
    from cir.proof.relearning import relearn

_EXPORTS = {
    "AlreadyForgottenError": "cir.editing.errors",
    "CIRConfig": "cir.config",
    "Edit": "cir.editing.edits",
    "EditConfig": "cir.config",
    "EditError": "cir.editing.errors",
    "Editor": "cir.editing.editor",
    "Fact": "cir.data.facts",
    "NonFiniteError": "cir.measures",
    "Probe": "cir.data.facts",
    "Report": "cir.forgetting.report",
    "RoundEvent": "cir.forgetting.events",
    "StepEvent": "cir.forgetting.events",
    "Subspaces": "cir.forgetting.fitting",
    "UnknownFactError": "cir.editing.errors",
    "benchmark": "cir.proof.benchmarks",
    "evaluate": "cir.measures",
    "hash_facts": "cir.forgetting.report",
    "load_facts": "cir.data.facts",
    "load_model": "cir.model.checkpoints",
    "locate": "cir.forgetting.locate",
    "plan": "cir.forgetting.planning",
    "profile": "cir.forgetting.profiling",
    "push_to_hub": "cir.hub",
    "relearn": "cir.proof.relearning",
    "unlearn": "cir.forgetting.unlearn",
}

__version__ = "0.1.0"
__all__ = [
    "AlreadyForgottenError",
    "CIRConfig",
    "Edit",
    "EditConfig",
    "EditError",
    "Editor",
    "Fact",
    "NonFiniteError",
    "Probe",
    "Report",
    "RoundEvent",
    "StepEvent",
    "Subspaces",
    "UnknownFactError",
    "benchmark",
    "evaluate",
    "hash_facts",
    "load_facts",
    "load_model",
    "locate",
    "plan",
    "profile",
    "push_to_hub",
    "relearn",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `import cir` and `cir --help` do not wait for it.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'cir' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
