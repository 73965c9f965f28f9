from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import many
from bench.quality.measuring import Bench, knowledge
from bench.world import grammar, runs, training
from bench.world.grammar import OBJECTS, World
from bench.world.report import table
from bench.world.training import Size, check_gold, prepared
from cir import CIRConfig, unlearn
from cir.forgetting import counterfactuals
from cir.measures import mean_recall, recall
from cir.model.checkpoints import load_model

SIZE = Size(4, 96, 256, 24, 4e-3, 0.3)


@pytest.fixture(scope="module")
def world():
    return World(subjects=8)


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """Folders of a model that was taught the world, and of its gold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "KNOWN", 0.5)  # so small a world takes longer to generalise than a test may
        return prepared(world, SIZE, tmp_path_factory.mktemp("worlds"), "small")


def test_a_world_is_the_same_for_a_seed_and_holds_what_it_says(world):
    again, other = World(subjects=8), World(subjects=8, seed=1)
    assert again.facts == world.facts != other.facts
    assert again.text(500, seed=3) == world.text(500, seed=3)
    facts = [fact for own in world.facts.values() for fact in own]
    assert len(facts) == 8 * sum(map(len, grammar.KINDS.values()))
    tokenizer = world.tokenizer()
    for fact in facts:
        asked = {probe.prompt for probe in fact.probes}
        told = {sentence.rpartition(fact.probes[0].target)[0] for sentence in fact.sentences}
        assert not asked & told
        ids = [token for text in (*fact.sentences, *asked) for token in tokenizer(text)["input_ids"]]
        assert tokenizer.unk_token_id not in ids
        wrong = world.wrong_answers(fact)
        assert len(wrong) == OBJECTS - 1
        assert fact.probes[0].target not in wrong
    assert tokenizer.unk_token_id not in tokenizer(world.text(2000, seed=0)[0])["input_ids"]


def test_the_split_parts_the_facts_by_relation_and_by_subject(world):
    split = world.split
    facts = [fact for own in world.facts.values() for fact in own]
    parts = [split.forget, split.related, split.same_relation, split.same_subject, split.unrelated]
    assert sorted(f.id for part in parts for f in part) == sorted(f.id for f in facts)

    def of(part, place):
        return {fact.id.split(": ")[place] for fact in part}

    gone = split.forgotten
    assert not of(split.same_relation, 0) & of(gone, 0)
    assert of(split.same_relation, 1) == of(gone, 1)
    assert of(split.same_subject, 0) == of(gone, 0)
    assert not of(split.same_subject, 1) & of(gone, 1)
    assert not of(split.unrelated, 0) & of(gone, 0)
    assert not of(split.unrelated, 1) & of(gone, 1)


def test_the_entropy_of_the_text_is_that_of_its_choices(world, monkeypatch):
    monkeypatch.setattr(grammar, "SENTENCES", ("the <noun> <verb>",))
    choices = [len(grammar.SLOTS[slot].split()) for slot in ("<noun>", "<verb>")]
    assert world.text(300, seed=0)[1] == pytest.approx(math.log(math.prod(choices)) / 3)


def test_too_small_a_world_a_poor_learner_and_a_leak_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="subjects: expected 8, for a split, to 1000 of each kind, got 4"):
        World(subjects=4)
    with pytest.raises(
        ValueError, match=r"taught: expected a model that learned its world to a recall of 0\.9, got 0"
    ):
        prepared(world, Size(1, 32, 64, 1, 1e-3, 0.3), tmp_path, "poor")
    assert not list(tmp_path.iterdir())
    check_gold({f"f{i}": float(i % OBJECTS == 0) for i in range(2 * OBJECTS)})
    with pytest.raises(ValueError, match=r"gold: expected a recall of 0\.062, chance, .* got 0\.500 .*: a leak"):
        check_gold({f"f{i}": float(i % 2) for i in range(40)})


def test_ours_against_gold(models, tmp_path, monkeypatch, capsys):
    taught, gold = models
    monkeypatch.setitem(training.SIZES, "small", SIZE)
    about = json.loads((gold / "learned.json").read_text())
    assert about["entropy"] < about["loss"] < 1.15 * about["entropy"]
    method = runs.Method((-6.0,), runs.METHODS["cir"].config)
    given = {"budgets": [0.05], "attacks": ["adam, fast"], "subjects": 8, "models": taught.parent}
    given |= {"path": tmp_path / "world.jsonl", "changes": {}}
    untouched, ours = runs.compare("small", 0, {"cir": method}, **given)
    assert untouched["recall"] > 0.4
    assert untouched["gold_recall"] < 0.2
    assert untouched["gold"]["recall"]["value"] == pytest.approx(
        untouched["recall"] - untouched["gold_recall"], abs=1e-4
    )
    assert untouched["forget_quality"] <= ours["forget_quality"]  # of so few facts a p-value says no more
    assert ours["recall"] < 0.5 * untouched["recall"]
    assert ours["gold"]["worst"]["value"] == pytest.approx(ours["worst"] - ours["gold_attacked"], abs=1e-4)
    assert {"neighbours", "same_subject", "unrelated", "worst_window"} <= ours.keys()
    assert "left aside" not in capsys.readouterr().out
    written = (tmp_path / "world.jsonl").read_text()
    (tmp_path / "world.jsonl").write_text(written + written.replace(f'"version": {training.VERSION}', '"version": 0'))
    for first, again in zip([untouched, ours], runs.compare("small", 0, {"cir": method}, **given), strict=True):
        assert {key: again[key] for key in first} == json.loads(json.dumps(first))
    assert len((tmp_path / "world.jsonl").read_text().splitlines()) == 4
    assert "2 rows of another version, size or world are left aside" in capsys.readouterr().out
    lines = table([untouched, ours]).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["untouched", "cir"]
    assert "±" in lines[2]


def test_an_editor_forgets_in_a_world_and_its_weights_come_back(world, models):
    bench = Bench(str(models[0]), runs.task_of(world, models[1], ["adam, fast"]))
    before = [p.detach().clone() for p in bench.model.parameters()]
    outcome = runs.edit(bench, runs.METHODS["editor"].config, 0.05, 0)
    assert outcome.measure.rise_bound <= 0.05
    assert outcome.measure.mean_recall < bench.before.mean_recall
    assert all(map(torch.equal, bench.model.parameters(), before))


def test_other_facts_of_the_relation_stay_though_none_was_given(world, models, monkeypatch):
    split, fell = world.split, {}
    for count in (0, counterfactuals.SENTENCES):
        monkeypatch.setattr(counterfactuals, "SENTENCES", count)
        model, tokenizer = load_model(str(models[0]))
        before = mean_recall(recall(model, tokenizer, split.same_relation))
        given = {"contrast": (), "retain": world.text(4000, 1)[0], "progress": False}
        unlearn(model, tokenizer, split.forget, config=CIRConfig(budget=1.0, worst_window=5.0), **given)
        assert mean_recall(recall(model, tokenizer, split.forget)) < 0.05
        fell[count] = before - mean_recall(recall(model, tokenizer, split.same_relation))
    assert fell[counterfactuals.SENTENCES] < 0.5 * fell[0]


def test_cir_is_told_what_must_stay_and_the_papers_way_is_not(world):
    task = runs.task_of(world, "gold")
    asked = SimpleNamespace(task=task, forget_with=lambda config, contrast=(): (config, contrast))
    config, contrast = runs.forget(asked, "cir", runs.METHODS["cir"], -4.0, 0.05, 1)
    assert (config.floor, config.budget, config.seed) == (-4.0, 0.05, 1)
    split = world.split
    assert {fact.id for fact in contrast} < {fact.id for fact in [*split.same_relation, *split.same_subject]}
    assert not {fact.id for fact in contrast} & {fact.id for fact in [*task.neighbours, *task.same_subject]}
    config, contrast = runs.forget(asked, "paper", runs.METHODS["paper"], 0.3, 0.05, 1)
    assert (config.rate, config.budget, config.seed, config.max_epochs) == (0.3, 0.05, 1, task.epochs)
    assert not contrast


def test_what_is_known_is_measured_before_and_after_each_attack(world, models):
    bench = Bench(str(models[0]), runs.task_of(world, models[1], ["adam, fast"]))
    own = knowledge(bench.model, bench.tokenizer, bench.task)
    assert own.before == pytest.approx(recall(bench.model, bench.tokenizer, world.split.forget), rel=1e-4)
    assert own.worst == "adam, fast"
    best = mean_recall(own.at_best("adam, fast"))
    assert best == max(mean_recall(epoch) for epoch in own.histories["adam, fast"][1:])
    assert own.ratios.keys() == own.before.keys()


def test_controls_teach_something_else_and_are_no_attack(world, models):
    names = ["adam, fast", *runs.FAMILIES["controls"]]
    task = runs.task_of(world, models[1], names)
    lessons = {name: task.lesson(name) for name in names}
    assert lessons["adam, fast"] == task.relearn
    swapped, said, (text,) = (lessons[name] for name in runs.FAMILIES["controls"])
    for fact, other, reworded in zip(task.relearn, swapped, said, strict=True):
        own, false = fact.probes[0].target, other.probes[0].target
        assert own != false
        assert [s.replace(own, false) for s in fact.sentences] == list(other.sentences) != list(fact.sentences)
        assert reworded.sentences == (fact.probes[0].prompt + own,)
    assert len(text.sentences) == sum(len(fact.sentences) for fact in task.relearn)
    assert all(sentence in world.text(runs.TEXT, seed=1001)[0] for sentence in text.sentences)
    bench = Bench(str(models[0]), task)
    row = bench.examine(runs.unchanged(bench))
    assert row["attacked"].keys() == set(names)
    assert row["worst"] == row["attacked"]["adam, fast"]
    assert row["other_answer"] < 0.1
    assert 0 <= row["linear_probe"] <= 1


def test_fields_and_rates_are_changed_where_a_method_has_them():
    cir = runs.changed(runs.METHODS["cir"], {"relearning_steps": 0, "energy": 0.5}, [-2.0])
    assert (cir.config.relearning_steps, cir.rates) == (0, (-2.0,))
    assert runs.changed(runs.METHODS["npo"], {"relearning_steps": 0}) == runs.METHODS["npo"]


def test_more_facts_are_those_of_fewer_and_none_is_on_two_sides(world):
    few, more = many.drawn(world, 3), many.drawn(world, 40)
    assert more.forget[:3] == few.forget
    parts = [{fact.id for fact in part} for part in vars(more).values()]
    assert len(set.union(*parts)) == sum(map(len, parts)) == sum(map(len, world.facts.values()))
    gone = {fact.id.partition(": ")[0] for fact in more.forget}
    assert all(fact.id.partition(": ")[0] in gone for fact in more.same_subject)
    assert not any(fact.id.partition(": ")[0] in gone for fact in more.same_relation)
    for count in (0, 90):
        with pytest.raises(ValueError, match=f"counts: expected 1 to 86 of 96 facts, got {count}"):
            many.drawn(world, count)


def test_rows_are_measured_once_and_drawn(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(training.SIZES, "small", SIZE)
    arguments = ["--size", "small", "--subjects", "8", "--counts", "1", "6", "--one-by-one", "1"]
    arguments += ["--models", str(models[0].parent), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["many", *arguments])
    many.main()
    rows = [json.loads(line) for line in (tmp_path / "many.jsonl").read_text().splitlines()]
    assert [(row["count"], row["way"]) for row in rows] == [(1, "at once"), (6, "at once"), (1, "one by one")]
    for row in rows:
        assert row["recall"] < 0.5 * row["before"]["recall"]
        assert (row["attacked"] is None) == (row["count"] == 1)
    assert 0 < rows[1]["directions_left"]["gradient"] < 1
    first = capsys.readouterr().out
    many.main()
    assert capsys.readouterr().out == first
    assert len((tmp_path / "many.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")
    assert "6 at once: recall 0." in first


def test_a_world_that_is_too_small_is_refused_before_a_model_is_taught(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["many", "--subjects", "8", "--counts", "90", "--models", str(tmp_path)])
    with pytest.raises(ValueError, match="counts: expected 1 to 86"):
        many.main()
    assert not list(tmp_path.iterdir())
