"""Crystals out of Parquet files, and rows into a table, JSON Lines, CSV, Parquet or NumPy, both in pieces."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cloud_lib import io
from cloud_lib.symmetry import Crystal, CrystalError, as_crystal, read_files

FORMATS = ("table", "jsonl", "csv", "parquet", "npz")
ID_COLUMNS = ("material_id", "id", "name")
CRYSTAL_COLUMNS = ("structure", "cif", "lattice_vectors")
BATCH_ROWS = 1000

Entry = tuple[Path, str, Crystal | CrystalError]
Rows = list[dict[str, Any]]


# --------------------------------------------------------------------------------------------------- reading
def entries(paths: Sequence[str | Path]) -> Iterator[Entry]:
    """(file, material_id, crystal or the reason why not) of every entry in files, folders and Parquet files.

    Paths are checked at once, entries are read as they are asked for.

    Raises:
        FileNotFoundError: no such file, or no readable file in a folder.
        ValueError: a Parquet file without crystals.
    """
    sources = [_parquet(Path(path)) if Path(path).suffix == ".parquet" else read_files(path) for path in paths]
    return (entry for source in sources for entry in source)


def _parquet(path: Path) -> Iterator[Entry]:
    """Rows of a Parquet file with a column `structure` (pymatgen dict or OPTIMADE record, as struct or JSON text),
    `cif` (text), or the columns of OPTIMADE structures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: expected a Parquet file, found damage: {str(error)[:100]}") from error
    names = file.schema_arrow.names
    if not set(CRYSTAL_COLUMNS) & set(names):
        raise ValueError(f"{path}: expected one of the columns {CRYSTAL_COLUMNS}, found {names[:10]}")
    return _parquet_rows(path, file)


def _parquet_rows(path: Path, file: Any) -> Iterator[Entry]:
    number = 0
    for batch in file.iter_batches(BATCH_ROWS):
        for row in batch.to_pylist():
            number += 1
            name = next((str(row[c]) for c in ID_COLUMNS if row.get(c) is not None), f"{path.stem}#{number}")
            try:
                yield path, name, _crystal(row)
            except CrystalError as error:
                yield path, name, error


def _crystal(row: dict[str, Any]) -> Crystal:
    column = next(c for c in CRYSTAL_COLUMNS if c in row)
    value = row if column == "lattice_vectors" else row[column]
    if value is None:
        raise CrystalError(f"empty column {column!r}")
    if column == "cif":
        return _from_cif(value)
    try:
        return as_crystal(json.loads(value) if isinstance(value, str | bytes) else value)
    except ValueError as error:
        raise error if isinstance(error, CrystalError) else CrystalError(f"not JSON: {error}") from error


def _from_cif(text: str) -> Crystal:
    from gemmi import cif

    from cloud_lib.readers import crystal_from_block

    try:
        return crystal_from_block(cif.read_string(text).sole_block())
    except CrystalError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise CrystalError(f"cannot read CIF text: {' '.join(str(error).split())[:120]}") from error


# --------------------------------------------------------------------------------------------------- writing
@contextmanager
def writer(columns: Sequence[str], form: str, output: Path | None = None) -> Iterator[Callable[[Rows], None]]:
    """A function that appends rows to `output` (atomic: it appears when all is written), else to standard output.

    Raises:
        ValueError: unknown format, or Parquet without a file.
    """
    if form not in FORMATS:
        raise ValueError(f"expected a format of {FORMATS}, found {form!r}")
    if form in ("parquet", "npz") and output is None:
        raise ValueError("expected --output FILE for Parquet, found none; name a file")
    if output is None:
        yield _text_writer(columns, form, sys.stdout)
        return
    with io.atomic_path(output) as temporary:
        if form in ("parquet", "npz"):
            with (_parquet_writer if form == "parquet" else _npz_writer)(temporary) as write:
                yield write
        else:
            with open(temporary, "w", newline="", encoding="utf-8") as handle:
                yield _text_writer(columns, form, handle)


def form_of(output: Path | None, form: str | None) -> str:
    """The format that was asked for, else that of the file's suffix, else a table."""
    suffix = output.suffix.removeprefix(".") if output else ""
    return form or (suffix if suffix in FORMATS else "table")


def _text_writer(columns: Sequence[str], form: str, handle: TextIO) -> Callable[[Rows], None]:
    if form == "jsonl":
        return lambda rows: handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if form == "csv":
        table = csv.DictWriter(handle, columns)
        table.writeheader()
        return table.writerows
    handle.write(_line("file", "formula", "group", "property", "value", "±", "unit") + "\n")
    return lambda rows: handle.writelines(line + "\n" for row in rows for line in _lines(row))


def _line(file: str, formula: str, group: str, name: str, value: str, std: str, unit: str) -> str:
    return f"{file:28} {formula:14} {group:>5}  {name:14} {value:>10} {std:>9}  {unit}".rstrip()


def _lines(row: dict[str, Any]) -> Iterator[str]:
    """A crystal in the table: a line per property, then its string, its warnings or its error."""
    head = [Path(row["file"]).name, row["formula_reduced"] or "", str(row["space_group"] or "")]
    if row["material_id"] != Path(row["file"]).stem:
        head[0] = f"{head[0]}:{row['material_id']}"
    for name in [c.removesuffix("_std") for c in row if c.endswith("_std")]:
        if row[name] is not None:
            yield _line(*head, name, f"{row[name]:.4g}", f"{row[f'{name}_std']:.2g}", row[f"{name}_unit"])
            head = ["", "", ""]
    if head[0]:
        yield _line(*head, "", "", "", "")
    for what in ("string", "warnings", "error"):
        if row[what]:
            yield f"    {'' if what == 'string' else what + ': '}{row[what]}"


@contextmanager
def _parquet_writer(target: Path) -> Iterator[Callable[[Rows], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    opened: list[pq.ParquetWriter] = []

    def write(rows: Rows) -> None:
        schema = opened[0].schema if opened else _schema(pa, rows[0])
        if not opened:
            opened.append(pq.ParquetWriter(target, schema, compression="zstd"))
        opened[0].write_table(pa.Table.from_pylist(rows, schema))

    try:
        yield write
    finally:
        for file in opened:
            file.close()


def _schema(pa: Any, row: dict[str, Any]) -> Any:
    """Types by the columns' names, as the first rows may hold nothing but errors."""
    def kind(name: str) -> Any:
        if name == "space_group":
            return pa.int16()
        if name == "embedding":
            return pa.list_(pa.float32())
        return pa.float64() if f"{name}_unit" in row or name.endswith("_std") else pa.string()

    return pa.schema([(name, kind(name)) for name in row])


@contextmanager
def _npz_writer(target: Path) -> Iterator[Callable[[Rows], None]]:
    """Embeddings (n, width) float32 with the rows' material_id, string and error; NaN where there is none."""
    import numpy as np

    rows: Rows = []
    yield lambda piece: rows.extend(
        row | {"embedding": None if row["embedding"] is None else np.asarray(row["embedding"], np.float32)}
        for row in piece)
    width = max((len(row["embedding"]) for row in rows if row["embedding"] is not None), default=0)
    empty = np.full(width, np.nan, np.float32)
    vectors = [empty if row["embedding"] is None else row["embedding"] for row in rows]
    names = {name: np.array([row[name] or "" for row in rows]) for name in ("material_id", "string", "error")}
    np.savez(target, embedding=np.array(vectors, np.float32).reshape(len(rows), width), **names)
