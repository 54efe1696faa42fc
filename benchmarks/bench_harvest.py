"""The harvest against the OPTIMADE reference server on loopback: its rate, and what faults and kills leave.

The server is not a dependency of this package. Once: `python -m venv server-env && server-env/bin/pip install
"optimade[server]==1.5.0"`. Then: `python benchmarks/bench_harvest.py --server-python server-env/bin/python
--data c2db.jsonl.gz` (any OPTIMADE JSON Lines file; about 5,000 structures take some minutes).
"""

import argparse
import contextlib
import gzip
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from cloud_lib.sources.optimade import FIELDS, HarvestConfig, harvest, iter_structures

FAULTS = ("429", "500", "cut", "drip", "reset", "wrong JSON", "repeat", "missing")
CHILD = """import sys; from pathlib import Path; from cloud_lib.sources.optimade import HarvestConfig, harvest
harvest({"db": sys.argv[1]}, Path(sys.argv[2]), HarvestConfig(page_limit=50, min_interval=0, backoff=0.05,
                                                        deadline=3))"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def reference_server(python: str, data: Path, folder: Path):
    """The optimade package's own server on an in-memory database; yields its base address."""
    lines = folder / "structures.jsonl"
    opener = gzip.open if data.suffix == ".gz" else open
    with opener(data, "rb") as source:
        lines.write_bytes(source.read())
    port = free_port()
    config = {"database_backend": "mongomock", "insert_test_data": False, "insert_from_jsonl": str(lines),
              "base_url": f"http://127.0.0.1:{port}", "page_limit_max": 500}
    (folder / "config.json").write_text(json.dumps(config))
    command = [python, "-m", "uvicorn", "optimade.server.main:app", "--port", str(port), "--log-level", "error"]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=os.environ | {"OPTIMADE_CONFIG_FILE": str(folder / "config.json")},
                                  stdout=log, stderr=log)
    try:
        wait_for(config["base_url"], server, folder / "server.log")
        yield config["base_url"]
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(1200):
        if server.poll() is not None:
            raise RuntimeError(f"the reference server stopped: {log.read_text()[-500:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/v1/structures?page_limit=1", timeout=60).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("the reference server did not answer within 120 s")


def plain_loop(url: str) -> tuple[int, float]:
    """The rate that the server can deliver: follow links.next, keep nothing."""
    started, n = time.perf_counter(), 0
    following = f"{url}/v1/structures?page_limit=500&response_fields={','.join(FIELDS)}"
    with httpx.Client(timeout=120) as client:
        while following:
            page = client.get(following).json()
            n, following = n + len(page["data"]), page["links"]["next"]
    return n, time.perf_counter() - started


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on; a share of the answers is spoilt on the way, one of FAULTS each."""

    daemon_threads = True

    def __init__(self, target: str, share: float, seed: int):
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.target, self.share, self.dice = target, share, random.Random(seed)
        self.before, self.counts = b"{}", {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass


class ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        proxy = self.server
        fault = proxy.dice.choice(FAULTS) if proxy.dice.random() < proxy.share else "none"
        proxy.counts[fault] = proxy.counts.get(fault, 0) + 1
        if fault in ("429", "500"):
            return self.answer(int(fault), b"{}", {"Retry-After": "1"})
        if fault == "missing":
            return self.answer(404, b"{}")
        real = httpx.get(proxy.target + self.path, timeout=120)
        body = real.content.replace(proxy.target.encode(), proxy.url.encode())
        previous, proxy.before = proxy.before, body
        self.spoil(fault, real.status_code, body, previous)

    def spoil(self, fault, status, body, previous):
        if fault == "cut":
            self.answer(status, body[: len(body) // 3], {"Content-Length": str(len(body))})
        elif fault == "drip":
            self.answer(status, b"", {"Content-Length": str(len(body))})
            for byte in body[:60]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.5)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.answer(status, {"wrong JSON": b'{"data": [', "repeat": previous}.get(fault, body))
        self.close_connection = fault in ("cut", "drip", "reset")

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def rates(url: str, folder: Path, repeats: int) -> None:
    """Plain loop and harvest in turn; CPU is this process's, the server's comes on top."""
    ratios = []
    for k in range(repeats):
        cpu = time.process_time()
        n, ceiling = plain_loop(url)
        middle, started = time.process_time(), time.perf_counter()
        row, = harvest({"db": url}, folder / f"plain-{k}", HarvestConfig(min_interval=0))
        seconds = time.perf_counter() - started
        ratios.append(ceiling / seconds)
        print(f"plain loop {n / ceiling:.0f} structures/s, CPU {middle - cpu:.2f} s; harvest "
              f"{row['structures'] / seconds:.0f} structures/s, CPU {time.process_time() - middle:.2f} s; "
              f"ratio {ratios[-1]:.3f}; on disk {row['bytes'] / row['structures']:.0f} B each")
    print(f"median ratio {statistics.median(ratios):.3f} of {repeats}")


def faults_and_kills(url: str, folder: Path, share: float, kills: int, seed: int) -> None:
    """Kill the harvest again and again behind the fault proxy; then let it end, and compare with the truth."""
    truth = {material_id for material_id, _, _ in iter_structures(folder / "plain-0")}
    proxy, dice = FaultProxy(url, share, seed), random.Random(seed)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    target, started, done = folder / "faults", time.perf_counter(), False
    for k in range(kills + 1):
        process = subprocess.Popen([sys.executable, "-c", CHILD, proxy.url, str(target)])
        if k < kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(dice.uniform(1.5, 8))
            process.send_signal(signal.SIGKILL)
        process.wait()
    for _ in range(5):  # a database that failed or came short is harvested again, as a user would
        done = (target / "db" / "done.json").exists()
        if not done:
            subprocess.run([sys.executable, "-c", CHILD, proxy.url, str(target)], check=True)
    found = [material_id for material_id, _, _ in iter_structures(target)]
    proxy.shutdown()
    print(f"faults {proxy.counts}, {kills} kills, {time.perf_counter() - started:.0f} s: {len(found)} structures, "
          f"{len(set(found))} distinct, {len(truth - set(found))} lost, {len(set(found) - truth)} foreign")
    if len(found) != len(truth) or set(found) != truth:
        raise SystemExit("the harvest differs from the server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server-python", required=True, help="Python of the environment with optimade[server]")
    parser.add_argument("--data", type=Path, required=True, help="OPTIMADE JSON Lines (.gz)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fault-share", type=float, default=0.35)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, reference_server(args.server_python, args.data, Path(name)) as url:
        rates(url, Path(name), args.repeats)
        faults_and_kills(url, Path(name), args.fault_share, args.kills, args.seed)


if __name__ == "__main__":
    main()
