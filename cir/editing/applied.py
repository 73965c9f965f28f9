"""Which edits are in a checkpoint: a file beside its weights, by which none is added twice or taken out of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from cir.editing.edits import Edit
from cir.system.files import strict_json

NAME = "cir-edits.json"
FORMAT = "cir-edits-1"


class Applied:
    """What :meth:`change` has added to a checkpoint: for each edit its SHA-256, and the model that it was made on."""

    def __init__(self, edits: dict[str, str] | None = None) -> None:
        self.edits = edits or {}

    @classmethod
    def read(cls, folder: str | Path) -> Applied:
        """Of a checkpoint; none where ``folder`` says nothing of edits.

        Raises:
            ValueError: if it says something else.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            return cls()
        said = strict_json(str(path), path.read_text(encoding="utf-8"))
        edits = said.get("edits") if isinstance(said, dict) and said.get("format") == FORMAT else None
        if not isinstance(edits, dict) or not all(isinstance(of, str) for of in edits.values()):
            raise ValueError(f"{path}: expected the record of edits, format {FORMAT}, got {said!r:.80}")
        return cls(edits)

    def change(self, edits: Sequence[Edit], sign: int, fingerprint: str, force: bool) -> None:
        """Add ``edits`` (``sign`` 1) or take them out (-1) of the model with that ``fingerprint``.

        Raises:
            ValueError: if one is given twice, would be added again or, without ``force``, to a model other than its
                own; or is taken out where no record says that it is in.
        """
        for edit in edits:
            own = hashlib.sha256(edit.to_bytes()).hexdigest()
            if sign == 1:
                if own in self.edits:
                    raise ValueError(f"edit {edit.id!r}: expected one that is not in this model, got it again")
                if not force and edit.fingerprint not in {fingerprint, *self.edits.values()}:
                    raise ValueError(
                        f"edit {edit.id!r}: expected one of the model {fingerprint[:12]}, got one of "
                        f"{edit.fingerprint[:12]}; --force applies it"
                    )
                self.edits[own] = edit.fingerprint
            elif self.edits.pop(own, None) is None and not force:
                raise ValueError(
                    f"edit {edit.id!r}: expected one that `cir apply` added to this checkpoint, got none by its "
                    "record; --force takes it out all the same"
                )

    def write(self, folder: Path) -> None:
        said = {"format": FORMAT, "edits": self.edits}
        (folder / NAME).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
