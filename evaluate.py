"""Uses a trained network: encode images, search codes, query with a new scan or on a page, convert banks, report, ...

    python evaluate.py encode --workdir=RUN --data=DATA --split=reference --out=BANK
    python evaluate.py search --bank=BANK --queries=BANK2 --by=both --k=10 --out=hits.csv
    python evaluate.py query  --workdir=RUN --bank=BANK --image=SCAN.nii.gz --slice=80 --out=DIR
    python evaluate.py query  --workdir=RUN --bank=BANK --sketch=LESION.png --by=abnormal --out=DIR
    python evaluate.py serve  --workdir=RUN --bank=BANK
    python evaluate.py convert --bank=BANK --to=parquet --out=FILE
    python evaluate.py report --workdir=RUN --data=DATA --out=REPORT
    python evaluate.py export --workdir=RUN --data=DATA --report=REPORT --out=MODEL
    python evaluate.py adapt  --workdir=MODEL --data=DATA --out=MODEL2
    python evaluate.py compare --runs RUN1 RUN2 RUN3 --data=DATA --out=DIR

RUN may be an exported MODEL everywhere. SIGTERM stops any command with exit code 143; what it had half written is
removed. Several processes: docs/pods.md.
"""

import argparse
import hashlib
import math
from pathlib import Path

import jax

from decomp_jax import processes
from decomp_jax.data.schema import SPLITS
from decomp_jax.errors import UserError, run_program, unwind_on_signals
from decomp_jax.files import require_absent

BY = ("normal", "abnormal", "both")
# Flag -> the file that names the content of its folder, by digests.
CONTENTS = {"data": "manifest.json", "bank": "bank.json", "queries": "bank.json", "pairs": ""}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_encode, _add_search, _add_query, _add_serve, _add_convert, _add_report, _add_compare, _add_export,
                _add_adapt):
        command = add(commands)
        command.add_argument("--verify", action="store_true",
                             help="read all of --data, --bank and --queries first, and compare all checksums; without "
                                  "it those of rows and of what is read")
        processes.add_flags(command)
    return parser.parse_args()


def _add_encode(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    command = commands.add_parser("encode", help="write the codes of a split to a bank")
    command.add_argument("--workdir", type=Path, required=True, help="the run: its newest checkpoint is used")
    command.add_argument("--data", type=Path, required=True, help="a data set written by data_prep")
    command.add_argument("--split", required=True, choices=SPLITS)
    command.add_argument("--out", type=Path, required=True, help="the bank's directory, to be made")
    _add_slab(command)
    return command


def _add_search(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    command = commands.add_parser("search", help="search the codes of one bank in another")
    command.add_argument("--bank", type=Path, required=True, help="the images searched")
    command.add_argument("--queries", type=Path, required=True, help="bank of the images asked with")
    command.add_argument("--by", required=True, choices=BY)
    command.add_argument("--k", type=_positive, default=10, help="hits a query (default: %(default)s)")
    command.add_argument("--out", type=Path, required=True, help="CSV to write")
    command.add_argument("--pairs", type=Path,
                         help="CSV normal_row,abnormal_row: anatomy of one query row, lesion of another")
    command.add_argument("--exclude_same_patient", action="store_true", help="never return the query's own patient")
    command.add_argument("--one_per_patient", action="store_true", help="at most one hit a patient")
    command.add_argument("--relative", action="store_true",
                         help="distances relative to the lengths of both codes: 0 is the same, 1 nothing alike "
                              "(default: squared L2)")
    command.add_argument("--level", choices=("slice", "patient"), default="slice",
                         help="search for slices, or for the patients nearest to each patient (default: %(default)s)")
    _add_within(command)
    return command


def _add_query(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    command = commands.add_parser("query", help="search with a scan, a drawn lesion, examples, or a whole patient")
    command.add_argument("--workdir", type=Path, required=True, help="the run whose network made the bank")
    command.add_argument("--bank", type=Path, required=True, help="the images searched")
    command.add_argument("--image", type=Path,
                         help="NIfTI scan or folder of a DICOM series, with --slice, or picture (PNG, JPEG, DICOM)")
    command.add_argument("--slice", type=int, dest="slice_index",
                         help="slice of the scan, and of drawings that are volumes, from the feet up (coronal: from "
                              "the back, sagittal: from the left)")
    command.add_argument("--mask", type=Path, help="mask of the brain, if the scan is of a whole head")
    command.add_argument("--lesion_from", type=Path,
                         help="scan or picture whose lesion is searched with the anatomy of --image")
    command.add_argument("--lesion_slice", type=int, help="slice of --lesion_from")
    command.add_argument("--lesion_mask", type=Path, help="mask of the brain of --lesion_from")
    command.add_argument("--sketch", type=Path, metavar="FILE",
                         help="label map of a lesion, searched in place of the image's (PNG, .npy, NIfTI); of the size "
                              "of the image's slices it lies on these, of any other it fills the field")
    command.add_argument("--region", type=Path, metavar="FILE",
                         help="mask of the part of the image that counts, likewise")
    command.add_argument("--by", choices=BY, default="both", help="default: %(default)s")
    command.add_argument("--weight", type=float, metavar="W",
                         help="share of the lesion in a search by both, 0 to 1 (default: 0.5)")
    command.add_argument("--like", type=_rows, default=(), metavar="ROWS",
                         help="rows of the bank that hits should be like, as 3,17; their patients are left out")
    command.add_argument("--unlike", type=_rows, default=(), metavar="ROWS", help="rows that they should not be like")
    command.add_argument("--codes", action="store_true",
                         help="compare codes with codes by squared L2, as the paper does (default: what is asked is "
                              "not quantised, and distances are relative: 0 is the same, 1 nothing alike)")
    command.add_argument("--one_per_patient", action="store_true", help="at most one slice a patient")
    command.add_argument("--level", choices=("slice", "patient"), default="slice",
                         help="rank slices, or patients by all slices of the scan (default: %(default)s)")
    _add_within(command)
    command.add_argument("--k", type=_positive, default=5, help="hits (default: %(default)s)")
    command.add_argument("--out", type=Path, required=True, help="folder for hits.csv and sheet.png")
    return command


def _add_serve(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    command = commands.add_parser("serve", help="a page in the browser in which to ask; for this machine alone")
    command.add_argument("--workdir", type=Path, required=True, help="the run whose network made the bank")
    command.add_argument("--bank", type=Path, required=True, help="the archive")
    command.add_argument("--data", type=Path, help="the data set that the bank encodes (default: where it was then)")
    command.add_argument("--port", type=int, default=0, help="default: one that is free")
    return command


def _add_within(command: argparse.ArgumentParser) -> None:
    command.add_argument("--within_mm", type=float, metavar="D",
                         help="for patients: how far apart in height matched slices may be (default: 5 by anatomy, 10 "
                              "by lesion)")


def _add_convert(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    command = commands.add_parser("convert", help="write a bank as one file that other programs search")
    command.add_argument("--bank", type=Path, required=True)
    command.add_argument("--to", required=True, choices=("parquet", "faiss"))
    command.add_argument("--by", choices=BY, default="both", help="the codes written (default: %(default)s)")
    command.add_argument("--out", type=Path, required=True, help="file to write")
    return command


def _add_report(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    command = commands.add_parser("report", help="measure retrieval and write a page of it")
    command.add_argument("--workdir", type=Path, required=True, help="the run: its newest checkpoint is used")
    command.add_argument("--data", type=Path, required=True, help="a data set with query and reference images")
    command.add_argument("--out", type=Path, required=True,
                         help="folder for index.html, metrics.json, metrics.csv, figures/")
    command.add_argument("--reference", choices=("reference", "train", "others"), default="reference",
                         help="the split searched; others: every patient of all splits asks among all others")
    command.add_argument("--features", type=_named_file, action="append", default=[], metavar="NAME=FILE.npy",
                         help="vectors of the slices to rank by as well (docs/evaluation.md); may be given again")
    _add_slab(command)
    return command


def _add_slab(command: argparse.ArgumentParser) -> None:
    command.add_argument("--slab_mm", type=_millimetres, metavar="MM",
                         help="abnormal codes are of the slab around a slice, a Gaussian of this deviation along the "
                              "scan (default: an eighth of a code cell's side); 0 takes each slice by itself")


def _add_compare(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    command = commands.add_parser("compare", help="one table of several runs, on validation patients")
    command.add_argument("--runs", type=Path, required=True, nargs="+", metavar="RUN",
                         help="the others are compared with the first")
    command.add_argument("--data", type=Path, required=True, help="a data set with validation images")
    command.add_argument("--out", type=Path, required=True,
                         help="folder for comparison.md, comparison.csv, comparison.png")
    return command


def _add_export(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    command = commands.add_parser("export", help="write the network, without its optimiser, and a model card")
    command.add_argument("--workdir", type=Path, required=True, help="the run: its newest checkpoint is used")
    command.add_argument("--data", type=Path, required=True, help="the data set it was trained on")
    command.add_argument("--report", type=Path, required=True, action="append", dest="reports",
                         help="a report of it, whose numbers the model card takes; may be repeated. Of the first one "
                              "it takes the pictures of failures, too")
    command.add_argument("--out", type=Path, required=True,
                         help="directory to be made; stands for a run wherever one is read")
    return command


def _add_adapt(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    command = commands.add_parser("adapt", help="make a network ready for images of another origin, without labels")
    command.add_argument("--workdir", type=Path, required=True, help="a run or an exported network")
    command.add_argument("--data", type=Path, required=True, help="a data set of the images to come; no label is read")
    command.add_argument("--split", choices=SPLITS, action="append", dest="splits",
                         help="take images of this split alone; may be repeated (default: all)")
    command.add_argument("--images", type=_positive, default=2048, help="about so many (default: %(default)s)")
    command.add_argument("--out", type=Path, required=True,
                         help="directory to be made; stands for a run wherever one is read")
    return command


def _named_file(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not name or not file.endswith(".npy"):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE.npy")
    return name, Path(file)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _millimetres(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is no distance, 0 or more")
    return value


def _rows(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(row) for row in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no rows, such as 3,17") from None


def require_same_command(command: str, args: dict[str, object]) -> None:
    """Raises UserError if the processes were not given the same flags, data and banks, or if a bank to be made exists.

    Paths may differ between processes; what they hold may not. Networks are compared when they are read.
    """
    with processes.agreed():
        if command == "encode":
            require_absent(args["out"])
        values = {f"--{name}": value for name, value in args.items() if not isinstance(value, (Path, list))}
        for name, file in CONTENTS.items():
            if args.get(name) is not None:
                values[f"the content of --{name}"] = _digest(args[name] / file)
        for name, file in args.get("features", ()):
            values[f"the content of --features {name}"] = _digest(file)
    processes.require_equal({"the command": command, **values})


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: not found or can't be read ({error.strerror}); name a folder that has it") from error


def _verify(args: dict[str, object]) -> None:
    """Raises UserError if a file of the data set or the banks is not what was written."""
    from decomp_jax.data import records
    from decomp_jax.retrieval import CodeBank

    if args.get("data") is not None:
        records.verify(args["data"])
    for name in ("bank", "queries"):
        if args.get(name) is not None:
            CodeBank.load(args[name], verify=True)


def main() -> None:
    flags = parse_args()
    processes.join(flags)
    unwind_on_signals()  # again: among several processes JAX has taken SIGTERM, for training's sake
    args = {name: value for name, value in vars(flags).items() if name not in processes.FLAGS}
    command = args.pop("command")
    if jax.process_count() > 1:
        require_same_command(command, args)
    if args.pop("verify"):
        with processes.agreed():
            _verify(args)
    if command == "encode":
        from decomp_jax.inference.encode import encode_split

        encode_split(**args)
    elif command == "search":
        from decomp_jax.inference.search import search_banks

        search_banks(args.pop("bank"), args.pop("queries"), **args)
    elif command == "query":
        from decomp_jax.inference.query import run_query

        run_query(**args)
    elif command == "serve":
        from decomp_jax.room.serve import serve

        serve(**args)
    elif command == "convert":
        from decomp_jax.retrieval.convert import convert

        convert(**args)
    elif command == "report":
        from decomp_jax.evaluation.report import write_report

        write_report(**args)
    elif command == "compare":
        from decomp_jax.evaluation.compare import compare_runs

        compare_runs(**args)
    elif command == "export":
        from decomp_jax.inference.export import export_run

        export_run(**args)
    elif command == "adapt":
        from decomp_jax.inference.adapt import adapt

        adapt(**args)
    processes.gather("")  # until process 0 has written all


if __name__ == "__main__":
    run_program(main)
