"""All methods on the same facts, budget and attacks: how robustly each forgets, and at what price.

    python -m bench.quality [--small] [--ablate] [--methods cir npo ...] [--seeds 0 1 2] [--budgets 0.001 0.003]
                            [--relearn T.jsonl --probe V.jsonl] [--neighbours N.jsonl] [--retain R.txt]
                            [--disruption D.txt] [--forget F.jsonl] [--contrast C.jsonl] [--same-subject S.jsonl]
                            [--model M] [--gold G] [--out bench/results] [--report]

Both splits are forgotten, T and V, or F where that is given; cir is told that C must stay. Every attacker then trains
on T, and recall of V tells what comes back. Of each baseline the best rate is found on the first seed: that
which forgets most inside the budget, the last epoch's change scaled back along its line where it oversteps. As
baselines train on the retain text, the loss on text of its kind falls whatever they harm: they are held to the budget
in KL as well, in units of the original loss. A row is written as soon as it is measured, and one that is in --out
already is not measured again. The report is quality.html, with quality.png, beside the rows; --report only draws it.
"""

from bench.quality.runs import run

__all__ = ["run"]
