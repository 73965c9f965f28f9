"""The house is as CONTRIBUTING draws it: which room may import which, and how large a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    ("cir_kernels", "cir.system"),
    ("cir.data",),
    ("cir.model",),
    ("cir.measures",),
    ("cir.config",),
    ("cir.forgetting",),
    ("cir.proof",),
    ("cir.editing",),
    ("cir",),
    ("cir.cli",),
    ("bench",),
]
"""From the ground up: a room imports those below its own floor, and itself."""
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES = 400


def files() -> dict[str, Path]:
    """Every module of the packages and the bench, by name."""
    found = {}
    for package in ("cir", "cir_kernels", "bench"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def room_of(module: str) -> str:
    """The innermost room; files that lie in ``cir`` itself are the room ``cir``."""
    parts = module.split(".")
    return next(room for n in (2, 1) if (room := ".".join(parts[:n])) in ROOMS)


def imports(module: str) -> set[str]:
    """The modules that ``module`` imports anywhere in its text, within functions and for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: expected absolute imports"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    return found & FILES.keys()


def test_no_room_imports_one_above_or_beside_it():
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        for other in imports(module)
        if room_of(module) != room_of(other) and ROOMS[room_of(module)] <= ROOMS[room_of(other)]
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    left = {module: imports(module) - {module} for module in FILES}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize("room", [room for room in ROOMS if FILES[room].name == "__init__.py"])
def test_each_room_says_what_belongs_there(room):
    assert ast.get_docstring(ast.parse(FILES[room].read_text(encoding="utf-8")))


def test_files_are_short():
    assert not {m: n for m, path in FILES.items() if (n := len(path.read_text().splitlines())) > MOST_LINES}


def test_autograd_is_touched_in_two_files():
    users = [m for m, path in FILES.items() if m.startswith("cir") and "torch.autograd" in path.read_text()]
    assert users == ["cir.model.capture", "cir.model.taps"]


@pytest.mark.parametrize("module", ["cir", "cir.cli", "cir.cli.parser", "cir.data.datasets", "cir.data.facts"])
def test_what_must_be_quick_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    import cir

    assert {name for name in cir.__all__ if getattr(cir, name).__name__ != name} == set()
    from cir.datasets import load_data

    assert load_data is import_module("cir.data.datasets").load_data
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cir.nothing
