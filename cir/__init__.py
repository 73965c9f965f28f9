"""Make a language model forget chosen facts: fast, robustly, and without harm to the rest.

Collapse of Irrelevant Representations (Sondej & Yang, arXiv 2509.11816) on Hugging Face transformers::

    report = cir.unlearn(model, tokenizer, "facts.jsonl", retain=text, config=cir.CIRConfig(budget=0.001))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cir.config import CIRConfig, EditConfig
    from cir.data.facts import Fact, Probe, load_facts
    from cir.editing.editor import EditError, Editor
    from cir.editing.edits import Edit
    from cir.forgetting.fitting import Subspaces
    from cir.forgetting.locate import locate
    from cir.forgetting.planning import plan
    from cir.forgetting.profiling import profile
    from cir.forgetting.report import Report
    from cir.forgetting.unlearn import unlearn
    from cir.measures import evaluate
    from cir.proof.relearning import relearn

_EXPORTS = {
    "CIRConfig": "cir.config",
    "Edit": "cir.editing.edits",
    "EditConfig": "cir.config",
    "EditError": "cir.editing.editor",
    "Editor": "cir.editing.editor",
    "Fact": "cir.data.facts",
    "Probe": "cir.data.facts",
    "Report": "cir.forgetting.report",
    "Subspaces": "cir.forgetting.fitting",
    "evaluate": "cir.measures",
    "load_facts": "cir.data.facts",
    "locate": "cir.forgetting.locate",
    "plan": "cir.forgetting.planning",
    "profile": "cir.forgetting.profiling",
    "relearn": "cir.proof.relearning",
    "unlearn": "cir.forgetting.unlearn",
}

__version__ = "0.1.0"
__all__ = [
    "CIRConfig",
    "Edit",
    "EditConfig",
    "EditError",
    "Editor",
    "Fact",
    "Probe",
    "Report",
    "Subspaces",
    "evaluate",
    "load_facts",
    "locate",
    "plan",
    "profile",
    "relearn",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `import cir` and `cir --help` do not wait for it.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'cir' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
