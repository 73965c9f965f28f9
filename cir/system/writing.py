"""Files and folders that are written whole or not at all, and never over what is not ours.

All is written into a folder ``.cir-NAME-xxxxxxxx`` beside its place, which nobody else can enter, and moved when it
is whole and on the disk. What a killed process leaves is cleared by the next that writes to the same place: thrown
away, or put in place if it was finished.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from cir.system.signals import Held

logger = logging.getLogger(__name__)
MARK = ".cir"
"""A file in folders that were written here, which are the only ones that are replaced."""
UNFINISHED, FINISHED, WRITTEN = "Being written by cir.\n", "Finished by cir, not in place yet.\n", "Written by cir.\n"
NOREPLACE, EXCHANGE = 1, 2
"""Flags of Linux's renameat2."""


def check_output(out: str | Path, overwrite: bool, inputs: Iterable[str | Path] = (), nbytes: int = 0) -> Path:
    """The folder ``out`` to be written, checked before any work is done. Only what :func:`write_folder` wrote, or an
    empty folder, is ever replaced.

    Args:
        inputs: files and folders that are read meanwhile. nbytes: that will be written.

    Raises:
        FileExistsError: if it exists and ``overwrite`` is False, or it is not such a folder, or has in it where this
            runs, the home folder or one of the ``inputs``.
        OSError: if nothing, or not so much, can be written beside it.
    """
    out = _checked(out, nbytes)
    if out.exists() and not overwrite:
        raise FileExistsError(f"expected a new folder, got {out}, which exists; --overwrite replaces it")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"expected a folder, got the file {out}")
    if out.exists() and not _ours(out):
        raise FileExistsError(f"expected a folder written by cir, got {out}, which holds something else")
    for kept in (Path.cwd(), Path.home(), *map(Path, inputs)) if out.exists() else ():
        if os.path.exists(kept) and kept.resolve().is_relative_to(out):
            raise FileExistsError(f"expected a folder that can be replaced, got {out}, which holds {kept}")
    return out


def check_file(path: str | Path, overwrite: bool = True) -> Path:
    """The file ``path`` to be written, checked before any work is done.

    Raises:
        FileExistsError: if it exists and ``overwrite`` is False, or it is a folder.
        OSError: if nothing can be written beside it.
    """
    if _is_stream(Path(path)):
        return Path(path)
    path = _checked(path, 0)
    if path.is_dir():
        raise FileExistsError(f"expected a file, got the folder {path}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"expected a new file, got {path}, which exists; --overwrite replaces it")
    return path


def write_folder(out: Path, fill: Callable[[Path], object], overwrite: bool = False) -> Path:
    """Have ``fill`` write into a new folder, and put that at ``out`` only when it is whole. Signals wait meanwhile.

    Whatever goes wrong, a full disk for one, an existing ``out`` stays as it was; without ``overwrite`` one that has
    appeared meanwhile too, beside which the new one gets a number. Another folder of ours is replaced in one step
    where the system can (Linux); elsewhere nothing is at ``out`` for a moment.

    Returns:
        The folder's path.

    Raises:
        OSError: where what was written whole cannot be put in its place; the message says where it is.
    """
    with Held(), _partial(out) as partial:
        fill(partial)
        _finish(partial)
        (partial / MARK).write_text(FINISHED, encoding="utf-8")
        _sync(partial / MARK, partial)
        try:
            return _put(partial, out, overwrite)
        except OSError as error:
            raise OSError(f"{error}; what was written is in {partial}") from error


def write_file(path: str | Path, fill: Callable[[Path], object], overwrite: bool = True) -> None:
    """Have ``fill`` write a new file, which takes the place of ``path`` when it is whole. Signals wait meanwhile.

    Raises:
        FileExistsError: if it exists by then and ``overwrite`` is False.
    """
    if _is_stream(path := Path(path)):
        fill(path)
        return
    path = path.resolve()
    with Held(), _partial(path) as partial:
        fill(partial / path.name)
        _finish(partial)
        (os.replace if overwrite else _move)(partial / path.name, path)
        _sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """A new file of ``text``, as :func:`write_file` does it."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _checked(out: str | Path, nbytes: int) -> Path:
    """Where ``out`` is, links followed, once it is known that something can be written there."""
    try:
        out = Path(out).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear(out)
        with _partial(out):
            free = shutil.disk_usage(out.parent).free
    except (RuntimeError, ValueError, OSError) as error:  # a circle of links, a NUL in the name
        raise OSError(f"expected a place that can be written to, got {out}: {error}") from error
    if nbytes > free:
        raise OSError(
            f"expected {nbytes / 2**30:.2f} GiB of free space for {out}, got {free / 2**30:.2f} GiB on that disk"
        )
    return out


def _is_stream(path: Path) -> bool:
    """Whether it is there and nothing that can be replaced: a terminal, a pipe."""
    return path.exists() and not (path.is_file() or path.is_dir())


def _ours(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MARK, "report.json")) or not any(folder.iterdir())


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, of this process while it lives. It is removed unless it was finished or moved."""
    while True:
        partial = out.with_name(f".cir-{out.name}-{secrets.token_hex(4)}")
        partial.mkdir(mode=0o700)
        try:
            mark = (partial / MARK).open("w", encoding="utf-8")
        except FileNotFoundError:  # cleared by another before it was marked
            continue
        _locks(mark.fileno(), wait=True)
        if (partial / MARK).exists():
            break
        mark.close()
    with mark:
        mark.write(UNFINISHED)
        mark.flush()
        try:
            yield partial
        finally:
            if _state(partial) != FINISHED:
                shutil.rmtree(partial, ignore_errors=True)


def _state(folder: Path) -> str:
    """What the mark of a folder says; nothing where there is none."""
    try:
        return (folder / MARK).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _clear(out: Path) -> None:
    """What killed processes left beside ``out``: put in place if it was finished, thrown away else."""
    name = re.compile(rf"\.cir-{re.escape(out.name)}-[0-9a-f]{{8}}")
    for left in [path for path in out.parent.iterdir() if name.fullmatch(path.name) and not path.is_symlink()]:
        try:
            mark = (left / MARK).open("r+", encoding="utf-8")
        except FileNotFoundError:  # killed before it was marked, or while it was removed
            shutil.rmtree(left, ignore_errors=True)
            continue
        with mark:
            if not _locks(mark.fileno(), wait=False):
                continue
            if _state(left) == FINISHED:
                logger.warning("what an earlier run had finished is now at %s", _put(left, out, overwrite=False))
            else:
                shutil.rmtree(left, ignore_errors=True)


def _locks(descriptor: int, wait: bool) -> bool | None:
    """Whether the file is now this process's alone; None where the system does not tell."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno == errno.EWOULDBLOCK else None
    return True


def _finish(partial: Path) -> None:
    """Modes as the process gives them to its files, whatever wrote them, and all on the disk."""
    mode = (partial / MARK).stat().st_mode & 0o777
    for folder, _, names in os.walk(partial, topdown=False):
        for name in names:
            os.chmod(os.path.join(folder, name), mode)
            _sync(Path(folder, name))
        _sync(Path(folder))
        os.chmod(folder, mode | (mode & 0o444) >> 2)  # who may read a folder may enter it


def _sync(*paths: Path) -> None:
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put(partial: Path, out: Path, overwrite: bool) -> Path:
    """Move a finished folder to ``out``, or beside it where that must stay."""
    if overwrite and out.is_dir() and _ours(out):
        _exchange(partial, out)
        (out / MARK).write_text(WRITTEN, encoding="utf-8")
        return out
    for number in count():
        place = out.with_name(f"{out.name}-{number}") if number else out
        try:
            _move(partial, place)
        except FileExistsError:
            continue
        (place / MARK).write_text(WRITTEN, encoding="utf-8")
        _sync(place / MARK, place.parent)
        return place
    raise AssertionError


def _move(source: Path, target: Path) -> None:
    """Raises FileExistsError where there is a target."""
    if _rename(source, target, NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _exchange(source: Path, target: Path) -> None:
    """``source`` at ``target``, and what was there gone."""
    if _rename(source, target, EXCHANGE):
        _sync(target.parent)
        shutil.rmtree(source, ignore_errors=True)
        return
    with _partial(target) as aside:
        target.rename(aside / target.name)
        try:
            source.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Linux's renameat2; False where there is none, or the file system does not know of ``flags``."""
    call = getattr(_libc(), "renameat2", None)
    if call is None:
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):  # Windows
        return None
