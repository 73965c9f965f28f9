"""Make a language model forget chosen facts: fast, robustly, and without harm to the rest.

Collapse of Irrelevant Representations (Sondej & Yang, arXiv 2509.11816) on Hugging Face transformers::

    report = cir.unlearn(model, tokenizer, "facts.jsonl", retain=text, config=cir.CIRConfig(budget=0.001))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cir.config import CIRConfig, EditConfig
    from cir.editor import EditError, Editor
    from cir.edits import Edit
    from cir.evaluation import evaluate
    from cir.facts import Fact, Probe, load_facts
    from cir.profiling import profile
    from cir.relearning import relearn
    from cir.report import Report
    from cir.subspace import Subspaces
    from cir.unlearning import unlearn

_EXPORTS = {
    "CIRConfig": "cir.config",
    "Edit": "cir.edits",
    "EditConfig": "cir.config",
    "EditError": "cir.editor",
    "Editor": "cir.editor",
    "Fact": "cir.facts",
    "Probe": "cir.facts",
    "Report": "cir.report",
    "Subspaces": "cir.subspace",
    "evaluate": "cir.evaluation",
    "load_facts": "cir.facts",
    "profile": "cir.profiling",
    "relearn": "cir.relearning",
    "unlearn": "cir.unlearning",
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
    "profile",
    "relearn",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `import cir` and `cir --help` do not wait for it.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'cir' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
