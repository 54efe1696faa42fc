"""Are the strings what they claim? Random crystals of all 230 groups, each under seven disturbances.

    python -m benchmarks.bench_invariance [--per-group 20] [--engine auto] [--groups 1 230]

Writes benchmarks/results/invariance.csv (one row per disturbance) and invariance.json (settings, totals and
every exception). A case counts when the symmetry finder sees the group the crystal was built in, before and
after. Style `paper` is read with spglib, as the published code does, on the first crystals of each group (it
is slow).
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.random_crystals import DISTURBANCES, random_crystal
from cloud_lib.representation import string
from cloud_lib.symmetry import Crystal, CrystalError, SymmetryRecord, symmetry_record

INVARIANT = ("canonical", "site")
RESULTS = Path(__file__).parent / "results"


def record_or_none(crystal: Crystal, engine: str) -> SymmetryRecord | None:
    """The record, or None where the finder fails."""
    try:
        return symmetry_record(crystal, engine=engine)
    except CrystalError:
        return None


def base_crystals(space_group: int, count: int, rng: np.random.Generator, engine: str):
    """(crystal, record) of `count` crystals in which the finder sees the group that they were built in."""
    found = []
    for _ in range(50 * count):
        crystal = random_crystal(space_group, rng)
        record = record_or_none(crystal, engine)
        if record is not None and record.space_group == space_group:
            found.append((crystal, record))
        if len(found) == count:
            break
    return found


def cases(space_group: int, count: int, rng: np.random.Generator, engine: str, n_paper: int = 5):
    """One dict per crystal and disturbance: what the finder saw, and the strings before and after."""
    for index, (crystal, record) in enumerate(base_crystals(space_group, count, rng, engine)):
        before, paper = strings(record), paper_string(crystal) if index < n_paper else None
        for name, disturb in DISTURBANCES.items():
            disturbed = disturb(crystal, rng)
            other = record_or_none(disturbed, engine)
            right = other is not None and other.space_group == space_group
            yield {"space_group": space_group, "crystal": index, "disturbance": name,
                   "found": other and other.space_group, "right": right, "before": before,
                   "after": strings(other) if right else None,
                   "same_orbits": right and _orbit_sizes(other) == _orbit_sizes(record),
                   "paper": paper and (paper == paper_string(disturbed))}


def strings(record: SymmetryRecord) -> dict[str, str]:
    """The invariant styles of a record."""
    return {style: string(record, style) for style in INVARIANT}


def paper_string(crystal: Crystal) -> str:
    """The published code's string; "" where spglib fails."""
    record = record_or_none(crystal, "spglib")
    return string(record, "paper") if record else ""


def _orbit_sizes(record: SymmetryRecord) -> Counter:
    return Counter((o.element, o.multiplicity) for o in record.orbits)


def summary(rows: list[dict]) -> list[dict]:
    """Per disturbance: number of cases, seen right, and unchanged strings per style."""
    table = []
    for name in [*DISTURBANCES, "all"]:
        chosen = [r for r in rows if name in (r["disturbance"], "all")]
        right = [r for r in chosen if r["right"]]
        unchanged = {f"n_unchanged_{style}": sum(r["before"][style] == r["after"][style] for r in right)
                     for style in INVARIANT}
        paper = [r["paper"] for r in chosen if r["paper"] is not None]
        table.append({"disturbance": name, "n_cases": len(chosen), "n_finder_right": len(right)} | unchanged
                     | {"n_cases_paper": len(paper), "n_unchanged_paper": sum(paper)})
    return table


def exceptions(rows: list[dict]) -> list[dict]:
    """Every case in which `canonical` or `site` changed, or the finder saw another group, with its cause."""
    listed = []
    for row in rows:
        changed = [s for s in INVARIANT if row["right"] and row["before"][s] != row["after"][s]]
        if changed or not row["right"]:
            cause = ("finder: another group or none" if not row["right"] else
                     "strings differ for the same orbits" if row["same_orbits"] else "finder: other orbits")
            listed.append({k: row[k] for k in ("space_group", "crystal", "disturbance", "found")}
                          | {"cause": cause, "before": row["before"]["site"], "after": row["after"]["site"]})
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-group", type=int, default=20)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--groups", type=int, nargs=2, default=(1, 230))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for group in range(args.groups[0], args.groups[1] + 1):
        rows += cases(group, args.per_group, np.random.default_rng([args.seed, group]), args.engine)
    table = summary(rows)
    short = [g for g in range(args.groups[0], args.groups[1] + 1)
             if len({r["crystal"] for r in rows if r["space_group"] == g}) < args.per_group]
    RESULTS.mkdir(exist_ok=True)
    lines = [",".join(table[0])] + [",".join(map(str, row.values())) for row in table]
    (RESULTS / "invariance.csv").write_text("\n".join(lines) + "\n")
    document = {"per_group": args.per_group, "engine": args.engine, "seed": args.seed, "symprec": 0.01,
                "n_crystals": len({(r["space_group"], r["crystal"]) for r in rows}),
                "groups_with_fewer_crystals": short, "total": table[-1], "exceptions": exceptions(rows)}
    (RESULTS / "invariance.json").write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(lines))
    print(f"{len(document['exceptions'])} exceptions: {Counter(e['cause'] for e in document['exceptions'])}")


if __name__ == "__main__":
    main()
