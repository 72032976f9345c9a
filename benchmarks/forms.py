"""The toy run by form of its data, videos, memory, packed: probes, retrieval, time; JPEG's effect.

    python benchmarks/forms.py --out DIR [--seeds 0 1 2] [--forms mp4 packed …] [--json FILE] [key=value …]
    python benchmarks/forms.py --out DIR --quality [--json FILE]

Each seed makes one toy world, packed at its own resolution. For each form, in turn, train.py, the linear
probes and the retrieval run as a user starts them. Results already in DIR are not measured again.

    mp4               decoded anew for every sample
    in memory         decoded once a process: data.in_memory, which configs/toy.yaml has
    packed            data.name=packed
    by shards         the same with data.shuffle=shards; the training videos lie in some ten shards
    2, 4 an opening   data.clips_per_open=2 and 4, read from memory, which changes no bit; for the times see
                      benchmarks/loader.py

--quality: the network that was trained on mp4 files sees the test videos packed with several qualities: the
cosine between a video's features and those from its mp4.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from avid import cli, config

FORMS = {
    "mp4": ["data.in_memory=false"],
    "in memory": ["data.in_memory=true"],
    "packed": ["data.name=packed"],
    "by shards": ["data.name=packed", "data.shuffle=shards"],
    "2 an opening": ["data.in_memory=true", "data.clips_per_open=2"],
    "4 an opening": ["data.in_memory=true", "data.clips_per_open=4"],
}
QUALITIES = (60, 75, 85, 90, 95, 100)


def command_line():
    parser = cli.CommandLine(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of worlds and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS], help="default: all")
    parser.add_argument(
        "--quality", action="store_true", help="features by quality instead, of the first seed"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import json
import resource
import subprocess
import time

import numpy as np
import report

from avid import data, datasets, evaluation, toy
from avid.tools import pack

SCORES = {  # name of the column: (file of the evaluation, its number)
    "video probe": ("linear-video", "top1"),
    "audio probe": ("linear-audio", "top1"),
    "v→a class R@1": ("retrieval-cross", "v→a class R@1"),
    "a→v class R@1": ("retrieval-cross", "a→v class R@1"),
}


def world(out, seed, overrides):
    """The toy's files and the same packed: {data set: folder}."""
    cfg = config.load("toy", [*overrides, f"seed={seed}"])
    files = toy.write(out, cfg.toy, seed, 1)
    return {"toy": files, "packed": packed(files, out / f"packed-{seed}", cfg)}


def packed(files, dst, cfg, quality=90):
    small = pack.Small(cfg.toy.fps, False, cfg.toy.size, quality, cfg.toy.rate_hz, shard_gb=0.03)
    pack.pack(config.Data(name="toy", root=str(files)), dst, small, workers=1)
    return dst


def measured(form, seed, out, roots, overrides):
    """A run with its evaluations: wall and processor time of the training, waiting, scores."""
    folder = out / f"{form.replace(' ', '-').replace(',', '')}-{seed}"
    done = folder / "measured.json"
    if done.exists():
        return json.loads(done.read_text())
    root = roots["packed"] if "data.name=packed" in FORMS[form] else out
    settings = [f"out={folder}", f"seed={seed}", f"data.root={root}", *FORMS[form], *overrides]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "train.py"), "--cfg", "toy", *settings], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {"s": time.perf_counter() - begun}
    row["processor s"] = sum(getattr(after, x) - getattr(before, x) for x in ("ru_utime", "ru_stime"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "clips_per_s" in line]
    steps = np.diff([line["step"] for line in lines], prepend=0)
    elapsed_s = steps / np.array([line["clips_per_s"] for line in lines])  # times the clips of a step
    waited = np.sum(elapsed_s * [line["data_wait"] for line in lines])
    row["waited for data, s"] = float(waited * config.load("toy", overrides).optim.batch_size)
    for script in (["eval_linear.py"], ["eval_retrieval.py", "--task", "cross"]):
        command = [sys.executable, str(ROOT / script[0]), "--ckpt", str(folder / "last.pt"), *script[1:]]
        subprocess.run(command, check=True)
    for name, (file, score) in SCORES.items():
        (path,) = folder.glob(f"{file}-*.json")
        found = json.loads(path.read_text())
        row[name] = found[score] if score in found else found[score.replace("R@1", "1")]
    done.write_text(json.dumps(row))
    return row


def runs(arguments):
    found = {form: [] for form in arguments.forms}
    for seed in arguments.seeds:
        roots = world(arguments.out, seed, arguments.overrides)
        for form in arguments.forms:
            found[form].append(measured(form, seed, arguments.out, roots, arguments.overrides))
            print(form, seed, found[form][-1], flush=True)
    rows = []
    for form, seeds in found.items():
        row = {"form": form, "seeds": len(seeds)}
        for name in seeds[0]:
            values = np.array([one[name] for one in seeds])
            row[name] = f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else values[0]
        rows.append(row)
    report.show("The toy run by form of its data", rows, arguments.json, found=found)


def qualities(arguments):
    seed = arguments.seeds[0]
    files = world(arguments.out, seed, arguments.overrides)["toy"]
    checkpoint = arguments.out / f"mp4-{seed}" / "last.pt"
    subject = evaluation.subject(cli.evaluation_parser("").parse_args(["--ckpt", str(checkpoint)]))
    cfg = subject.cfg
    table = datasets.load(config.Data(name="toy", root=str(files)), "test")

    def features(table):
        return evaluation.extract(subject.network, data.Clips(table, cfg, training=False), subject.device)

    whole = features(table)
    rows = []
    for quality in QUALITIES:
        folder = packed(files, arguments.out / f"packed-{seed}-quality-{quality}", cfg, quality)
        found = datasets.load(config.Data(name="packed", root=str(folder)), "test")
        other = features(found)
        row = {"quality": quality, "kB a frame": kb_a_frame(folder)}
        for modality in data.MODALITIES:
            one, same = (x.video_level("features", modality) for x in (whole, other))
            cosine = (one * same).sum(1)
            row[f"{modality}: cosine"], row[f"{modality}: least"] = float(cosine.mean()), float(cosine.min())
        one = whole.video_level("features", "video")
        row["between two videos"] = float((one @ one.T)[~np.eye(len(one), dtype=bool)].mean())
        rows.append(row)
    for row in rows:
        for name in row:
            row[name] = f"{row[name]:.5f}" if "cosine" in name or "least" in name else row[name]
    report.show("Features from packed data against those from mp4", rows, arguments.json)


def kb_a_frame(folder):
    """Mean bytes of a stored frame."""
    found = datasets.load(config.Data(name="packed", root=str(folder)), "test")
    from avid.packed import PackedMedia

    tables = [PackedMedia(folder, record).table["bytes"] for record in found.record[:50]]
    return float(np.concatenate(tables).mean() / 1e3)


if __name__ == "__main__":
    qualities(arguments) if arguments.quality else runs(arguments)
