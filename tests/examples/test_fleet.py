from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

import cir
from examples import fleet
from tests.examples.common import FIRST, SECOND

WITH_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="needs the package ray: pip install ray")


@pytest.fixture
def edits(editor, tmp_path):
    """Two, of the model in ``files``."""
    made = [editor.forget(fact) for fact in (FIRST, SECOND)]
    for edit in made:
        edit.save(tmp_path / f"{edit.id}.safetensors")
    return made


def weights(replica):
    return {name: p.detach().clone() for name, p in replica._model.named_parameters()}


def test_a_replica_holds_the_edits_that_are_asked_for_and_no_others(files, edits):
    replica = fleet.Replica(str(files / "model"))
    came, (one, two) = weights(replica), [edit.to_bytes() for edit in edits]
    untouched = replica.hold([])["weights"]
    both = replica.hold([one, two])
    assert both["recall"].keys() == {"f0", "f1"}
    assert max(both["recall"].values()) < 0.05
    first = replica.hold([one])
    other = fleet.Replica(str(files / "model"))
    assert other.hold([one]) == first != both
    assert replica.hold([two, one])["weights"] != untouched
    assert replica.hold([])["weights"] == untouched
    assert all(torch.equal(came[name], weight) for name, weight in weights(replica).items())


def test_what_is_no_edit_of_the_model_changes_nothing(files, edits):
    replica = fleet.Replica(str(files / "model"))
    held = replica.hold([edits[0].to_bytes()])
    name, (b, a) = next(iter(edits[0].factors.items()))
    strange = cir.Edit(**{**vars(edits[0]), "factors": {name: (b, a[:, :-1].contiguous())}})
    for data, said in ((b"nothing", "expected an edit"), (strange.to_bytes(), "expected a model with")):
        with pytest.raises(ValueError, match=said):
            replica.hold([edits[1].to_bytes(), data])
        assert replica._hash() == held["weights"]


@WITH_RAY
def test_replicas_hold_an_edit_all_or_none(files, edits, tmp_path, capsys):
    import ray

    named = [str(tmp_path / f"{edit.id}.safetensors") for edit in edits]
    assert fleet.main(["--model", str(files / "model"), "--edits", *named]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [fleet.Replica(str(files / "model")).hold([edit.to_bytes() for edit in edits])] * 2
    try:
        replicas = fleet.Fleet(str(files / "model"), 2)
        first = replicas.hold(edits[:1])
        name, (b, a) = next(iter(edits[0].factors.items()))
        strange = cir.Edit(**{**vars(edits[0]), "factors": {name: (b, a[:, :-1].contiguous())}})
        with pytest.raises(RuntimeError, match="taken back in all replicas"):
            replicas.hold([*edits, strange])
        ray.kill(replicas._replicas[1], no_restart=False)
        assert replicas.hold(edits[:1]) == first
    finally:
        ray.shutdown()
