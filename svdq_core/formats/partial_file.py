"""A file in the making: it takes its name whole or not at all, and can be continued after an interruption.

Data go to a hidden file beside the one to be. With a fingerprint of whatever decides the bytes, a journal
beside that says how far they are good: a line per commit, with a checksum of the bytes since the last. The
next writer with the same fingerprint takes over what still has its checksum; any other starts afresh. No
fsync is needed before the end: after a power failure a checksum tells what reached the disk.
"""

import contextlib
import errno
import json
import os
import shutil
import uuid
import zlib
from pathlib import Path

from ..errors import CheckpointError

_CHUNK = 1 << 24
_FULL = {errno.ENOSPC, errno.EDQUOT}


class WriteError(CheckpointError):
    """The disk refused: full, read-only, gone. Nothing is wrong with what was to be written."""


def partial_path(path: Path) -> Path:
    """Where the data of a file that can be continued lie until it is whole."""
    return path.with_name(f".{path.name}.partial")


class PartialFile:
    """The data of ``path`` until they are whole.

    Args:
        path: the file to be.
        fingerprint: of whatever decides the bytes; None for a file that is not worth continuing.

    Attributes:
        end: where the next byte goes.
    """

    def __init__(self, path: Path, fingerprint: str | None = None):
        self.path = path
        self._fingerprint = fingerprint
        name = path if fingerprint else path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
        self.partial = partial_path(name)
        self._journal_path = self.partial.with_name(f"{self.partial.name}.journal")
        self._file = self._journal = None
        self.end = self._start = self._committed = self._crc = 0

    def open(self, start: int, total: int, restart: bool = False) -> list[dict]:
        """Begin, or go on.

        Args:
            start: where data begin; what stands before is written last.
            total: bytes of the whole file, to say what is missing when the disk is full.
            restart: forget what an earlier writer left.

        Returns:
            The notes of the commits that are still good.

        Raises:
            CheckpointError: the folder cannot be written, or another process makes this file just now.
        """
        self.end = self._start = self._committed = start
        self._total = total
        notes = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._fingerprint:
                self._journal = self._journal_path.open("a+b")
                self._lock()
            self._file = self.partial.open("r+b" if self.partial.exists() else "x+b")
            if self._journal:
                notes = [] if restart else self._take_over()
                self._start_journal(notes)
            self._file.truncate(self.end)
        except OSError as error:
            raise WriteError(f"{self.path.parent} cannot be written: {error}") from error
        return [entry["note"] for entry in notes]

    def append(self, data: memoryview) -> None:
        """Write at the end."""
        self._put(self.end, data)
        self.end += len(data)
        self._crc = zlib.crc32(data, self._crc)

    def commit(self, note: dict) -> None:
        """What was appended so far is worth keeping; ``note`` (JSON) comes back to who continues."""
        if self._journal:
            self._file.flush()
            self._log({"end": self.end, "crc": self._crc, "note": note})
        self._committed, self._crc = self.end, 0

    def finish(self, head: bytes, overwrite: bool) -> None:
        """Put ``head`` in front and give the file its name.

        Raises:
            CheckpointError: the disk is full, or the name is taken or in use.
        """
        self._put(0, head)
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error
        self._file.close()
        try:
            if self.path.exists() and not overwrite:
                raise CheckpointError(f"{self.path} appeared while it was being made; it was left as it is.")
            os.replace(self.partial, self.path)
        except PermissionError as error:
            raise WriteError(
                f"{self.path} is in use and cannot be replaced: unload the model that was loaded from it, "
                "or choose another name."
            ) from error

    def close(self, keep: bool) -> bool:
        """Let go of the files.

        Args:
            keep: leave what was committed for a later writer.

        Returns:
            Whether something was left.
        """
        if self._file:
            with contextlib.suppress(OSError):  # buffered bytes that a full disk refuses a second time
                self._file.close()
        if self._journal:
            self._journal.close()
        elif self._fingerprint:
            return False  # not ours: another process has the lock
        if keep and self._committed > self._start and self.partial.exists():
            return True
        with contextlib.suppress(PermissionError):  # Windows: another process has just opened it
            self.partial.unlink(missing_ok=True)
            self._journal_path.unlink(missing_ok=True)
        return False

    def _put(self, offset: int, data: memoryview | bytes) -> None:
        try:
            self._file.seek(offset)
            self._file.write(data)
        except OSError as error:
            raise self._refused(error) from error

    def _log(self, entry: dict) -> None:
        try:
            self._journal.write(json.dumps(entry).encode() + b"\n")
            self._journal.flush()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> WriteError:
        if error.errno not in _FULL:
            return WriteError(f"{self.path} could not be written: {error}.")
        free, missing = shutil.disk_usage(self.path.parent).free, max(self._total - self.end, 0)
        return WriteError(
            f"{self.path} could not be written: the disk of {self.path.parent} is full. It has {free / 1e6:,.0f} MB "
            f"left and {missing / 1e6:,.0f} MB are still to come: free {max(missing - free, 0) / 1e6:,.0f} MB at "
            "least and try again."
        )

    def _lock(self) -> None:
        """Refuse to share: two writers would spoil each other's bytes. A killed process lets go."""
        try:
            if os.name == "nt":
                import msvcrt

                self._journal.seek(1 << 40)  # a byte that nobody reads: locks are mandatory there
                msvcrt.locking(self._journal.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._journal.close()
            self._journal = None
            raise CheckpointError(f"{self.path} is being made by another process. Wait for it, or stop it.") from error

    def _take_over(self) -> list[dict]:
        """The journal's entries as far as the data match them."""
        self._journal.seek(0)
        lines = self._journal.read().splitlines()
        entries = []
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):  # a torn line ends the journal
            if json.loads(lines[0])["fingerprint"] != self._fingerprint:
                return []
            for line in lines[1:]:
                entry = json.loads(line)
                if entry["end"] < self.end or self._checksum(self.end, entry["end"]) != entry["crc"]:
                    break
                entries.append(entry)
                self.end = self._committed = entry["end"]
        return entries

    def _start_journal(self, entries: list[dict]) -> None:
        self._journal.seek(0)
        self._journal.truncate()
        for entry in ({"fingerprint": self._fingerprint}, *entries):
            self._log(entry)

    def _checksum(self, start: int, stop: int) -> int | None:
        """Of a stretch of the data; None if the file is shorter."""
        crc = 0
        self._file.seek(start)
        while start < stop:
            data = self._file.read(min(_CHUNK, stop - start))
            if not data:
                return None
            crc, start = zlib.crc32(data, crc), start + len(data)
        return crc
