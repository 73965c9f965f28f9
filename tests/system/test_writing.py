from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cir.system import writing
from cir.system.writing import check_file, check_output, write_file, write_folder, write_text


def fill(text="whole"):
    def into(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "model").write_text(text)
        (folder / "sub" / "more").write_text(text)
        (folder / "model").chmod(0o600)

    return into


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_written_with_the_modes_of_the_process(tmp_path):
    before = os.umask(0o027)
    try:
        out = write_folder(tmp_path / "out", fill())
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((out / name).stat().st_mode) for name in (".", "model", "sub", "sub/more")}
    assert modes == {".": 0o750, "model": 0o640, "sub": 0o750, "sub/more": 0o640}
    assert names(tmp_path) == ["out"]
    assert names(out) == [".cir", "model", "sub"]


@pytest.mark.parametrize("known", [True, False])
def test_another_of_ours_is_replaced_also_without_the_systems_help(tmp_path, monkeypatch, known):
    if not known:
        monkeypatch.setattr(writing, "_libc", lambda: None)
    out = write_folder(tmp_path / "out", fill("old"))
    assert write_folder(check_output(out, True), fill("new"), overwrite=True) == out
    assert (out / "model").read_text() == "new"
    assert write_folder(out, fill("beside")) == tmp_path / "out-1"
    assert (tmp_path / "out-1" / "model").read_text() == "beside"
    assert names(tmp_path) == ["out", "out-1"]


def test_what_is_not_ours_is_not_replaced_at_the_end_either(tmp_path):
    out = tmp_path / "out"

    def late(folder: Path) -> None:
        fill()(folder)
        out.mkdir()
        (out / "precious").write_text("mine")

    assert write_folder(check_output(out, True), late, overwrite=True) == tmp_path / "out-1"
    assert names(out) == ["precious"]


def test_what_fails_leaves_nothing(tmp_path):
    out = write_folder(tmp_path / "out", fill("old"))

    def fails(folder: Path) -> None:
        fill()(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_folder(out, fails, overwrite=True)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", lambda path: fails(path.parent))
    assert (out / "model").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_signal_waits_until_all_is_in_place(tmp_path):
    def interrupted(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        fill()(folder)

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", interrupted)
    assert (tmp_path / "out" / "sub" / "more").read_text() == "whole"
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", lambda path: interrupted(path.parent) or path.write_text("whole"))
    assert (tmp_path / "file").read_text() == "whole"


KILLED = """
import os, sys
from pathlib import Path
from cir.system import writing
def fill(folder):
    (folder / "model").write_text("whole")
    if {where!r} == "fill":
        os._exit(9)
if {where!r} == "put":
    writing._put = lambda *_: os._exit(9)
if {where!r} == "exchanged":
    writing.shutil.rmtree = lambda *_, **__: os._exit(9)
if {where!r} == "removing":
    writing.shutil.rmtree = lambda path, **_: ((path / ".cir").unlink(), os._exit(9))
writing.write_folder(Path({out!r}), fill, overwrite=True)
"""


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("fill", {"out": "old"}),
        ("put", {"out": "old", "out-1": "whole"}),
        ("exchanged", {"out": "whole"}),
        ("removing", {"out": "whole"}),
    ],
)
def test_what_a_killed_process_leaves_is_cleared_by_the_next(tmp_path, caplog, where, left):
    out = write_folder(tmp_path / "out", fill("old"))
    code = KILLED.format(where=where, out=str(out))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(names(tmp_path)) == 2
    check_output(out, True)
    assert {path.name: (path / "model").read_text() for path in tmp_path.iterdir()} == left
    assert ("what an earlier run had finished is now at" in caplog.text) == (where == "put")


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    started, go_on = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        fill()(folder)
        started.set()
        go_on.wait(20)

    thread = threading.Thread(target=write_folder, args=(tmp_path / "out", slow))
    thread.start()
    started.wait(20)
    check_output(tmp_path / "out", True)
    write_folder(tmp_path / "out", fill("first"))
    go_on.set()
    thread.join(20)
    assert (tmp_path / "out" / "model").read_text() == "first"
    assert (tmp_path / "out-1" / "model").read_text() == "whole"
    assert names(tmp_path) == ["out", "out-1"]


def test_links_are_followed_and_planted_ones_are_not(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert write_folder(check_output(tmp_path / "link", False), fill()) == tmp_path / "nowhere"
    assert (tmp_path / "link" / "model").read_text() == "whole"
    monkeypatch.setattr(writing.secrets, "token_hex", lambda _: "00000000")
    (tmp_path / "victim").mkdir()
    (tmp_path / ".cir-file-00000000").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "text")
    assert names(tmp_path / "victim") == []


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for wrong in (tmp_path / "file" / "out", tmp_path / "circle", tmp_path / ("n" * 250), tmp_path / "a\0b"):
        with pytest.raises(OSError, match=r"expected|exists"):
            check_output(wrong, True)
    with pytest.raises(FileExistsError, match="expected a folder, got the file"):
        check_output(tmp_path / "file", True)
    with pytest.raises(OSError, match=r"expected 1048576.00 GiB of free space for .*out, got"):
        check_output(tmp_path / "out", False, nbytes=2**50)
    with pytest.raises(FileExistsError, match="expected a file, got the folder"):
        check_file(tmp_path)
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        check_file(tmp_path / "file", overwrite=False)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", lambda path: path.write_text("new"), overwrite=False)
    assert names(tmp_path) == ["circle", "file"]


def test_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    thread = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    thread.start()
    time.sleep(0.05)
    write_text(check_file(tmp_path / "pipe"), "text")
    thread.join(10)
    assert found == ["text"]
    assert names(tmp_path) == ["pipe"]
