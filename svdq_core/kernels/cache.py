"""Compiled kernels on disk.

An entry is a SHA-256 of the machine code followed by the code, written to a temporary file and renamed:
two processes may write the same entry at once, and a reader sees a whole one or none. An entry that does
not match its checksum counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path

_DIGEST_BYTES = hashlib.sha256().digest_size


def folder() -> Path:
    """Where entries lie: ``SVDQ_CACHE_DIR``, or a folder in the user's cache."""
    chosen = os.environ.get("SVDQ_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "comfyui-svdquant" / "kernels"


def read(key: str) -> bytes | None:
    """The entry's machine code, or None where there is none or it is damaged."""
    try:
        data = (folder() / key).read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def write(key: str, code: bytes) -> None:
    """Store an entry. A cache that cannot be written to costs time, not correctness: no error."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder(), prefix=f".{key}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder() / key)
        except OSError:
            os.unlink(temporary)
            raise
