"""Small worlds of invented facts, in which it is known what a model that never knew would say.

    python -m bench.world [--sizes 2m 8m 30m] [--seeds 0 1 2] [--methods cir editor ...] [--budgets 0.01]
                          [--set FIELD=VALUE ...] [--rates 0.1 0.3] [--subjects 20] [--attacks "adam, fast" ...]
                          [--models worlds] [--out bench/results]

A model is taught a world of people, places and works until it recalls at least 0.9 of it, asked in wordings in which
it was not taught the fact. From the same seed another is taught all but what is to be forgotten: gold. Each method
then makes the first forget, at its best rate inside the budget (of cir floors, of the editor doses, are tried); every
attack is made on both models; and what tells one from the other is the mean difference by fact, with its standard
error, and TOFU's forget quality. What must stay is measured apart: the same relation of other subjects, other
relations of the same subjects, the rest, and text by its mean and by its worst window.

Models are made once and kept in --models, never committed. A row is written to world.jsonl as soon as it is measured,
and one that is there already is not measured again. The table at the end has the means over seeds. --set changes
fields of the configurations of our own methods: --set relearning_steps=0 contrast_weight=1.
"""
