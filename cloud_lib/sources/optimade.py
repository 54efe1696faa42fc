"""Harvest of OPTIMADE databases: raw pages on disk, resumable, each structure once.

Layout below the harvest folder, one sub-folder per database: pages/00000000.json.gz are the bodies as they
came; index.jsonl has one line per stored page (address, next address, sha256, digests of its ids) and is what
a killed harvest continues from; done.json marks a finished database. OPTIMADE 1.x; servers that drop, repeat,
cut, delay or garble answers are retried, and the ids seen are compared with the count that the server states.
"""

import base64
import gzip
import hashlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlencode, urljoin, urlsplit

import httpx
import orjson
from tqdm import tqdm

from .. import io

PROVIDERS_LIST = "https://providers.optimade.org/v1/links"
FIELDS = ("lattice_vectors", "cartesian_site_positions", "species_at_sites", "species", "structure_features")
# The 14 databases of CLOUD (section 4.1) by provider, addresses as listed in 2026; `discover` refreshes them.
DATABASES = {
    "aflow": ("https://aflow.org/API/optimade",),
    "alexandria": ("https://alexandria.icams.rub.de/pbe", "https://alexandria.icams.rub.de/pbesol"),
    "cmr": ("https://cmr-optimade.fysik.dtu.dk",),  # C2DB
    "cod": ("https://www.crystallography.net/cod/optimade",),
    "jarvis": ("https://jarvis.nist.gov/optimade/jarvisdft",),
    "mcloud": tuple(f"https://aiida.materialscloud.org/{name}/optimade" for name in (
        "mc3d", "mc2d", "2dtopo", "tc-applicability", "pyrene-mofs", "curated-cofs", "stoceriaitf",
        "autowannier", "tin-antimony-sulfoiodide")),
    "mp": ("https://optimade.materialsproject.org",),
    "mpdd": ("http://mpddoptimade.phaseslab.org",),
    "mpds": ("https://api.mpds.io",),
    "mpod": ("http://mpod_optimade.cimav.edu.mx",),
    "nmd": ("https://nomad-lab.eu/prod/rae/optimade",),
    "odbx": ("https://optimade.odbx.science", "https://optimade-misc.odbx.science",
             "https://optimade-gnome.odbx.science"),
    "omdb": ("https://optimade.openmaterialsdb.se",),
    "oqmd": ("https://oqmd.org/optimade",),
}
RETRY_LATER = {408, 425, 429}  # and every 5xx


@dataclass(frozen=True)
class HarvestConfig:
    """`page_limit` is asked for first and lowered if refused; times in seconds."""

    page_limit: int = 500
    fields: tuple[str, ...] = FIELDS
    filter: str = ""  # an OPTIMADE filter, e.g. 'nsites<=100'
    n_parallel: int = 8  # databases at once
    min_interval: float = 0.5  # between two requests to one host
    timeout: float = 60.0  # without a single byte
    deadline: float = 300.0  # for one whole answer: a slow drip ends here
    max_attempts: int = 8  # per page
    doubts: int = 3  # attempts at a page that looks repeated or cut off before it is believed
    backoff: float = 1.0  # first wait, doubled each time
    max_wait: float = 300.0
    repair_passes: int = 2  # further walks while fewer structures came than the server states; then "short"


class HarvestError(RuntimeError):
    """A database that could not be read to its end; a later harvest continues there."""


class _Refused(HarvestError):
    """The server understood the request and will not serve it."""


class _Doubt(ValueError):
    """A well-formed page that is probably a fault."""


# ------------------------------------------------------------------------------------------------- disk
class Store:
    """Pages and index of one database; `load` drops what a kill or a damaged disk left unusable."""

    def __init__(self, folder: Path):
        self.folder, self.index = Path(folder), Path(folder) / "index.jsonl"
        self.lines: list[dict] = []
        self.seen: set[bytes] = set()
        self._load()

    def page_path(self, number: int) -> Path:
        return self.folder / "pages" / f"{number:08d}.json.gz"

    def _load(self) -> None:
        if not self.index.exists():
            return
        kept = 0
        for raw in self.index.read_bytes().splitlines(keepends=True):
            try:
                line = orjson.loads(raw)
                if self.page_path(len(self.lines)).stat().st_size != line["bytes"]:
                    break
            except (orjson.JSONDecodeError, FileNotFoundError):
                break
            kept += len(raw)
            digests = base64.b64decode(line["ids"])
            self.seen.update(digests[i:i + 8] for i in range(0, len(digests), 8))
            self.lines.append(line)
        os.truncate(self.index, kept)

    def write(self, page: "_Page") -> None:
        """The page file first, then its line: a kill in between costs one page."""
        path = self.page_path(len(self.lines))
        packed = gzip.compress(page.body, compresslevel=5, mtime=0)
        with io.atomic_path(path) as temporary:
            temporary.write_bytes(packed)
        line = {"url": page.url, "next": page.next, "n": len(page.ids), "expected": page.expected,
                "bytes": len(packed), "sha256": hashlib.sha256(packed).hexdigest(),
                "ids": base64.b64encode(b"".join(page.digests)).decode()}
        with open(self.index, "ab") as index:
            index.write(orjson.dumps(line) + b"\n")
            index.flush()
            os.fsync(index.fileno())
        self.lines.append(line)


def iter_structures(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """(material_id, source, entry as JSON) of every harvested database below `folder`, each id once.

    Raises:
        ValueError: a page differs from its sha256.
    """
    for index in sorted(Path(folder).glob("*/index.jsonl")):
        seen: set[bytes] = set()
        with open(index, "rb") as lines:
            for number, line in enumerate(map(orjson.loads, lines)):
                path = index.parent / "pages" / f"{number:08d}.json.gz"
                for entry in orjson.loads(_verified(path, line["sha256"]))["data"]:
                    digest = _digest(str(entry["id"]))
                    if digest not in seen:
                        seen.add(digest)
                        yield str(entry["id"]), index.parent.name, orjson.dumps(entry)


def _verified(path: Path, sha256: str) -> bytes:
    packed = path.read_bytes()
    if (found := hashlib.sha256(packed).hexdigest()) != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256[:12]}, found {found[:12]}; delete the page and "
                         "done.json beside its folder, then harvest again")
    return gzip.decompress(packed)


def _digest(material_id: str) -> bytes:
    return hashlib.blake2b(material_id.encode(), digest_size=8).digest()


# -------------------------------------------------------------------------------------------------- pages
@dataclass(frozen=True)
class _Page:
    url: str
    body: bytes
    ids: list[str]
    next: str | None
    expected: int | None  # meta.data_returned: all structures that match

    @property
    def digests(self) -> list[bytes]:
        return [_digest(i) for i in self.ids]


def _parse(url: str, body: bytes) -> _Page:
    """A page of structures; ValueError for anything else, also with status 200."""
    answer = orjson.loads(body)
    if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
        raise ValueError("expected a JSON object with a list `data`, found something else")
    if not all(isinstance(entry, dict) and entry.get("id") is not None for entry in answer["data"]):
        raise ValueError("expected an `id` in every entry, found entries without")
    links, meta = answer.get("links") or {}, answer.get("meta") or {}
    following = links.get("next")
    following = following.get("href") if isinstance(following, dict) else following
    if following is None and meta.get("more_data_available") is True:
        raise ValueError("expected links.next as more_data_available is true, found none")
    return _Page(url, body, [str(entry["id"]) for entry in answer["data"]],
                 urljoin(url, following) if following else None, meta.get("data_returned"))


@dataclass
class _Hosts:
    """Polite rates: two requests to one host are at least `interval` seconds apart, over all threads."""

    interval: float
    free_at: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, url: str, stop: threading.Event) -> None:
        host = urlsplit(url).netloc
        with self.lock:
            start = max(time.monotonic(), self.free_at.get(host, 0.0))
            self.free_at[host] = start + self.interval
        _sleep(start - time.monotonic(), stop)


def _sleep(seconds: float, stop: threading.Event) -> None:
    if stop.wait(max(seconds, 0.0)):
        raise HarvestError("stopped by the user")


# ------------------------------------------------------------------------------------------- one database
class _Harvest:
    """One database from its first page to its last; everything it learns lies in its Store."""

    def __init__(self, name: str, base_url: str, folder: Path, config: HarvestConfig, hosts: _Hosts,
                 stop: threading.Event):
        self.name, self.base_url, self.config = name, base_url.rstrip("/"), config
        self.store, self.hosts, self.stop = Store(folder), hosts, stop
        self.failures: Counter = Counter()
        self.requests = 0
        self.visited = {line["url"] for line in self.store.lines}
        self.repairing = False
        headers = {"User-Agent": "cloud_lib OPTIMADE harvest",
                   "Accept": "application/vnd.api+json, application/json"}
        self.client = httpx.Client(timeout=config.timeout, headers=headers, follow_redirects=True)

    # -- requests
    def _body(self, url: str) -> bytes:
        self.hosts.wait(url, self.stop)
        self.requests += 1
        end = time.monotonic() + self.config.deadline
        with self.client.stream("GET", url) as answer:
            parts = []
            for part in answer.iter_bytes():
                parts.append(part)
                if time.monotonic() > end:
                    raise httpx.ReadTimeout(f"answer not complete after {self.config.deadline:g} s")
        if answer.status_code != 200:
            raise httpx.HTTPStatusError(f"status {answer.status_code}", request=answer.request,
                                        response=answer)
        return b"".join(parts)

    def _page(self, url: str, first: bool = False) -> _Page:
        """A page that can be believed, after as many attempts as allowed."""
        doubts = 0
        for attempt in range(self.config.max_attempts):
            try:
                page = _parse(url, self._body(url))
                if doubts < self.config.doubts:
                    self._doubt(page)
                return page
            except httpx.HTTPStatusError as error:
                status, pause = error.response.status_code, _retry_after(error.response.headers)
                self.failures[str(status)] += 1
                if first and status < 500 and status not in RETRY_LATER:
                    raise _Refused(f"{url} answered {status}") from error
                last = str(error)
            except (httpx.TransportError, httpx.DecodingError, httpx.TooManyRedirects, ValueError) as error:
                self.failures[_kind(error)] += 1
                doubts += isinstance(error, _Doubt)
                last, pause = f"{type(error).__name__}: {error}", None
            if attempt + 1 < self.config.max_attempts:
                _sleep(min(pause or self._backoff(attempt), self.config.max_wait), self.stop)
        raise HarvestError(f"{url}: no usable answer in {self.config.max_attempts} attempts, last {last}; "
                           "harvest again to continue here")

    def _backoff(self, attempt: int) -> float:
        return self.config.backoff * 2 ** attempt * random.uniform(0.75, 1.25)

    def _doubt(self, page: _Page) -> None:
        new = set(page.digests) - self.store.seen
        if page.next == page.url or page.next in self.visited:
            raise _Doubt("the next page was already read")
        if not new and page.ids and not self.repairing:
            raise _Doubt("every structure on the page was already read")
        if not page.ids and page.next:
            raise _Doubt("an empty page in the middle")
        n = len(self.store.seen) + len(new)
        if page.next is None and page.expected and n < page.expected:
            raise _Doubt(f"the last page, but {n} of {page.expected} structures came")

    # -- walks
    def _first(self) -> _Page:
        """The first page with the largest page size that the server accepts."""
        limits = [n for n in (self.config.page_limit, 200, 100, 50, 20, 10) if n <= self.config.page_limit]
        attempts = [(limit, self.config.fields) for limit in dict.fromkeys(limits)] + [(None, ())]
        for limit, fields in attempts:
            query = {"page_limit": limit, "response_fields": ",".join(fields), "filter": self.config.filter}
            query = urlencode({k: v for k, v in query.items() if v}, safe=",")
            try:
                return self._page(f"{self.base_url}/v1/structures?{query}".rstrip("?"), first=True)
            except _Refused as error:
                refusal = error
        raise HarvestError(f"{self.name}: refused every page size; {refusal}")

    def _walk(self, url: str | None, bar: tqdm) -> None:
        """Store pages from `url` (None: from the start) to the last one."""
        page = self._page(url) if url else self._first()
        with ThreadPoolExecutor(1) as ahead:
            while page:
                new = set(page.digests) - self.store.seen
                self.store.seen |= new
                self.visited.add(page.url)
                last = page.next is None or page.next in self.visited
                following = None if last else ahead.submit(self._page, page.next)  # while this one is stored
                if new or not self.store.lines:
                    self.store.write(page)
                bar.total = page.expected or bar.total
                bar.update(len(new))
                page = following.result() if following else None

    @property
    def expected(self) -> int | None:
        return self.store.lines[-1]["expected"] if self.store.lines else None

    @property
    def short(self) -> bool:
        return self.expected is not None and len(self.store.seen) < self.expected

    def run(self, bar: tqdm) -> dict:
        """Harvest to the end; the summary says how that went."""
        started, error = time.monotonic(), ""
        lines = self.store.lines
        bar.update(len(self.store.seen))
        try:
            if not lines or lines[-1]["next"]:
                self._walk(lines[-1]["next"] if lines else None, bar)
            for _ in range(self.config.repair_passes):
                if self.short:
                    self.repairing, self.visited = True, set()
                    self._walk(None, bar)
        except HarvestError as failure:
            error = str(failure)
        finally:
            self.client.close()
        status = "failed" if error else "short" if self.short else "complete"
        summary = {"database": self.name, "base_url": self.base_url, "status": status, "pages": len(lines),
                   "structures": len(self.store.seen), "expected": self.expected, "requests": self.requests,
                   "failures": dict(sorted(self.failures.items())), "bytes": sum(x["bytes"] for x in lines),
                   "wall_time_s": round(time.monotonic() - started, 2), "error": error}
        if not error:
            io.write_json(self.store.folder / "done.json", summary)
        return summary


def _kind(error: Exception) -> str:
    kinds = {httpx.TimeoutException: "timeout", httpx.TransportError: "connection",
             httpx.DecodingError: "body", _Doubt: "doubtful page", ValueError: "not a page"}
    return next((kind for base, kind in kinds.items() if isinstance(error, base)), type(error).__name__)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that the server asks for; the header holds seconds or a date."""
    text = headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0) if text else None
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------- all databases
def known_databases(providers: list[str] | None = None) -> dict[str, str]:
    """name -> base address from the built-in table: "mp", or "odbx.2" where a provider has several.

    Raises:
        ValueError: a provider that is not in the table.
    """
    wanted = list(DATABASES) if providers is None else providers
    if unknown := [name for name in wanted if name not in DATABASES]:
        raise ValueError(f"expected providers among {', '.join(DATABASES)}, found {unknown[:3]}; give other "
                         "databases as name=base_url")
    return {name if i == 0 else f"{name}.{i + 1}": url
            for name in wanted for i, url in enumerate(DATABASES[name])}


def discover(providers: list[str] | None = None, index_url: str = PROVIDERS_LIST, timeout: float = 30.0
             ) -> dict[str, str]:
    """Current databases of the providers from the official list; where it cannot be reached, the table's."""
    wanted = list(DATABASES) if providers is None else providers
    found = {}
    with httpx.Client(timeout=timeout, follow_redirects=True) as client:
        listed = {link["id"]: _address(link) for link in _links(client, index_url)}
        for name in wanted:
            links = _links(client, f"{listed[name].rstrip('/')}/v1/links") if listed.get(name) else []
            children = {f"{name}.{link['id']}": _address(link) for link in links
                        if link["attributes"].get("link_type") == "child" and _address(link)}
            found |= children or known_databases([name])
    return found


def _links(client: httpx.Client, url: str) -> list[dict]:
    try:
        return [link for link in orjson.loads(client.get(url).raise_for_status().content)["data"]
                if isinstance(link.get("attributes"), dict)]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return []  # an unreachable index is common; the built-in table stands in


def _address(link: dict) -> str | None:
    url = link["attributes"].get("base_url")
    return url.get("href") if isinstance(url, dict) else url


def harvest(databases: dict[str, str], out_dir: Path, config: HarvestConfig = HarvestConfig()) -> list[dict]:
    """All structures of `databases` (name -> base address) below `out_dir`; one summary row per database.

    Databases run side by side, pages of one database one after the other. Call again after a kill or a
    failure: finished databases are skipped, the others continue at their last page. Writes summary.json.
    """
    out_dir, stop, hosts = Path(out_dir), threading.Event(), _Hosts(config.min_interval)
    rows = {}
    with ThreadPoolExecutor(config.n_parallel) as pool:
        jobs = {pool.submit(_one, name, url, out_dir / name, config, hosts, stop): name
                for name, url in databases.items()}
        try:
            for job in as_completed(jobs):
                rows[jobs[job]] = job.result()
        except BaseException:  # also Ctrl-C: let the threads end after their current page, then go on raising
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    summary = [rows[name] for name in databases]
    io.write_json(out_dir / "summary.json", summary)
    return summary


def _one(name: str, url: str, folder: Path, config: HarvestConfig, hosts: _Hosts,
         stop: threading.Event) -> dict:
    done = folder / "done.json"
    store_ok = done.exists() and len(Store(folder).lines) == io.read_json(done)["pages"]
    if store_ok:
        return io.read_json(done)
    with tqdm(desc=name, unit=" structures", unit_scale=True, disable=None) as bar:
        return _Harvest(name, url, folder, config, hosts, stop).run(bar)
