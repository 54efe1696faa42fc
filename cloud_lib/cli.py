"""The command line, `python -m cloud_lib <command>`: parses arguments and calls the library, nothing else.

Each command is one function `_cmd_<name>(args)` that imports what it needs when it runs, and one entry in
`build_parser`. A user's mistake ends as one line on standard error and exit status 2; `--traceback` shows
where it came from.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cloud_lib.sources import NotAvailable

USER_ERRORS = (ValueError, OSError, NotAvailable)


def _cmd_notebook(args: argparse.Namespace) -> None:
    from cloud_lib.notebook import run_notebook

    run_notebook(args.source, args.target, args.file, dict(args.parameter), profile=args.profile)


def _cmd_readme(args: argparse.Namespace) -> None:
    from cloud_lib.report import update_readme

    print(f"updated {update_readme(args.profile)}")


def _cmd_scaling(args: argparse.Namespace) -> None:
    import json

    import pandas as pd

    from cloud_lib import scaling

    fitted = scaling.fit(pd.read_csv(args.runs), args.data_column, args.bootstrap, args.seed)
    if args.format == "json":
        print(json.dumps(fitted.to_dict(args.budget), indent=2))
    else:
        print(fitted.text(args.budget))


def _cmd_data(args: argparse.Namespace) -> None:
    from cloud_lib.sources import fetch

    if args.check:
        for path, state in fetch.check():
            print(f"{path:60} {state}")
        fetch.require_intact()
        return
    files = fetch.fetch_public(args.pattern) if args.pattern else fetch.fetch_default()
    print(f"{len(files)} files in {files[0].parent}")


def _cmd_miniature(args: argparse.Namespace) -> None:
    from cloud_lib.sources.miniature import write_miniature

    print(f"synthetic data for trying things out in {write_miniature(args.folder)}")


def _cmd_string(args: argparse.Namespace) -> None:
    import json

    from cloud_lib.representation import describe

    n_errors = n_rows = 0
    for path in args.paths:
        for row in describe(path, args.style, args.symprec, args.engine):
            n_rows, n_errors = n_rows + 1, n_errors + (row["error"] is not None)
            print(json.dumps(row) if args.format == "jsonl" else row["string"] or f"# {row['error']}")
    if n_errors:
        print(f"{n_errors} of {n_rows} crystals have no string, see their error", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    parser = argparse.ArgumentParser(prog="python -m cloud_lib", description=__doc__.splitlines()[0])
    parser.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    notebook = commands.add_parser("notebook", help="execute one notebook with the parameters of a profile")
    notebook.add_argument("source", type=Path, help="notebooks/NN_name.ipynb")
    notebook.add_argument("target", type=Path, help="build/<profile>/NN_name.ipynb")
    notebook.add_argument("-f", "--file", type=Path, help="params/<profile>/NN_name.yaml")
    notebook.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
                          help="one more override; VALUE is read as YAML")
    notebook.add_argument("--profile", help="default: the name of the target's folder")
    notebook.set_defaults(run=_cmd_notebook)

    readme = commands.add_parser("readme", help="rewrite the README's results block from tables/<profile>/")
    readme.add_argument("--profile", default="demo")
    readme.set_defaults(run=_cmd_readme)

    scaling = commands.add_parser("scaling", help="fit the scaling law L = A/N^alpha + B/D^beta + E to a table of runs")
    scaling.add_argument("runs", type=Path, metavar="RUNS.csv",
                         help="one row per run: n_params_non_embedding, val_loss and the data column")
    scaling.add_argument("--data-column", default="n_examples", help="the column that is D (default: %(default)s)")
    scaling.add_argument("--bootstrap", type=int, default=4000, metavar="N", help="resamples (default: %(default)s)")
    scaling.add_argument("--budget", type=float, nargs="+", default=[], metavar="FLOP",
                         help="also print the compute-optimal run at these budgets")
    scaling.add_argument("--format", choices=("text", "json"), default="text")
    scaling.add_argument("--seed", type=int, default=0, help="of the resamples")
    scaling.set_defaults(run=_cmd_scaling)

    data = commands.add_parser("data", help="fetch and verify data files (default: those that make all needs)")
    data.add_argument("pattern", nargs="*", help="public files to download, such as 'matbench/*' or 'discovery/wbm_*'")
    data.add_argument("--check", action="store_true", help="only compare the files on this machine with the manifest")
    data.set_defaults(run=_cmd_data)

    miniature = commands.add_parser("miniature", help="write a tiny folder of synthetic data in the real layout")
    miniature.add_argument("folder", type=Path)
    miniature.set_defaults(run=_cmd_miniature)

    string = commands.add_parser("string", help="print the symmetry strings of crystals")
    string.add_argument("paths", type=Path, nargs="+", metavar="FILE_OR_FOLDER",
                        help="CIF, POSCAR, extended XYZ, OPTIMADE JSON or JSON Lines; .gz is read, too")
    string.add_argument("--style", default="canonical",
                        choices=("paper", "canonical", "site", "composition", "number", "no_wyckoff"))
    string.add_argument("--format", choices=("jsonl", "text"), default="jsonl")
    string.add_argument("--symprec", type=float, default=0.01, help="tolerance in angstrom (default: %(default)s)")
    string.add_argument("--engine", choices=("auto", "spglib", "moyopy"), default="auto")
    string.set_defaults(run=_cmd_string)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 after a user's mistake."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except USER_ERRORS as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
