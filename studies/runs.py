"""Runs a study: each run once, several in parallel; a CSV with one row per run; tables and figures from it.

In: a Study, which defines its runs, their settings and their measures; for a study on real clips, the folder
of the clips (--videos).
Out: studies/results/<study>.csv; each table as studies/results/<table>.md and between its marks in README.md
and docs/results.md; figures in docs/images. A run that has a row in the CSV is not repeated. Tables and
curves are made from the CSV alone.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import importlib
import io
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from avid import config, files, processes, progress, toy

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
QUICK = (  # --quick: every step of the code, on tiny runs that learn nothing
    "toy.train=24 toy.test=20 toy.seconds=4 toy.size=40 video.size=32 video.frames=4 audio.mels=32 "
    "model.width=4 model.embedding=16 bank.num_negatives=16 contrast.negatives=8 contrast.k_pos=4 "
    "optim.batch_size=8 optim.epochs=2 loss.warmup_epochs=1 log.check_epochs=2 eval.clips=1 "
    "eval.calibration_batches=2"
).split()


class Run(NamedTuple):
    """One training and its measures."""

    group: dict  # columns that tables group by, e.g. {"method": "robust", "faulty": "0.3"}
    seed: int
    settings: tuple  # key=value: where it differs from its study's base
    cfg: str = ""  # the packaged configuration; empty: the study's


def toy_worlds(tasks, arguments):
    """Write the toy worlds of the runs, and the same worlds without faulty pairs (see measures.clean)."""
    worlds = {}
    for *_, cfg in tasks:
        for part in (cfg.toy, dataclasses.replace(cfg.toy, faulty=0.0)):
            worlds[tuple(vars(part).items()), cfg.seed] = part
    for (_, seed), part in worlds.items():
        toy.write(arguments.root, part, seed, arguments.jobs)


class Study(NamedTuple):
    name: str
    cfg: str  # the packaged configuration that all runs start from
    base: tuple  # key=value: the settings of all its runs
    plan: Callable  # seeds → list of Run
    measure: Callable  # Run, cfg → {column: number or list of numbers}; trains the network
    tables: Callable  # rows → {name: Markdown}
    figures: Callable  # rows, folder of images, folder of runs, arguments → paths of the figures
    prepare: Callable = toy_worlds  # tasks, arguments: writes the data of the runs, if it is missing
    root: Callable = lambda run, arguments: arguments.root  # data.root of a run
    world: str = str(toy.WORLD)  # the data and its version: part of a row's identity


def command_line(doc, argv=None, videos=""):
    """The options of a study. videos: for a study on real clips, the help text of --videos."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="runs in parallel, each on one core (default: 2)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only the runs of these methods or changes")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one tiny run per method, to test that everything works; needs --results",
    )
    parser.add_argument(
        "--root", default="data", metavar="DIR", help="where the toy worlds are written (default: data)"
    )
    if videos:
        parser.add_argument("--videos", metavar="DIR", help=videos)
    parser.add_argument(
        "--runs", default="runs", metavar="DIR", help="where checkpoints and logs go (default: runs)"
    )
    parser.add_argument(
        "--results", metavar="DIR", help="folder for the CSV, tables and figures (default: the repository's)"
    )
    parser.add_argument("--list", action="store_true", help="only list the runs that are left to do")
    parser.add_argument("--table", action="store_true", help="only the tables, from the CSV")
    parser.add_argument(
        "--figures",
        action="store_true",
        help="only the figures: curves from the CSV, images from the checkpoints",
    )
    arguments = parser.parse_args(argv)
    if arguments.quick and not arguments.results:
        parser.error(
            "--quick needs --results DIR: its numbers mean nothing and must not mix with the results"
        )
    return arguments


def main(study, arguments):
    """The command of a study.

    Exit code 2 for errors that the user can correct. If a run fails, the study stops; finished runs are kept.
    """
    results, images = folders(arguments)
    path = results / f"{study.name}.csv"
    folder = Path(arguments.runs) / f"studies{'-quick' * arguments.quick}" / study.name
    if not (arguments.table or arguments.figures):
        runs = study.plan(arguments.seeds[:1] if arguments.quick else arguments.seeds)
        names = dict.fromkeys(name for run in runs for name in run.group.values() if name)
        if unknown := set(arguments.only or ()) - set(names):
            config.stop(f"no {', '.join(sorted(unknown))} in this study; it has {', '.join(names)}")
        runs = [run for run in runs if not arguments.only or set(arguments.only) & set(run.group.values())]
        if arguments.quick:
            runs = list({run.group["method"]: run for run in runs}.values())
        perform(study, runs, path, folder, arguments)
        if arguments.list:
            return
    rows = read(path)
    if not rows:
        config.stop(f"{path} holds no runs yet; run the study without --table and --figures")
    all_steps = not (arguments.table or arguments.figures)
    if arguments.table or all_steps:
        for name, text in study.tables(rows).items():
            if text:
                publish(name, text, arguments)
    if arguments.figures or all_steps:
        for picture in study.figures(rows, images, folder, arguments):
            print(f"written: {picture}")


def folders(arguments):
    """The folders for results and for images: --results DIR, or those of the repository."""
    results = Path(arguments.results or ROOT / "studies" / "results")
    images = results / "images" if arguments.results else ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    return results, images


def publish(name, text, arguments):
    """Print a table and write it to <results>/<name>.md; without --results also into PAGES."""
    write(folders(arguments)[0] / f"{name}.md", text)
    for page in PAGES if not arguments.results else ():
        insert(page, name, text)
    print(f"\n{text}")


# --------------------------------------------------------------------------------------------------- the runs


def perform(study, runs, path, folder, arguments):
    """Do the runs that have no row in the CSV at `path`; a row is written as soon as its run is done."""
    done = {identity(row) for row in read(path)}
    tasks = []
    for run in runs:
        facts = describe(study, run, arguments.quick)
        if identity(facts) not in done:
            out = folder_of(study, run, folder, arguments.quick)
            cfg = configuration(study, run, arguments.quick, study.root(run, arguments), out)
            tasks.append((study.name, run, facts, cfg))
    print(f"{study.name}: {len(runs)} runs, {len(tasks)} to do, {arguments.jobs} side by side; {path}")
    if arguments.list:
        for _, _, facts, cfg in tasks:
            print(f"to do: {cfg.out}: {facts['settings']}")
        return
    study.prepare(tasks, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread per run: the same bits with any --jobs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with contextlib.closing(
            processes.outcomes(train_and_measure, tasks, arguments.jobs, limit_s=float("inf"))
        ) as outcomes:
            for (_, _, _, cfg), row in progress.bar(outcomes, study.name, len(tasks), unit="run"):
                if isinstance(row, processes.Crash):
                    config.stop(
                        f"{cfg.out}: {row.reason}; see its log.txt; the same command continues from here"
                    )
                add(path, row)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def train_and_measure(name, run, facts, cfg):
    """Train and measure a run in its own process and return its row. Its output goes to <out>/log.txt."""
    from avid import media  # heavy imports stay in here: tables do not need them

    study = importlib.import_module(f"studies.{name}").STUDY
    import torch

    torch.set_num_threads(1)
    if getattr(train_and_measure, "world", None) != (world := (cfg.seed, cfg.toy, cfg.data.root)):
        media.in_memory.cache_clear()
    train_and_measure.world = world
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    began, cpu = time.time(), time.process_time()
    with (
        open(out / "log.txt", "a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        measured = study.measure(run, cfg)
    return {
        **facts,
        **measured,
        "wall_s": round(time.time() - began),
        "cpu_s": round(time.process_time() - cpu),
    }


def folder_of(study, run, folder, quick):
    """The folder of a run's checkpoint. Its name contains a hash of the run's identity."""
    mark = hashlib.sha256("\t".join(identity(describe(study, run, quick))).encode()).hexdigest()[:8]
    words = [f"{value}{key * (key == 'faulty')}" for key, value in run.group.items() if value]
    return folder / "-".join([*words, f"seed{run.seed}", mark]).replace(" ", "")


def settings_of(study, run, quick):
    """key=value: the settings of a run on top of the packaged configuration; quick: of a tiny run."""
    if not quick:
        return [*study.base, *run.settings]
    return [*study.base, *QUICK, *(setting for setting in run.settings if "epochs=" not in setting)]


def configuration(study, run, quick, root, out):
    overrides = [*settings_of(study, run, quick), f"seed={run.seed}", f"data.root={root}", f"out={out}"]
    overrides += ["data.workers=0", "data.in_memory=true"]
    return config.load(run.cfg or study.cfg, overrides)


def describe(study, run, quick):
    """The columns that identify a run: group, seed, all settings that differ from the packaged configuration,
    and the world; then the versions."""
    settings = dict(override.split("=", 1) for override in settings_of(study, run, quick))
    versions = {"python": platform.python_version()} | {
        name: metadata.version(name) for name in ("torch", "numpy", "scikit-learn")
    }
    return {
        **{key: str(value) for key, value in run.group.items()},
        "seed": str(run.seed),
        "settings": " ".join(
            [f"--cfg {run.cfg or study.cfg}", *(f"{key}={value}" for key, value in sorted(settings.items()))]
        ),
        "world": study.world,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def identity(row):
    """The columns of `describe` without the versions: rows of the same run have the same identity."""
    keys = list(row)[: list(row).index("versions")]
    return tuple(str(row[key]) for key in keys)


# ---------------------------------------------------------------------------------------------------- the CSV


def read(path):
    """The rows of a CSV as dicts of strings; an empty list if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add(path, row):
    """Add a row to the CSV, or replace the row of the same group and seed. Rows are sorted; the file is
    replaced atomically."""
    row = {key: text_of(value) for key, value in row.items()}
    keys = list(row)[: list(row).index("settings")]  # group and seed
    rows = [other for other in read(path) if [other[key] for key in keys] != [row[key] for key in keys]] + [
        row
    ]
    rows.sort(key=lambda row: [row[key] for key in keys])
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    lines = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    write(path, text.getvalue())


def text_of(value):
    """The text of a cell: numbers with six significant digits, lists separated by spaces."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(text_of, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def numbers(row, column):
    """The list of numbers in a cell; empty if the cell is."""
    return [float(x) for x in row.get(column, "").split()]


def select(rows, **wanted):
    """The rows that have these values in these columns."""
    return [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]


def mean_std(rows, column):
    """Mean and sample deviation over rows (seeds). The deviation of one row is None; without any number the
    result is None."""
    values = [float(row[column]) for row in rows if row.get(column)]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


# ------------------------------------------------------------------------------------------------- the tables


def table(head, lines):
    """A Markdown table from the column heads and lines of cells, empty without lines. A cell is a string, or
    (rows, column), which becomes mean ± deviation."""
    if not lines:
        return ""

    def cell(value):
        if isinstance(value, str):
            return value
        found = mean_std(*value)
        if found is None:
            return ""
        digits = 3 if value[1] in ("AUROC", "cosine") else 1
        mean, std = found
        return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")

    body = [[cell(value) for value in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]) + "\n"


def write(path, text):
    with files.replacing(path) as file:
        file.write(text)


def insert(page, name, text):
    """Replace the text between <!-- name --> and <!-- /name --> in a page. A page without these marks is left
    unchanged."""
    if not page.exists():
        return
    before = page.read_text(encoding="utf-8")
    after = re.sub(
        rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)",
        lambda found: f"{found[1]}{text}{found[2]}",
        before,
        flags=re.DOTALL,
    )
    if after != before:
        write(page, after)
