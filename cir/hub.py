"""What cir wrote, on the hub, with a card that says what was forgotten without saying it."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path
from typing import Any

from cir.editing.edits import Edit
from cir.forgetting.card import model_card, section_of_edit, section_of_run
from cir.forgetting.report import hash_facts, library_versions
from cir.proof.certificate import NAME as CERTIFICATE
from cir.system.files import strict_json
from cir.system.writing import MARK, WRITTEN

REPORT, OPTIONS, ADAPTER, CARD = "report.json", "config.yaml", "adapter_config.json", "README.md"
ADAPTER_FILES = (ADAPTER, "adapter_model.safetensors")


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    edit: Edit | None = None,
    base_model: str | None = None,
    private: bool = True,
    token: str | None = None,
) -> str:
    """Upload a checkpoint or an adapter of ``cir unlearn``, or one of :meth:`cir.Edit.export_lora`, in one commit.

    The facts stay here: report.json and certificates, which name them, and config.yaml, which names where they are,
    are not uploaded; the card, README.md, has their number and their hash.

    Args:
        folder: what was written, with nothing in it changed. repo_id: ``user/name``; made where there is none.
        edit: of which ``folder`` is the adapter; it must be that of this edit to the bit.
        base_model: hub id of the model before, for the card; of an adapter by default the one that it names.
        private: whether a repository that is made is private. token: by default the one that is logged in.

    Returns:
        The address of the commit.

    Raises:
        ValueError: on a folder that cir did not write, or that is none of these; an adapter of an edit without it, or
            with another. Nothing is uploaded then.
    """
    folder = Path(folder)
    mark = folder / MARK
    if not mark.is_file() or mark.read_text(encoding="utf-8", errors="replace") != WRITTEN:
        raise ValueError(f"{folder}: expected a folder written by cir, got one without its mark {MARK}")
    of_edit = (folder / ADAPTER).is_file() and not (folder / REPORT).is_file()
    card = (_of_adapter if of_edit else _of_run)(folder, edit, base_model)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files: dict[str, Any] = {name: path for name, path in paths.items() if not _stays(name)}

    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    operations = [CommitOperationAdd(name, content) for name, content in {**files, CARD: str(card).encode()}.items()]
    return str(api.create_commit(name, operations, commit_message="Facts forgotten with cir").commit_url)


def _stays(name: str) -> bool:
    """Whether a file is not to be uploaded: it names facts or files, or is of this machine alone."""
    stem = CERTIFICATE.partition(".")[0]
    return name in (MARK, CARD, REPORT, OPTIONS) or name.startswith(stem)


def _of_run(folder: Path, edit: Edit | None, base_model: str | None) -> Any:
    if edit is not None:
        raise ValueError(f"edit: expected one with an adapter alone, got one with {folder}, which is of a run")
    adapter = (folder / ADAPTER).is_file()
    for name in (REPORT, ADAPTER if adapter else "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: expected what `cir unlearn` or Edit.export_lora wrote, got no {name}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: expected weights as safetensors, got none")
    report = strict_json(REPORT, (folder / REPORT).read_text(encoding="utf-8"))
    try:
        section = section_of_run(report)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / REPORT}: expected a report of this version, got {error!r:.200}") from error
    certificate = folder / CERTIFICATE
    if certificate.is_file():
        digest = hashlib.sha256(certificate.read_bytes()).hexdigest()
        section += f"\n\nThere is a certificate, which names the facts and so is not here. Its SHA-256 is `{digest}`."
    if adapter:
        return model_card(section, base_model=base_model or _named(folder), library="peft")
    return model_card(section, base_model=base_model)


def _of_adapter(folder: Path, edit: Edit | None, base_model: str | None) -> Any:
    if edit is None:
        raise ValueError(f"edit: expected the edit of which {folder} is the adapter, got none")
    named = _base(folder)
    with tempfile.TemporaryDirectory() as place:
        same = Path(place) / "adapter"
        edit.export_lora(same, named)
        for name in ADAPTER_FILES:
            if not (folder / name).is_file() or (folder / name).read_bytes() != (same / name).read_bytes():
                raise ValueError(f"{folder / name}: expected that of edit {edit.number}, got another or none")
    section = section_of_edit(edit, hash_facts([edit.fact]), library_versions())
    return model_card(section, base_model=base_model or _named(folder), library="peft")


def _base(folder: Path) -> str:
    """The model that an adapter says it is of."""
    return strict_json(ADAPTER, (folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""


def _named(folder: Path) -> str | None:
    """The same, unless it is a place on this machine."""
    named = _base(folder)
    return named if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", named) and not Path(named).exists() else None
