"""WMDP: hazardous biology and chemistry, and attacks on computers."""

from __future__ import annotations

from cir.data.sources.source import CHOICES, Source, multiple_choice, same_choice

_LI = "Li et al. 2024, arXiv 2403.03218"
_ROBUST = (
    "bioweapons_and_bioterrorism",
    "dual_use_virology",
    "enhanced_potential_pandemic_pathogens",
    "expanding_access_to_threat_vectors",
    "reverse_genetics_and_easy_editing",
    "viral_vector_research",
)


def _wmdp(hub: str, places: tuple[tuple[str, str], ...], holds: str, cite: str) -> Source:
    return Source(
        hub,
        {"facts": places},
        holds,
        f"{CHOICES} and, in the corpus form, sentences",
        cite,
        multiple_choice,
        same_choice,
        benchmark={"facts": places},
    )


WMDP_BIO = _wmdp("cais/wmdp", (("wmdp-bio", "test"),), "multiple-choice questions on hazardous biology", _LI)
WMDP_CYBER = _wmdp("cais/wmdp", (("wmdp-cyber", "test"),), "multiple-choice questions on attacks on computers", _LI)
WMDP_CHEM = _wmdp("cais/wmdp", (("wmdp-chem", "test"),), "multiple-choice questions on hazardous chemistry", _LI)
WMDP_BIO_ROBUST = _wmdp(
    "EleutherAI/wmdp_bio_robust_mcqa",
    tuple((topic, "robust") for topic in _ROBUST),
    "those of wmdp-bio that cannot be guessed from their choices alone",
    "O'Brien et al. 2025, arXiv 2508.06601",
)
