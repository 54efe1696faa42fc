"""Fetch one file over HTTP so that a flaky line, a wrong file or a killed run leaves nothing half-written.

Bytes go to a hidden file beside the target, are resumed with a Range request after any interruption (also of
the whole process), checked (size, SHA-256, MD5), flushed, and only then renamed.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests

from cloud_lib import io
from cloud_lib.sources import DamagedFile, NotAvailable

CHUNK = 1 << 15  # what a reset connection may lose
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Expected:
    """What the file must be; None = not known in advance."""

    sha256: str | None = None
    md5: str | None = None
    size: int | None = None

    @property
    def verifiable(self) -> bool:
        return bool(self.sha256 or self.md5)

    def __str__(self) -> str:
        known = {"bytes": self.size, "sha256": self.sha256, "md5": self.md5}
        return ", ".join(f"{name} {value}" for name, value in known.items() if value) or "any content"


@dataclass(frozen=True)
class Connection:
    """How to go on: attempts in a row without a new byte, first pause (doubles) and time-out [s]; a file of
    trusted certificates, if not the usual one."""

    attempts: int = 6
    pause_s: float = 1.0
    timeout_s: float = 30.0
    certificates: str | None = None


class _Interrupted(Exception):
    """The transfer stopped, and another attempt may help; `wait_s` if the server named a pause."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


def fetch(addresses: str | Iterable[str], target: Path, expected: Expected = Expected(),
          connection: Connection = Connection()) -> Path:
    """Download to `target` from the first address that serves the expected file; a good file is kept.

    Raises:
        NotAvailable: no address answered; the message names the addresses and the next step.
        DamagedFile: the bytes served are not the expected ones.
        OSError: the disk is full.
    """
    if target.is_file() and not mismatch(target, expected):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    damaged = False
    for address in [addresses] if isinstance(addresses, str) else addresses:
        try:
            return _fetch_one(address, target, expected, connection)
        except (DamagedFile, NotAvailable) as error:
            failures.append(f"{address}: {error}")
            damaged |= isinstance(error, DamagedFile)
    message = (f"expected {target.name} ({expected}), found {'; '.join(failures) or 'no address'}. Check the "
               f"network and run make data again, or put the file into {target.parent} yourself")
    raise (DamagedFile if damaged else NotAvailable)(message)


def mismatch(path: Path, expected: Expected) -> str:
    """How a file differs from what is expected, or ""."""
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        return f"{size} bytes instead of {expected.size}"
    for name in ("sha256", "md5"):
        wanted = getattr(expected, name)
        if wanted and (found := _digest(path, name)) != wanted:
            return f"{name} {found} instead of {wanted}"
    return ""


def _digest(path: Path, name: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, name).hexdigest()


def _fetch_one(address: str, target: Path, expected: Expected, connection: Connection) -> Path:
    """As fetch(), one address; a second process that wants the same file waits for the first."""
    partial = target.with_name(f".part-{target.name}")
    with open(partial, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if target.is_file() and not mismatch(target, expected):
            return target
        if not partial.exists() or not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            return _fetch_one(address, target, expected, connection)  # the first gave up and removed its file
        try:
            _complete(address, file, expected, connection)
            os.replace(partial, target)
        finally:
            if partial.exists() and not partial.stat().st_size:
                partial.unlink()
    return target


def _complete(address: str, file: BinaryIO, expected: Expected, connection: Connection) -> None:
    """Bring `file` to the expected content, continuing what an earlier run left if a checksum can tell.

    Raises:
        NotAvailable: as _transfer_all().
        DamagedFile: the server has another content; `file` is empty then.
    """
    if not expected.verifiable:  # nothing would tell a continued file from two halves of different ones
        file.truncate(0)
    resumed = file.seek(0, os.SEEK_END) > 0
    difference = _transfer_all(address, file, expected, connection)
    if difference and resumed:  # what the earlier run left may be of another version
        file.truncate(0)
        difference = _transfer_all(address, file, expected, connection)
    if difference:
        file.truncate(0)
        raise DamagedFile(f"served {difference}")


def _transfer_all(address: str, file: BinaryIO, expected: Expected, connection: Connection) -> str:
    """Transfer until the end of the file, with retries; the difference from the expected file, or "".

    Raises:
        NotAvailable: attempts without progress are used up, or the server refuses.
    """
    failures = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            _transfer(address, file, expected, connection)
            break
        except requests.exceptions.SSLError as error:  # will not heal by waiting
            raise NotAvailable(f"certificate not trusted: {error}; set REQUESTS_CA_BUNDLE") from error
        except (_Interrupted, requests.ConnectionError, requests.Timeout,
                requests.exceptions.ChunkedEncodingError) as error:
            failures = 0 if file.seek(0, os.SEEK_END) > before else failures + 1
            if failures >= connection.attempts:
                raise NotAvailable(f"{failures} attempts without a byte, the last: {error}") from error
            pause = getattr(error, "wait_s", None) or connection.pause_s * 2 ** max(0, failures - 1)
            time.sleep(min(pause, LONGEST_PAUSE_S))
        except requests.RequestException as error:  # an address that is none, too many redirects
            raise NotAvailable(str(error)) from error
    file.flush()
    os.fsync(file.fileno())
    return mismatch(Path(file.name), expected)


def _transfer(address: str, file: BinaryIO, expected: Expected, connection: Connection) -> None:
    """One request for the bytes that are still missing, appended to `file`.

    Raises:
        _Interrupted: another attempt may help.
        NotAvailable: the server refuses for good.
    """
    start = file.seek(0, os.SEEK_END)
    if expected.size is not None and start > expected.size:
        start = file.truncate(0)
    if start and start == expected.size:
        return
    if address.startswith("file:"):
        file.truncate(0)
        _write([Path(url2pathname(urlsplit(address).path)).read_bytes()], file)
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(address, headers=headers, stream=True, timeout=connection.timeout_s,
                      verify=connection.certificates or True) as answer:
        _check_status(answer, file, start)
        if start and answer.status_code == 200:  # the server sends everything again
            start = file.truncate(0)
        total = start + int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
        answer.raw.enforce_content_length = False  # else the last bytes before an early end are thrown away
        _write(answer.iter_content(CHUNK), file)
    if total is not None and file.tell() < total:
        raise _Interrupted(f"connection closed after {file.tell()} of {total} bytes")


def _check_status(answer: requests.Response, file: BinaryIO, start: int) -> None:
    status = answer.status_code
    if status == 416:  # nothing after `start`: either complete or a different file; the checks decide
        file.truncate(0)
        raise _Interrupted("416: what was there does not belong to this file")
    if status in RETRY_STATUS:
        wait = answer.headers.get("Retry-After", "")
        raise _Interrupted(f"{status} {answer.reason}", float(wait) if wait.isdigit() else None)
    if status not in (200, 206):
        raise NotAvailable(f"{status} {answer.reason}")
    if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        file.truncate(0)
        raise _Interrupted("the server continued at another place")


def _write(chunks: Iterable[bytes], file: BinaryIO) -> None:
    try:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, f"disk full while downloading {Path(file.name).name[6:]} to "
                                   f"{Path(file.name).parent}; free some space and run make data again, it "
                                   "continues where it stopped") from error


def record(target: Path, address: str) -> str:
    """Remember the sha256 of a file that has no known one (trust on first use), and return it.

    Raises:
        DamagedFile: an earlier download of this file had another content.
    """
    book = io.raw_dir() / "first_download.json"
    known = io.read_json(book) if book.is_file() else {}
    name = target.relative_to(io.raw_dir()).as_posix()
    found = io.sha256(target)
    first = known.setdefault(name, {"sha256": found, "size": target.stat().st_size, "address": address})
    if first["sha256"] != found:
        raise DamagedFile(f"{target}: expected sha256 {first['sha256']} as at the first download, found "
                          f"{found}; if the publisher meant to change it, remove its entry from {book}")
    io.write_json(book, known)
    return found
