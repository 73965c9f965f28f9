from __future__ import annotations

import copy

import pytest
import torch

from cir import CIRConfig, Edit, EditConfig, Editor, Subspaces
from cir.data.facts import load_facts
from cir.forgetting.factors import factorise
from cir.forgetting.update import add_factors, fingerprint, snapshot
from cir.model.finding import find_stack
from tests.tiny import TEXT, facts, knowing_llama, tiny_llama, word_tokenizer

FACTS = load_facts(facts(12))
FIT = CIRConfig(layers=0.5, retain_tokens=1024)


@pytest.fixture(scope="module")
def edited():
    """A model, an edit of it, and the edited model."""
    base, tokenizer = knowing_llama(), word_tokenizer()
    model = copy.deepcopy(base)
    subspaces = Subspaces.fit(model, tokenizer, TEXT, FACTS[:6], config=FIT, progress=False)
    config = EditConfig(target_recall=0.3, keep=0.9, budget=1.0, worst_window=1.0, rank=6, energy=0.999)
    edit = Editor(model, tokenizer, subspaces, text=TEXT, config=config).forget(FACTS[8])
    return base, edit, model


def changed_weights(model):
    return snapshot(find_stack(model).writers(2))


def test_factors_are_the_best_of_their_rank():
    targets = find_stack(tiny_llama(torch.float64)).targets(1)
    generator = torch.Generator().manual_seed(0)

    def rows(site):
        fading = 0.5 ** torch.arange(site.width, dtype=torch.float64)
        return torch.randn(30, site.width, generator=generator, dtype=torch.float64) * fading

    updates = [
        ({s.name: rows(s) for t in targets for s in (t.activation, t.gradient)}, scale) for scale in (2.0, -0.5)
    ]
    factors, energy = factorise(targets, updates, rank=5, energy=1.0)
    held = whole = 0.0
    for target in targets:
        dense = sum(
            scale * tokens[target.gradient.name].T @ tokens[target.activation.name] for tokens, scale in updates
        )
        u, values, vh = torch.linalg.svd(dense)
        best = u[:, :5] * values[:5] @ vh[:5]
        b, a = factors[target.name]
        assert (b.shape, a.shape) == ((5, dense.shape[0]), (5, dense.shape[1]))
        assert (b.T @ a - best).norm() < 1e-5 * dense.norm()
        held, whole = held + float(values[:5].square().sum()), whole + float(values.square().sum())
    assert energy == pytest.approx(held / whole, rel=1e-6)
    fewer, energy = factorise(targets, updates, rank=24, energy=0.9)
    assert all(len(b) < 5 for b, _ in fewer.values())
    assert 0.9 <= energy < 1


def test_compresses_to_a_rank_or_an_energy(edited):
    _, edit, _ = edited
    small = edit.compress(rank=2)
    assert small.rank == 2
    assert small.nbytes < edit.nbytes
    assert 0.5 < small.energy < edit.energy
    assert edit.compress(energy=0.9).energy >= 0.9 * edit.energy
    for bad in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}):
        with pytest.raises(ValueError, match=r"expected either|expected a rank"):
            edit.compress(**bad)


def test_is_the_same_read_back(edited, tmp_path):
    _, edit, _ = edited
    edit.save(tmp_path / "edit.safetensors")
    assert (tmp_path / "edit.safetensors").read_bytes() == edit.to_bytes() == edit.to_bytes()
    for again in (Edit.load(tmp_path / "edit.safetensors"), Edit.from_bytes(edit.to_bytes())):
        assert {**vars(again), "factors": None} == {**vars(edit), "factors": None}
        assert again.factors.keys() == edit.factors.keys()
        assert all(
            torch.equal(x, y) for n in edit.factors for x, y in zip(again.factors[n], edit.factors[n], strict=True)
        )
    Subspaces({}, "orthogonal").save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a file of format cir-edit-1, got"):
        Edit.load(tmp_path / "other.safetensors")


def test_applied_to_the_base_it_gives_the_edited_model(edited):
    base, edit, model = edited
    other = copy.deepcopy(base)
    edit.apply_(other)
    assert fingerprint(find_stack(other).writers(0)) == fingerprint(find_stack(model).writers(0))
    edit.apply_(other, sign=-1)
    for now, before in zip(changed_weights(other), changed_weights(base), strict=True):
        torch.testing.assert_close(now, before, atol=1e-6, rtol=0)


def test_is_not_applied_to_a_model_without_its_linears(edited):
    _, edit, _ = edited
    other = tiny_llama(intermediate_size=36)
    before = changed_weights(other)
    with pytest.raises(
        ValueError, match=r"expected a model with model.layers.2.mlp.down_proj \(24, 40\), got \(24, 36\)"
    ):
        edit.apply_(other)
    assert all(torch.equal(x, y) for x, y in zip(before, changed_weights(other), strict=True))


def test_several_edits_are_rounded_once(edited):
    base, edit, _ = edited
    one, both = copy.deepcopy(base).bfloat16(), copy.deepcopy(base).bfloat16()
    (target, *_), (other, *_) = find_stack(one).writers(2), find_stack(both).writers(2)
    b, a = edit.factors[target.name]
    exact = other.linear.weight.double() + 2 * (b.double().T @ a.double())
    add_factors([other], [edit.factors, edit.factors])
    spacing = exact.abs() * 2.0**-8
    assert bool(((other.linear.weight.double() - exact).abs() <= spacing).all())


def test_plain_peft_loads_the_adapter(edited, tmp_path):
    peft = pytest.importorskip("peft")
    base, edit, model = edited
    edit.export_lora(tmp_path / "adapter", base_model="some/base")
    with pytest.raises(FileExistsError):
        edit.export_lora(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        expected, got, plain = (m(input_ids=ids).logits for m in (model, adapted, base))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_subspaces_are_kept_with_what_they_were_fitted_on(tmp_path, unchanged):
    model, tokenizer = tiny_llama(), word_tokenizer()
    unchanged(model)
    subspaces = Subspaces.fit(model, tokenizer, TEXT, FACTS[:4], config=FIT, progress=False)
    unchanged(model)
    subspaces.save(tmp_path / "s.safetensors")
    again = Subspaces.load(tmp_path / "s.safetensors")
    assert again.fitted_on == subspaces.fitted_on
    assert [fact["id"] for fact in again.fitted_on["contrast"]] == ["f0", "f1", "f2", "f3"]
    assert again.keys() == {
        f"model.layers.{n}.{m}.{side}"
        for n in (2, 3)
        for m in ("self_attn.o_proj", "mlp.down_proj")
        for side in ("in", "out")
    }
    with pytest.raises(ValueError, match="expected texts or contrast facts"):
        Subspaces.fit(model, tokenizer, None, progress=False)
