"""Choices in which AVID and AVID+CMA differ from xID, on the toy world: sampling of batches, audio front end,
positives by agreement.

    python -m studies.sources               the runs that studies/results/sources.csv lacks, then tables
    python -m studies.sources --only draws      one question: draws, frontend or agreement
    python -m studies.sources --table           tables from the CSV

draws: shuffled passes (epoch), passes over ten copies of each video (copies, AVID's), drawn with replacement
(iid), each with and without batch norm in the heads; plain xID, 24 epochs. frontend: log-mel with one mean
and deviation or with those of each band, linear bins, AVID's spectrogram; drawn with replacement, with batch
norm. agreement: with each sample's own negatives, agreement (cma), AVID (noise contrastive estimation) and
AVID+CMA; 24 epochs without and with 30 % of faulty pairs, and 48 epochs with 30 %. Agreement starts after
half of the epochs. The tables compare them with the xID and Robust-xID runs of studies.robust. The front ends
are tested on real sounds by python -m studies.real --esc10 DIR.
"""

from . import runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__)

import dataclasses
from pathlib import Path

import train
from avid import config
from avid.tools import statistics

from . import figures, measures, robust

DRAWS, NORMS = ("epoch", "copies", "iid"), ("none", "batch")
BANDS = "of each band"  # front ends that are normalised by the statistics of each band
FRONTENDS = {
    "log-mel": (),  # with one mean and deviation, as in all else
    f"log-mel, {BANDS}": (),
    "linear bins": ("audio.mels=0",),
    f"AVID's, {BANDS}": ("audio.frontend=avid",),
}
OWN = ("bank.candidates=own",)
NCE = (*OWN, "loss.form=nce")
CMA = ("agreement.every_epochs=4",)
METHODS = {
    "cma": (*OWN, *CMA, "weights.cma=1"),
    "avid": (*NCE, "weights.xid=0.5"),
    "avid-cma": (*NCE, *CMA, "weights.xid=0.25", "weights.cma=0.25"),
}
WORLDS = (  # share of faulty pairs, what is changed, settings
    ("0", "", ()),
    ("0.3", "", ("toy.faulty=0.3",)),
    ("0.3", robust.LONG, robust.LONGER),
)
KIND = "positives of the same kind"
MEASURES = {  # of the tables: column of the CSV, head
    **{column: head for column, head in robust.MEASURES.items() if column != "AUROC"},
    "cosine": "mean cosine within the banks",
}


def plan(seeds):
    made = []
    for seed in seeds:
        for how in DRAWS:
            for norm in NORMS:
                if (how, norm) != ("iid", "batch"):  # that is log-mel below
                    settings = (f"optim.draws={how}", f"model.head_norm={norm}")
                    made.append(runs.Run(group("draws", f"{how}, {norm}"), seed, settings))
        made += [runs.Run(group("frontend", name), seed, settings) for name, settings in FRONTENDS.items()]
    for faulty, change, world in WORLDS:
        for seed in seeds:
            for name, settings in METHODS.items():
                made.append(runs.Run(group("agreement", name, faulty, change), seed, (*world, *settings)))
    return made


def group(question, method, faulty="0", change=""):
    return {"question": question, "method": method, "faulty": faulty, "change": change}


def measure(run, cfg):
    """Train and measure."""
    table, _ = measures.tables(cfg)
    if BANDS in run.group["method"]:
        path = Path(cfg.out) / "statistics.npz"
        if not path.exists():
            statistics.measure(table, cfg, path)
        audio = dataclasses.replace(cfg.audio, statistics=config.statistics_text(str(path)))
        cfg = dataclasses.replace(cfg, audio=audio)
    train.main(cfg)
    network, saved = measures.trained(cfg)
    bank = measures.bank_of(saved, cfg)
    health = bank.health()
    result = measures.feature_quality(network, cfg) | measures.weight_statistics(bank, table, cfg.loss)
    result["cosine"] = (health["cosine_video"] + health["cosine_audio"]) / 2
    if "ancestor" in saved and "positives" in saved["ancestor"]:
        result[KIND] = same_kind(saved["ancestor"]["positives"].long().numpy(), table)
    return result | measures.curve(cfg, robust.CURVES)


def same_kind(positives, table):
    """Percent of the positives, N×k, whose picture and sound are both of the same kind as the instance's."""
    seen, heard = measures.kinds(table)  # N
    return 100 * float(((seen[positives] == seen[:, None]) & (heard[positives] == heard[:, None])).mean())


def tables(rows):
    earlier, text = runs.read(runs.ROOT / "studies" / "results" / "robust.csv"), {}

    def compare(name, head, lines, columns=MEASURES):
        cells = [
            [method, *((selected, c) for c in columns), str(len(selected))]
            for method, selected in lines.items()
            if selected
        ]
        text[name] = runs.table([head, *columns.values(), "runs"], cells)

    def of_robust(method, faulty, change=""):
        """Rows of studies.robust with the seeds of this study."""
        seeds = {row["seed"] for row in rows}
        found = runs.select(earlier, method=method, faulty=faulty, change=change)
        return [row for row in found if row["seed"] in seeds]

    frontends = {name: runs.select(rows, question="frontend", method=name) for name in FRONTENDS}
    compare("sources-draws", "draws, norm of the heads", by_draws(rows))
    compare("sources-frontend", "what the network hears", frontends)
    for faulty, change, _ in WORLDS:
        columns = dict(robust.MEASURES) | {KIND: KIND}
        if faulty == "0":
            del columns["AUROC"]
        lines = {m: of_robust(m, faulty, change) for m in ("xid", "robust")}
        lines |= {
            m: runs.select(rows, question="agreement", method=m, faulty=faulty, change=change)
            for m in METHODS
        }
        length = change or "24 epochs"
        compare(
            f"sources-agreement-{faulty}{'-long' * bool(change)}",
            f"{float(faulty):.0%} faulty, {length}",
            lines,
            columns,
        )
    return text


def by_draws(rows):
    """{draws and norm of the heads: its rows}; iid with batch norm are the frontend's runs of log-mel."""
    names = [f"{how}, {norm}" for how in DRAWS for norm in NORMS]
    found = {name: runs.select(rows, question="draws", method=name) for name in names}
    return found | {"iid, batch": runs.select(rows, question="frontend", method="log-mel")}


def draw(rows, images, folder, arguments):
    shown = {c: f"{head}, %" for c, head in robust.MEASURES.items() if "probe" in c or "class" in c}
    groups = by_draws(rows)
    named = [row | {"method": name} for name, selected in groups.items() for row in selected]
    yield figures.bars(images / "sources.png", named, list(groups), shown)


STUDY = runs.Study("sources", "toy", tuple(robust.BASE), plan, measure, tables, draw)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
