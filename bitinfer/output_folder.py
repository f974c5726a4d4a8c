"""A new folder that is there whole or not at all, and the checks before and the errors while it is filled."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitinfer.checkpoint import read_json
from bitinfer.errors import FormatError
from bitinfer.formats.packed import QUANT_METHOD, quantization

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_places(src: Path, dst: Path, overwrite: bool) -> None:
    """Refuse a ``dst`` that exists, unless it may be replaced, or that overlaps with ``src``.

    Raises:
        ValueError: one folder is inside the other.
        FileExistsError: ``dst`` exists and ``overwrite`` is False, or it is nothing that bitinfer made.
    """
    a, b = src.resolve(), dst.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ValueError(f"convert: dst={dst} and src={src} must be separate folders, neither inside the other")
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "the folder exists; pass overwrite=True, or another dst", str(dst))
    if dst.is_symlink() or not dst.is_dir():
        raise FileExistsError(errno.EEXIST, "it is no folder, and is not overwritten; remove it first", str(dst))
    # only our own work is replaced: a slip in dst must not cost a home directory
    if any(dst.iterdir()) and not _is_ours(dst):
        raise FileExistsError(
            errno.EEXIST, "it is no folder that bitinfer packed, and is not overwritten; remove it first", str(dst)
        )


def _is_ours(folder: Path) -> bool:
    try:
        return quantization(read_json(folder / "config.json")).get("quant_method") == QUANT_METHOD
    except FormatError:
        return False


def check_space(dst: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) if fewer than ``needed`` bytes are free where ``dst`` will be."""
    parent = next(p for p in (dst.absolute().parent, *dst.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise no_space(errno.ENOSPC, dst, f"about {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")


def no_space(code: int, dst: Path, reason: str) -> OSError:
    """Return the error for a full disk."""
    return OSError(code, f"not enough disk space, nothing is left behind ({reason})", str(dst))


@contextmanager
def new_folder(dst: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside ``dst`` that takes its name on success and is removed on any exception."""
    parents = [p for p in dst.absolute().parents if not p.exists()]
    dst.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{dst.name}.incomplete-", dir=dst.absolute().parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp's folder is for its owner alone
        if overwrite and dst.exists():
            _replace_folder(folder, dst)
        else:
            _claim(folder, dst)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in parents:  # innermost first
            try:
                parent.rmdir()
            except OSError:
                break
        raise


def _claim(folder: Path, dst: Path) -> None:
    if os.path.lexists(dst):  # since the check at the start
        raise FileExistsError(errno.EEXIST, "the folder appeared while it was being made", str(dst))
    os.rename(folder, dst)


def _replace_folder(folder: Path, dst: Path) -> None:
    """Put ``folder`` in the place of ``dst``, which is there in its old form until the new one is complete."""
    old = folder.with_name(folder.name.replace(".incomplete-", ".replaced-"))
    os.rename(dst, old)
    try:
        os.rename(folder, dst)
    except BaseException:
        os.rename(old, dst)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
