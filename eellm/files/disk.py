"""Files written so that a failure at any point leaves the old content or the new one.

`EELLM_FAIL_AT=n` makes the n-th write, fsync or rename fail as on a full disk, halfway through
where it is a write; `EELLM_FAIL_AT=n:die` ends the process there instead.
"""

import errno
import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from eellm.errors import invalid

_CHUNK = 16 << 20
_STAGED = ".eellm-new"


class _Faults:
    """Counts operations while EELLM_FAIL_AT is set."""

    def __init__(self) -> None:
        self.count = 0

    def due(self) -> str:
        """'' to go on, else 'error' or 'die'."""
        plan = os.environ.get("EELLM_FAIL_AT")
        if not plan:
            return ""
        number, _, how = plan.partition(":")
        if not number.isdecimal() or how not in ("", "die"):
            raise invalid("EELLM_FAIL_AT is invalid", "a number, or a number and ':die'", plan)
        self.count += 1
        return (how or "error") if self.count == int(number) else ""


_faults = _Faults()


def reset_faults() -> int:
    """Starts to count operations for EELLM_FAIL_AT anew; returns how many there were."""
    count, _faults.count = _faults.count, 0
    return count


def _fault(path: Path) -> None:
    how = _faults.due()
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Adds to the error of a full disk where it is and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = path if path.is_dir() else path.parent
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(folder).free >> 20} MiB free"
        raise OSError(
            error.errno,
            f"cannot write {path}: {os.strerror(error.errno or 0)} (expected room in {folder}"
            f"{free}); free some space there or choose another folder, then run again",
        ) from error


@dataclass(frozen=True)
class FileRecord:
    """What was handed over to be written to a file; sha256 is empty where none was asked for."""

    size: int
    sha256: str


class Writer:
    """A file being written; `Folder.create` gives one."""

    def __init__(self, path: Path, file: BinaryIO, hashed: bool) -> None:
        """Takes an open file."""
        self._path, self._file = path, file
        self._hash = hashlib.sha256() if hashed else None
        self._size = 0

    def write(self, data: Any) -> None:
        """Appends bytes or a C-contiguous array."""
        view = memoryview(data)
        if view.nbytes == 0:
            return
        view = view.cast("B")
        for start in range(0, len(view), _CHUNK):
            part = view[start : start + _CHUNK]
            how = _faults.due()
            if how:
                self._file.write(part[: len(part) // 2])
                self._file.flush()
                if how == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            self._file.write(part)
            if self._hash is not None:
                self._hash.update(part)
            self._size += len(part)

    def finish(self) -> FileRecord:
        """Brings everything to the disk."""
        self._file.flush()
        _fault(self._path)
        os.fsync(self._file.fileno())
        return FileRecord(self._size, self._hash.hexdigest() if self._hash else "")


class Folder:
    """A folder into which files are written, with a record of what they hold.

    staged: every file has another name until `commit`, so that a failure leaves what was there.
    hashed: the record has the SHA-256 of what was handed over.
    """

    def __init__(
        self, path: str | os.PathLike[str], staged: bool = False, hashed: bool = False
    ) -> None:
        """Creates the folder if need be."""
        self.path = Path(path)
        self._hashed = hashed
        self.files: dict[str, FileRecord] = {}
        self._suffix = _STAGED if staged else ""
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def create(self, name: str) -> Iterator[Writer]:
        """A new file; it is complete and on the disk when the block ends."""
        path = self.path / (name + self._suffix)
        with explained(path):
            with open(path, "wb") as file:
                writer = Writer(path, file, self._hashed)
                yield writer
                self.files[name] = writer.finish()

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole file."""
        with self.create(name) as writer:
            writer.write(data)

    def copy(self, source: Path, name: str) -> None:
        """Copies a file into the folder."""
        with self.create(name) as writer, open(source, "rb") as file:
            while part := file.read(_CHUNK):
                writer.write(part)

    def commit(self) -> None:
        """Gives staged files their names."""
        if self._suffix:
            for name in self.files:
                rename(self.path / (name + self._suffix), self.path / name)
        sync_folder(self.path)

    def abort(self) -> None:
        """Removes the staged files that have not got their names yet."""
        if self._suffix:
            for path in self.path.glob("*" + self._suffix):
                with suppress(OSError):
                    path.unlink()


def rename(source: Path, target: Path) -> None:
    """Moves a file over another, or a folder to a free name."""
    with explained(target):
        _fault(target)
        os.rename(source, target)


def sync_folder(path: Path) -> None:
    """Brings the names in a folder to the disk."""
    with explained(path):
        _fault(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without fsync of folders
                raise
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> FileRecord:
    """Size and hash of a file as it is on the disk."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return FileRecord(size, hashlib.file_digest(file, "sha256").hexdigest())
