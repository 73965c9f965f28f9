"""What is installed is whole: true metadata, types, data files, and nothing that belongs to the repository alone.

The wheel and the sdist are built from a copy, by the build backend of this environment, without the network;
``make package`` builds them as they are published.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import yaml

import cir

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta as b; b.build_wheel('out'); b.build_sdist('out')"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist."""
    try:
        backend = int(version("setuptools").partition(".")[0])
    except PackageNotFoundError:
        backend = 0
    if backend < 77:
        pytest.skip("needs setuptools of 77 or newer")
    copy = tmp_path_factory.mktemp("package") / "cir"
    unwanted = ignore_patterns("__pycache__", "*.gguf", "*.jsonl.gz")
    for name in ("cir", "cir_kernels", "docs", "tests", "examples", "bench"):
        copytree(ROOT / name, copy / name, ignore=unwanted)
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / n for n in ("pyproject.toml", "MANIFEST.in", "LICENSE", "CITATION.cff")),
    ):
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return copy / "out"


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def sources(package: str) -> set[str]:
    """All files of a package, as the wheel should have them."""
    files = (path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_has_both_packages_whole_and_no_more(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == sources("cir") | sources("cir_kernels")
    assert packed >= {"cir/py.typed", "cir_kernels/py.typed", "cir/data/neutral.txt", "cir/data/contrast.jsonl"}
    for name in packed:
        assert wheel.read(name) == (ROOT / name).read_bytes(), name


def test_the_metadata_is_so(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    about = Parser().parsestr(wheel.read(name).decode())
    assert (about["Name"], about["Version"]) == ("cir", cir.__version__)
    assert (about["License-Expression"], about["License-File"]) == ("MIT", "LICENSE")
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload().startswith("# cir\n")
    assert about["Requires-Python"] == ">=3.10"
    needed = {re.split(r"[^\w-]", row)[0] for row in about.get_all("Requires-Dist") if "extra ==" not in row}
    assert needed == {"torch", "transformers", "safetensors", "tqdm", "pyyaml", "triton"}
    extras = {"demo", "bench", "data", "eval", "sign", "completion", "docs", "package", "dev"}
    assert set(about.get_all("Provides-Extra")) == extras
    scripts = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert scripts.split() == ["[console_scripts]", "cir", "=", "cir.cli:main"]


def test_what_is_imported_is_a_dependency():
    """At the top of a module, that is: what functions import may be an extra's."""
    own = {"cir", "cir_kernels"}
    found = set()
    for package in ("cir", "cir_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            found |= set(re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert found - own - sys.stdlib_module_names == {"torch", "safetensors", "tqdm"}


def test_the_sdist_has_what_it_takes_to_build_and_no_tests(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert names >= sources("cir") | sources("cir_kernels")
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"}
    assert [name for name in names if re.match(r"(tests|bench|examples)(/|$)", name)] == []


def test_versions_agree():
    assert re.search(r'^version = "(.*)"$', text("pyproject.toml"), re.MULTILINE)[1] == cir.__version__
    assert re.search(r"^version: (.*)$", text("CITATION.cff"), re.MULTILINE)[1] == cir.__version__
    first = re.search(r"^## \[(.*?)\]", text("CHANGELOG.md"), re.MULTILINE)[1]
    assert first in ("Unreleased", cir.__version__)


def test_every_tool_that_is_asked_for_is_pinned():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", text("constraints.txt"), re.MULTILINE))
    extras = text("pyproject.toml").partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    asked = set(re.findall(r'"([\w-]+)(?:\[\w+\])?[><=]', extras))
    assert asked - pinned.keys() - {"lm-eval"} == set()  # what takes a model of its own is not installed by CI


def test_the_citation_names_software_and_paper():
    about = yaml.safe_load(text("CITATION.cff"))
    assert (about["type"], about["license"], about["authors"]) == ("software", "MIT", [{"name": "The cir authors"}])
    assert about.keys() >= {"cff-version", "message", "title"}  # what the format asks for, with authors
    (paper,) = about["references"]
    assert paper["url"].endswith("/2509.11816")
    assert [author["family-names"] for author in paper["authors"]] == ["Sondej", "Yang"]
