"""The pre-training corpus: OPTIMADE JSON Lines below raw_dir()/corpus if any, else embedded crystals."""

from collections.abc import Iterator
from pathlib import Path

from cloud_lib import io
from cloud_lib.sources import embedded, records


def files() -> list[Path]:
    """The OPTIMADE files, sorted."""
    return sorted((io.raw_dir() / "corpus").glob("*.jsonl*"))


def iter_corpus() -> Iterator[tuple[str, str, dict]]:
    """Every crystal as (material_id, source, structure), as a stream; `source` is the file's name.

    Raises:
        NotAvailable: no crystals on this machine.
        DamagedFile: a file is cut short or damaged.
    """
    found = files()
    if not found:
        yield from embedded.corpus()
    for file in found:
        for record in records.read_json_lines(file):
            if record.get("type") == "structures":
                yield record["id"], file.name.split(".")[0], record
