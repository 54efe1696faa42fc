"""The harvest against a small OPTIMADE server that misbehaves, and against kills."""

import gzip
import json
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from cloud_lib.sources import optimade
from cloud_lib.sources.optimade import (
    HarvestConfig, Store, discover, harvest, iter_structures, known_databases,
)

FAST = HarvestConfig(page_limit=10, min_interval=0, backoff=0.001, timeout=2, deadline=0.5, max_attempts=30,
                     repair_passes=6)
FAULTS = ("429", "500", "404", "cut", "drip", "reset", "html", "no data", "repeat", "skip", "end early",
          "empty")


class Server(ThreadingHTTPServer):
    """OPTIMADE pages of `n` structures; `faults(page, visit)` names what goes wrong, if anything."""

    daemon_threads = True

    def __init__(self, n, faults=lambda page, visit: None, max_limit=20, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.n, self.faults, self.max_limit, self.delay = n, faults, max_limit, delay
        self.visits, self.counts = {}, {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # the faults break connections on purpose


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, query = self.server, parse_qs(urlsplit(self.path).query)
        limit, offset = int(query.get("page_limit", ["20"])[0]), int(query.get("page_offset", ["0"])[0])
        if limit > server.max_limit:
            return self.answer(403, {"errors": [{"title": "page_limit too high"}]})
        time.sleep(server.delay)
        visit = server.visits[offset] = server.visits.get(offset, 0) + 1
        fault = server.faults(offset // limit, visit)
        server.counts[fault] = server.counts.get(fault, 0) + 1
        return self.faulty(fault, offset, limit)

    def page(self, offset, limit, ends=False):
        ids = range(offset, min(offset + limit, self.server.n))
        more = offset + limit < self.server.n and not ends
        following = f"{self.server.url}/v1/structures?page_limit={limit}&page_offset={offset + limit}"
        entries = [{"id": f"x-{i}", "type": "structures", "attributes": {"nsites": i}} for i in ids]
        return {"data": entries, "links": {"next": following if more else None},
                "meta": {"data_returned": self.server.n, "more_data_available": more}}

    def faulty(self, fault, offset, limit):
        body = json.dumps(self.page(offset, limit)).encode()
        if fault in ("429", "500", "404"):
            self.answer(int(fault), {"errors": []}, {"Retry-After": "0"} if fault == "429" else {})
        elif fault == "cut":
            self.answer(200, body[: len(body) // 2], {"Content-Length": str(len(body))})
            self.close_connection = True
        elif fault == "drip":
            self.answer(200, b"", {"Content-Length": str(len(body))})
            for byte in body[:8]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER: RST on close
            self.close_connection = True
        elif fault == "html":
            self.answer(200, b"<html>maintenance</html>")
        elif fault == "no data":
            self.answer(200, {"meta": {}, "error": "busy"})
        else:
            shift = {"repeat": -limit, "skip": limit}.get(fault, 0)
            page = self.page(max(offset + shift, 0), limit, ends=fault == "end early")
            self.answer(200, page | ({"data": []} if fault == "empty" else {}))

    def answer(self, status, body, headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve(*args, **options):
    server = Server(*args, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def identifiers(folder):
    return [material_id for material_id, _, _ in iter_structures(folder)]


def expected(n):
    return sorted(f"x-{i}" for i in range(n))


def test_whole_database_with_the_page_size_the_server_accepts(tmp_path):
    with serve(95, max_limit=20) as server:
        row, = harvest({"db": server.url}, tmp_path, HarvestConfig(min_interval=0, backoff=0.001))
    assert row["status"] == "complete" and row["structures"] == row["expected"] == 95
    assert row["pages"] == 5 and row["failures"] == {"403": 4}  # 500, 200, 100, 50 refused
    assert sorted(identifiers(tmp_path)) == expected(95)
    material_id, source, entry = next(iter_structures(tmp_path))
    assert (material_id, source, json.loads(entry)["attributes"]) == ("x-0", "db", {"nsites": 0})


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_once_per_page(tmp_path, fault):
    with serve(45, lambda page, visit: fault if page % 2 and visit == 1 else None) as server:
        row, = harvest({"db": server.url}, tmp_path, FAST)
    assert server.counts[fault] >= 2
    assert row["status"] == "complete", row
    assert sorted(identifiers(tmp_path)) == expected(45)


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_faults_over_several_databases(tmp_path, seed):
    dice = random.Random(seed)
    with serve(150, lambda page, visit: dice.choice(FAULTS) if dice.random() < 0.4 else None) as server:
        rows = harvest({name: server.url for name in ("one", "two", "three")}, tmp_path, FAST)
    assert [row["status"] for row in rows] == ["complete"] * 3, rows
    assert sorted(identifiers(tmp_path)) == sorted(expected(150) * 3)


def test_kills_lose_and_double_nothing(tmp_path):
    code = (f"import sys; from pathlib import Path; from cloud_lib.sources.optimade import *; "
            f"harvest({{'db': sys.argv[1]}}, Path({str(tmp_path)!r}), "
            "HarvestConfig(page_limit=10, min_interval=0, backoff=0.001))")
    with serve(600, delay=0.02) as server:
        for pages in (3, 12, 30):
            process = subprocess.Popen([sys.executable, "-c", code, server.url])
            while len(list(tmp_path.glob("db/pages/0*.gz"))) < pages:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        row, = harvest({"db": server.url}, tmp_path, FAST)
        requests = sum(server.visits.values())
    assert row["status"] == "complete" and requests <= 60 + 2 * 3  # at most the pages in flight came twice
    assert sorted(identifiers(tmp_path)) == expected(600)
    with serve(600) as server:
        assert harvest({"db": server.url}, tmp_path, FAST) == [row]
        assert not server.visits  # finished: nothing is asked


def test_one_dead_database_does_not_stop_the_others(tmp_path):
    impatient = HarvestConfig(page_limit=10, min_interval=0, backoff=0.001, max_attempts=2)
    with serve(30) as good, serve(30, lambda page, visit: "500" if page == 1 else None) as bad:
        rows = harvest({"bad": bad.url, "good": good.url, "gone": "http://127.0.0.1:9"}, tmp_path, impatient)
        assert [row["status"] for row in rows] == ["failed", "complete", "failed"]
        assert "no usable answer in 2 attempts" in rows[0]["error"] and rows[0]["structures"] == 10
        bad.faults = lambda page, visit: None
        again = harvest({"bad": bad.url}, tmp_path, impatient)
    assert again[0]["status"] == "complete" and again[0]["structures"] == 30


def test_a_server_that_states_too_many_ends_as_short(tmp_path):
    with serve(30) as server:
        page = Handler.page
        Handler.page = lambda self, *a, **k: page(self, *a, **k) | {"meta": {"data_returned": 33}}
        try:
            row, = harvest({"db": server.url}, tmp_path, FAST)
        finally:
            Handler.page = page
    assert row["status"] == "short" and (row["structures"], row["expected"]) == (30, 33)


def test_damaged_page_is_found_and_fetched_again(tmp_path):
    with serve(50) as server:
        harvest({"db": server.url}, tmp_path, FAST)
        page = tmp_path / "db" / "pages" / "00000002.json.gz"
        good = page.read_bytes()
        page.write_bytes(gzip.compress(b"{}").ljust(len(good), b"\0"))
        with pytest.raises(ValueError, match="expected sha256 .* delete the page"):
            identifiers(tmp_path)
        page.unlink()
        row, = harvest({"db": server.url}, tmp_path, FAST)
    assert row["status"] == "complete" and sorted(identifiers(tmp_path)) == expected(50)


def test_torn_index_line_costs_one_page(tmp_path):
    with serve(50) as server:
        harvest({"db": server.url}, tmp_path, FAST)
    index = tmp_path / "db" / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    store = Store(tmp_path / "db")
    assert len(store.lines) == 4 and len(store.seen) == 40
    assert index.read_bytes().count(b"\n") == 4


def test_polite_rate_holds_over_databases_of_one_host(tmp_path):
    slow = HarvestConfig(page_limit=10, min_interval=0.05)
    with serve(30) as server:
        started = time.monotonic()
        harvest({"one": server.url, "two": server.url}, tmp_path, slow)
    assert time.monotonic() - started >= 5 * 0.05


def test_retry_after_in_seconds_or_as_a_date():
    assert optimade._retry_after({"retry-after": "7"}) == 7
    assert optimade._retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert optimade._retry_after({}) is None and optimade._retry_after({"retry-after": "soon"}) is None


def test_databases_of_the_paper():
    assert len(optimade.DATABASES) == 14
    assert known_databases(["odbx"]).keys() == {"odbx", "odbx.2", "odbx.3"}
    with pytest.raises(ValueError, match="expected providers among aflow, .* found"):
        known_databases(["nowhere"])


def test_discovery_falls_back_to_the_table(monkeypatch):
    index = {"http://list": [{"id": "mp", "attributes": {"base_url": "http://mp"}},
                             {"id": "cod", "attributes": {"base_url": None}}],
             "http://mp/v1/links": [
                 {"id": "a", "attributes": {"base_url": {"href": "http://a"}, "link_type": "child"}},
                 {"id": "up", "attributes": {"base_url": "http://up", "link_type": "root"}}]}
    monkeypatch.setattr(optimade, "_links", lambda client, url: index.get(url, []))
    assert discover(["mp", "cod"], "http://list") == {"mp.a": "http://a", **known_databases(["cod"])}
    monkeypatch.undo()
    assert discover(["cod"], "http://127.0.0.1:9/v1/links", timeout=1) == known_databases(["cod"])
