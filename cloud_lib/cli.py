"""The command line, `python -m cloud_lib <command>`: parses arguments and calls the library, nothing else.

Each command is one function `_cmd_<name>(args)` that imports what it needs when it runs, and one entry in
`build_parser`. A user's mistake ends as one line on standard error and exit status 2; `--traceback` shows
where it came from.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_lib.sources import NotAvailable

if TYPE_CHECKING:
    from cloud_lib.bundle import Bundle

USER_ERRORS = (ValueError, OSError, NotAvailable)


def _cmd_notebook(args: argparse.Namespace) -> None:
    from cloud_lib import io
    from cloud_lib.notebook import missing_results, run_notebook

    given = dict(args.parameter)
    if args.restore:
        profile = args.profile or args.target.parent.name
        if missing := missing_results(args.source, io.results_dir() / profile):
            print(f"{args.source.stem}: left out, {missing[0]} is not there; run make {args.source.stem[:2]} PROFILE={profile}")
            return
        given["stage"] = "restore"
    run_notebook(args.source, args.target, args.file, given, profile=args.profile)


def _cmd_readme(args: argparse.Namespace) -> None:
    from cloud_lib.report import update_readme

    print(f"updated {update_readme(args.profile)}")


def _cmd_report(args: argparse.Namespace) -> None:
    from cloud_lib import site

    print(site.build(args.profile, args.out))


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


def _cmd_string(args: argparse.Namespace) -> int:
    import json

    from cloud_lib.representation import describe

    n_errors = n_rows = 0
    for path in args.paths:
        for row in describe(path, args.style, args.symprec, args.engine):
            n_rows, n_errors = n_rows + 1, n_errors + (row["error"] is not None)
            print(json.dumps(row) if args.format == "jsonl" else row["string"] or f"# {row['error']}")
    if n_errors:
        print(f"{n_errors} of {n_rows} crystals have no string, see their error", file=sys.stderr)
    return int(n_errors > 0)


def _cmd_harvest(args: argparse.Namespace) -> None:
    import pandas as pd

    from cloud_lib import io
    from cloud_lib.sources import optimade

    given = dict(name.split("=", 1) for name in args.databases if "=" in name)
    providers = [name for name in args.databases if "=" not in name]
    if providers or not given:
        find = optimade.known_databases if args.offline_list else optimade.discover
        given |= find(providers or None)
    config = optimade.HarvestConfig(args.page_limit, filter=args.filter, n_parallel=args.parallel,
                                    min_interval=args.interval)
    rows = optimade.harvest(given, args.out or io.raw_dir() / "optimade", config)
    columns = ["database", "status", "structures", "expected", "pages", "requests", "failures", "bytes", "error"]
    print(pd.DataFrame(rows)[columns].to_string(index=False))
    if failed := [row["database"] for row in rows if row["status"] == "failed"]:
        raise ConnectionError(f"{len(failed)} of {len(rows)} databases failed, e.g. {failed[:3]}; run it again: "
                              "each continues at its last page")


def _cmd_curate(args: argparse.Namespace) -> None:
    import json

    from cloud_lib import curation

    crystals = curation.path_items(args.paths) if args.paths else curation.corpus_items()
    options = {"symprec": args.symprec, "n_workers": args.workers, "partition_size": args.partition_size,
               "engine": args.engine, "memory": args.memory}
    if args.scheduler is None:
        manifest = curation.curate(crystals, args.out, **options)
    else:
        from distributed import Client

        with Client(None if args.scheduler == "local" else args.scheduler) as client:
            manifest = curation.curate(crystals, args.out, **options, executor=client.get_executor())
    print(json.dumps(manifest["counts"], indent=2))


def _cmd_generate(args: argparse.Namespace) -> None:
    from cloud_lib import generate

    counts = generate.write(args.corpus, args.out, args.number, args.seed)
    print(f"{counts['n']} new strings from {counts['n_prototypes']} prototypes in {args.out}")


def _cmd_predict(args: argparse.Namespace) -> int:
    from cloud_lib import tabular, use
    from cloud_lib.model_card import listing

    models = _models(args.models)
    if args.list:
        print(listing(models.choose(args.property)))
        return 0
    if not args.paths:
        raise ValueError("expected files or folders with crystals, found none; name them, or say --list")
    chosen = models.choose(args.property)
    pieces = use.predict_files(args.paths, models, args.property, args.device)
    form = tabular.form_of(args.output, args.format)
    with tabular.writer(use.columns(chosen), form, args.output) as write:
        return _write_rows(pieces, write)


def _cmd_embed(args: argparse.Namespace) -> int:
    from cloud_lib import tabular, use

    form = "jsonl" if args.output is None else args.output.suffix.removeprefix(".")
    if form not in ("npz", "parquet", "jsonl"):
        raise ValueError(f"expected --output with .npz, .parquet or .jsonl, found {args.output}")
    pieces = use.embed_entries(tabular.entries(args.paths), _models(args.models), args.device)
    with tabular.writer([*use.FACTS, "embedding", "error"], form, args.output) as write:
        return _write_rows(pieces, write)


def _models(folder: Path | None) -> "Bundle":
    from cloud_lib import bundle

    # oneDNN keeps compiled code for every batch shape that it has seen, 1,024 of them: 400 MB in a long run
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    return bundle.find(folder)


def _write_rows(pieces: Iterable[list[dict]], write: Callable[[list[dict]], None]) -> int:
    """Write rows piece by piece with progress on standard error; status 1 if a row has an error."""
    from tqdm.auto import tqdm

    n_rows = n_errors = 0
    with tqdm(desc="crystals", unit="", disable=None) as bar:
        for rows in pieces:
            write(rows)
            n_rows, n_errors = n_rows + len(rows), n_errors + sum(row["error"] is not None for row in rows)
            bar.update(len(rows))
    if n_errors:
        print(f"{n_errors} of {n_rows} crystals failed, see their error", file=sys.stderr)
    return int(n_errors > 0)


def _cmd_bundle(args: argparse.Namespace) -> None:
    from cloud_lib import bundle
    from cloud_lib.model_card import listing

    if args.members is not None and (args.members < 1 or args.models is None):
        raise ValueError(f"expected --members of at least 1 together with --models checkpoints/<profile>, found "
                         f"{args.members} and {args.models}; name both")
    source = bundle.find(args.models) if args.members is None else bundle.from_runs(args.models, args.members)
    made = bundle.write(source, args.out, args.property, args.note)
    size = sum(file.stat().st_size for file in made.folder.rglob("*") if file.is_file())
    print(listing(made.choose()))
    print(f"{size / 1e6:.1f} MB in {made.folder}")


def _cmd_leaderboard(args: argparse.Namespace) -> None:
    from cloud_lib import leaderboards

    if args.which == "matbench":
        written = leaderboards.write_matbench(args.profile, args.out, args.model, args.partial)
    else:
        written = leaderboards.write_discovery(args.profile, args.out, args.partial)
    print("\n".join(map(str, written)))


def _cmd_hub(args: argparse.Namespace) -> None:
    from cloud_lib import hub

    if args.action == "push":
        print(hub.push(args.source, args.target, private=not args.public))
    else:
        print(f"converted {args.source} into {hub.convert_published(args.source, args.target)}")


def _cmd_slurm(args: argparse.Namespace) -> None:
    from cloud_lib import slurm

    if (args.units is None) == (not args.command_line):
        raise ValueError("expected either --units UNITS.json or -- COMMAND, found both or neither")
    script = args.script or (args.units or Path("job")).with_suffix(".sbatch")
    if args.units:
        text = slurm.units_script(args.units, args.options, args.array)
    else:
        text = slurm.command_script(script.stem, args.command_line, args.options, script.resolve().parent)
    slurm.write(text, script)
    print(text if args.dry_run else f"job {slurm.submit(script)} from {script}")


def _cmd_export(args: argparse.Namespace) -> None:
    from cloud_lib import transfer

    print(transfer.export(args.profile, args.folder, args.parts).to_string(index=False))
    print(f"{transfer.size_mib(args.folder):.1f} MiB in {args.folder}; on the other machine, in the repository:\n"
          f"python -m cloud_lib.remote {args.folder} --minutes 9 --out OUT")


def _cmd_import_results(args: argparse.Namespace) -> None:
    from cloud_lib import transfer

    counts = transfer.import_results(args.folder, args.profile, args.parts)
    print(", ".join(f"{n} {what}" for what, n in counts.items()) or "no results in it")


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
    notebook.add_argument("--restore", action="store_true",
                          help="with stage=restore, from results/<profile>/; left out where nothing is kept there")
    notebook.set_defaults(run=_cmd_notebook)

    readme = commands.add_parser("readme", help="rewrite the README's results block from tables/<profile>/")
    readme.add_argument("--profile", default="demo")
    readme.set_defaults(run=_cmd_readme)

    report = commands.add_parser("report", help="make a site of a profile's notebooks, tables and figures")
    report.add_argument("--profile", default="demo")
    report.add_argument("--out", type=Path, metavar="DIR", help="default: build/report/<profile>")
    report.set_defaults(run=_cmd_report)

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
                        choices=("paper", "canonical", "site", "composition", "number", "no_generator", "no_wyckoff",
                                 "number_no_wyckoff"))
    string.add_argument("--format", choices=("jsonl", "text"), default="jsonl")
    string.add_argument("--symprec", type=float, default=0.01, help="tolerance in angstrom (default: %(default)s)")
    string.add_argument("--engine", choices=("auto", "spglib", "moyopy"), default="auto")
    string.set_defaults(run=_cmd_string)
    _add_curation(commands)
    _add_use(commands)
    _add_slurm(commands)
    _add_transfer(commands)
    return parser


def _add_transfer(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="write a profile's training units for a machine with torch only")
    results = commands.add_parser("import-results", help="take back what that machine has trained")
    for command in (export, results):
        command.add_argument("folder", type=Path, metavar="DIR")
        command.add_argument("--profile", nargs="+", required=True, metavar="NAME")
        command.add_argument("--parts", nargs="+", metavar="PART", help="default: %(default)s",
                             default=["pretraining", "matbench", "discovery", "unconvbench", "baselines", "scaling"],
                             choices=("pretraining", "matbench", "discovery", "unconvbench", "baselines", "scaling",
                                      "ablations"))
    export.set_defaults(run=_cmd_export)
    results.set_defaults(run=_cmd_import_results)


def _add_slurm(commands: argparse._SubParsersAction) -> None:
    slurm = commands.add_parser("slurm", help="submit a command, or an array of training units, as a batch job")
    slurm.add_argument("--units", type=Path, metavar="UNITS.json", help="train these units")
    slurm.add_argument("--array", action="store_true", help="with --units: one task of a job array per unit")
    slurm.add_argument("--script", type=Path, metavar="FILE.sbatch", help="default: job.sbatch, or beside the units")
    slurm.add_argument("--options", default="", help="of sbatch, such as '--gpus=2 --time=08:00:00'")
    slurm.add_argument("--dry-run", action="store_true", help="write the script and show it, submit nothing")
    slurm.add_argument("command_line", nargs="*", metavar="COMMAND", help="after --, run in the repository's root")
    slurm.set_defaults(run=_cmd_slurm)


def _add_use(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser("predict", help="predict properties of your own crystals")
    embed = commands.add_parser("embed", help="[CLS] vectors of crystals from the pre-trained encoder")
    for command in (predict, embed):
        command.add_argument("paths", type=Path, nargs="+" if command is embed else "*", metavar="FILE_OR_FOLDER",
                             help="CIF, POSCAR, extended XYZ, OPTIMADE JSON or JSON Lines (.gz is read, too), Parquet")
        command.add_argument("--models", type=Path, metavar="DIR",
                             help="a bundle, checkpoints/<profile>, or one fine-tuned model (default: models/, else the profile's own)")
        command.add_argument("--output", "-o", type=Path, metavar="FILE", help="default: standard output")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: %(default)s)")
    predict.add_argument("--property", nargs="+", metavar="NAME", help="default: all that the models predict")
    predict.add_argument("--format", choices=("table", "jsonl", "csv", "parquet"),
                         help="default: by the suffix of --output, else a table")
    predict.add_argument("--list", action="store_true", help="say what the models predict, how well, and stop")
    predict.set_defaults(run=_cmd_predict)
    embed.set_defaults(run=_cmd_embed)

    bundle = commands.add_parser("bundle", help="collect fine-tuned models into one folder in half the size")
    bundle.add_argument("--models", type=Path, metavar="DIR", help="checkpoints/<profile>, or another bundle")
    bundle.add_argument("--out", type=Path, required=True, metavar="DIR")
    bundle.add_argument("--property", nargs="+", metavar="NAME", help="default: all")
    bundle.add_argument("--members", type=int, metavar="N",
                        help="of each property the first N models below --models (default: all)")
    bundle.add_argument("--note", help="a sentence for the model card: on what the models were trained")
    bundle.set_defaults(run=_cmd_bundle)

    board = commands.add_parser("leaderboard", help="write a submission from the kept predictions")
    board.add_argument("which", choices=("matbench", "discovery"))
    board.add_argument("--profile", default="demo")
    board.add_argument("--out", type=Path, required=True, metavar="DIR")
    board.add_argument("--model", default="CLOUD", help="which model of results/<profile> (default: %(default)s)")
    board.add_argument("--partial", action="store_true", help="also write what the leaderboard would refuse")
    board.set_defaults(run=_cmd_leaderboard)

    hub = commands.add_parser("hub", help="Hugging Face: push a folder, or convert the published weights")
    hub.add_argument("action", choices=("push", "convert"))
    hub.add_argument("source", help="push: a bundle or model folder; convert: a folder or OWNER/NAME[/SUBFOLDER]")
    hub.add_argument("target", help="push: OWNER/NAME; convert: a new model folder")
    hub.add_argument("--public", action="store_true", help="push: anyone may read it (default: private)")
    hub.set_defaults(run=_cmd_hub)


def _add_curation(commands: argparse._SubParsersAction) -> None:
    harvest = commands.add_parser("harvest", help="fetch all structures of OPTIMADE databases; resumable")
    harvest.add_argument("databases", nargs="*", metavar="PROVIDER|NAME=URL",
                         help="default: the 14 providers of the paper")
    harvest.add_argument("--out", type=Path, help="default: optimade/ in the raw data folder")
    harvest.add_argument("--page-limit", type=int, default=500, help="structures per page (default: %(default)s)")
    harvest.add_argument("--parallel", type=int, default=8, help="databases at once (default: %(default)s)")
    harvest.add_argument("--interval", type=float, default=0.5, metavar="S",
                         help="seconds between two requests to one host (default: %(default)s)")
    harvest.add_argument("--filter", default="", help="OPTIMADE filter, such as 'nsites<=100'")
    harvest.add_argument("--offline-list", action="store_true", help="do not ask the official list of providers")
    harvest.set_defaults(run=_cmd_harvest)

    curate = commands.add_parser("curate", help="turn crystals into a de-duplicated corpus of symmetry strings")
    curate.add_argument("paths", type=Path, nargs="*", metavar="FILE_OR_FOLDER",
                        help="harvest folders, OPTIMADE JSON Lines, CIF, ... (default: the raw data folder)")
    curate.add_argument("--out", type=Path, required=True, help="folder for corpus.parquet and its companions")
    curate.add_argument("--symprec", type=float, default=0.01, help="tolerance in angstrom (default: %(default)s)")
    curate.add_argument("--engine", choices=("auto", "spglib", "moyopy"), default="auto")
    curate.add_argument("--workers", type=int, default=2, help="processes, or tasks of a cluster kept busy")
    curate.add_argument("--partition-size", type=int, default=5000, help="crystals per task (default: %(default)s)")
    curate.add_argument("--memory", default="2GB", help="limit of the de-duplication (default: %(default)s)")
    curate.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler, or 'local' (extra 'cluster')")
    curate.set_defaults(run=_cmd_curate)

    generate = commands.add_parser("generate", help="new charge-balanced strings by substitution into prototypes")
    generate.add_argument("corpus", type=Path, metavar="CORPUS.parquet", help="made by curate")
    generate.add_argument("--out", type=Path, required=True, help="Parquet file of the new strings")
    generate.add_argument("--number", type=int, default=10_000_000, help="strings to write (default: %(default)s)")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_cmd_generate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 if some crystals failed, or 2 after a user's mistake."""
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
    except USER_ERRORS as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status or 0
