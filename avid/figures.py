"""The pictures: training curves, what retrieval found, how weights tell faulty pairs from true ones.

In: a run's metrics.jsonl, tables of files, or arrays. Out: PNG files.

    python -m avid.figures weights runs/faulty            the weights of faulty pairs and of true ones, and their AUROC
    python -m avid.figures tasks --cfg toy_temporal       clips as the temporal tasks take them, with their labels
"""

import argparse

from . import config


def command_line(argv=None):
    """The arguments, of which cfg is the configuration itself. Ends the program where they cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m avid.figures", description=__doc__, formatter_class=config.Help)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("weights", help="weights of faulty and of true pairs")
    command.add_argument("run", help="folder of a run with toy.faulty above 0")
    command = commands.add_parser("tasks", help="clips of the temporal tasks")
    command.add_argument("--cfg", default="toy_temporal", help="configuration (default: toy_temporal)")
    command.add_argument("--out", default="tasks.png", help="picture to write (default: tasks.png)")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    arguments = parser.parse_args(argv)
    if arguments.command == "tasks":
        try:
            arguments.cfg = config.load(arguments.cfg, arguments.overrides)
            if arguments.cfg.temporal.moments != 2:
                raise config.ConfigError("the order of two clips can only be shown with temporal.moments=2")
        except config.ConfigError as error:
            config.stop(error)
    return arguments


if __name__ == "__main__":  # before the heavy imports: --help and a wrong argument answer at once
    arguments = command_line()

import dataclasses
import json
import os
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.metrics import roc_auc_score

from . import checkpoint, data, datasets, evaluation, losses, memory_bank, preflight, temporal_tasks, toy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {  # title: how the names of its quantities are known
    "held-out temporal tasks, %": lambda name: name.startswith("held-out"),
    "temporal tasks, %": lambda name: name.endswith("%"),
    "held-out retrieval, %": lambda name: "→" in name,
    "bank": lambda name: name.startswith(("cosine", "agreement")),
    "gradient's norm": lambda name: name == "grad_norm",
    "learning rate": lambda name: name == "lr",
    "clips/s": lambda name: name == "clips_per_s",
    "loss": lambda name: True,
}
UNSEEN = ("step", "epoch", "data_wait", "bad_files", "not_finite", "files")


def check_picture(path):
    """Raise ConfigError where something else than a picture of this program stands at `path`, or it cannot be written."""
    path = Path(path)
    preflight.check_folder(path.parent)
    if path.exists() and not (path.is_file() and b"Software\0avid" in path.read_bytes()[:4096]):
        raise config.ConfigError(f"{path} is no picture of avid's; move it away, or write elsewhere")


def write(figure, path, dpi=110):
    """Write a figure as a PNG that `check_picture` knows, whole or not at all."""
    part = f"{path}.part"
    figure.savefig(part, dpi=dpi, format="png", metadata={"Software": "avid"})
    plt.close(figure)
    os.replace(part, path)


def curves(metrics, path):
    """One panel a subject over epochs: losses, tasks, held-out retrieval, the bank's health, learning rate, speed."""
    series = {}
    for line in map(json.loads, Path(metrics).read_text(encoding="utf-8").splitlines()):
        for name in line.keys() - UNSEEN:
            series.setdefault(name, []).append((line["epoch"], line[name]))
    panels = {}
    for name in sorted(series):
        panels.setdefault(next(title for title, holds in PANELS.items() if holds(name)), []).append(name)
    panels = {title: panels[title] for title in reversed(PANELS) if title in panels}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            axis.plot(*zip(*series[name], strict=True), label=name, linewidth=1.2)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    write(figure, path)


def confusions(counts, speeds, path):
    """What a network takes for what: {task: C×C counts}, a panel a task, rows: the truth."""
    names = {"speed": [f"{s}×" for s in speeds], "direction": ["forward", "backward"], "order": temporal_tasks.ORDERS}
    figure, axes = plt.subplots(1, len(counts), figsize=(2.6 * len(counts), 2.9), squeeze=False, layout="constrained")
    for axis, (task, n) in zip(axes[0], counts.items(), strict=True):
        share = n / n.sum(1, keepdims=True).clip(1)
        axis.imshow(share, vmin=0, vmax=1, cmap="Blues")
        for (row, column), value in np.ndenumerate(share):
            axis.text(
                column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "black"
            )
        ticks = names[task.partition("_")[0]]
        axis.set_xticks(range(len(n)), ticks, rotation=30, fontsize=8)
        axis.set_yticks(range(len(n)), ticks, fontsize=8)
        axis.set_title(f"{task}: {n.trace() / max(n.sum(), 1):.0%}", fontsize=10)
    axes[0, 0].set_ylabel("truth")
    axes[0, 0].set_xlabel("answer")
    write(figure, path)


def contact_sheet(path, queries, finds, query_modality, found_modality, cfg):
    """One row a query, then what it found, best first: pictures or spectrograms, framed green where the class is the query's.

    queries: datasets.Table of q videos; finds: q tables of the videos that each found.
    """
    columns = 1 + max(map(len, finds))
    figure, axes = plt.subplots(len(queries), columns, figsize=(1.4 * columns, 1.6 * len(queries)), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, found in enumerate(finds):
        tell(axes[row, 0], queries, row, query_modality, cfg, "black")
        for column in range(len(found)):
            right = evaluation.same_class(queries.labels, found.labels)(row, column)
            tell(axes[row, 1 + column], found, column, found_modality, cfg, "tab:green" if right else "tab:red")
    axes[0, 0].set_title(f"query\n{axes[0, 0].get_title()}", fontsize=8)
    figure.tight_layout()
    write(figure, path, dpi=64)


def tell(axis, table, row, modality, cfg, colour):
    """Draw the middle of a video: its picture, or the spectrogram of its sound, with its class."""
    clip = data.Clips(table, cfg, training=False, modalities=(modality,), clips=1)[row]
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    label = table.labels[row]
    names = [table.classes[i] for i in (np.flatnonzero(label) if label.ndim else [label] if label >= 0 else [])]
    axis.set_title("\n".join(names[:2]) or Path(table.paths[row]).stem, fontsize=8)
    for side in axis.spines.values():
        side.set(color=colour, linewidth=3)
    if modality == "video":
        axis.imshow(clip["video"][0, :, clip["video"].shape[2] // 2].permute(1, 2, 0))
    else:
        axis.imshow(clip["audio"][0, 0].T, origin="lower", aspect="auto", cmap="magma")


def weights(run, path, root=None):
    """Histograms of agreement and weight of a toy run's training pairs, the planted faulty ones apart; → AUROC, true against faulty.

    The truth is the manifest's column `faulty`, which training never sees. Raises CheckpointError, and ConfigError where no pair is
    faulty.
    """
    saved = checkpoint.load(Path(run) / "last.pt")
    if lacking := {"config", "bank"} - saved.keys():
        raise checkpoint.CheckpointError(f"{Path(run) / 'last.pt'} is no checkpoint of train.py, it lacks {min(lacking)}")
    cfg = config.load(None, [f"data.root={root}"] if root else [], base=saved["config"])
    if cfg.data.name != "toy" or not cfg.toy.faulty:
        raise config.ConfigError(f"{run} is a run without known faulty pairs; train on the toy with toy.faulty=0.3")
    bank = memory_bank.MemoryBank(len(saved["bank"]["agreement"]), cfg.model.embedding, cfg.bank.momentum, cfg.seed)
    bank.load_state_dict(saved["bank"])
    folder = toy.write(cfg.data.root, cfg.toy, cfg.seed, 1)
    table = datasets.load(dataclasses.replace(cfg.data, root=str(folder)), "train")
    faulty = np.array(table.columns["faulty"]) == "1"
    if not faulty.any():
        raise config.ConfigError(f"{table.name} has no faulty pairs; raise toy.faulty")
    w_min = cfg.loss.w_min if cfg.loss.w_min < 1 else 0.25
    mean, std = bank.agreement_mean_std()
    weight = losses.faulty_positive_weights(bank.agreement, mean, std, w_min, cfg.loss.delta, cfg.loss.kappa).numpy()
    auroc = float(roc_auc_score(~faulty, weight))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, values, title in zip(axes, (bank.agreement.numpy(), weight), ("agreement of the memories", "weight"), strict=True):
        bins = np.linspace(values.min(), values.max(), 30)
        for part, name, colour in ((~faulty, "true pairs", "tab:blue"), (faulty, "faulty pairs", "tab:red")):
            axis.hist(values[part], bins, alpha=0.6, density=True, label=f"{name} ({part.sum()})", color=colour)
        axis.set(xlabel=title, yticks=[])
        axis.legend(fontsize=8)
    figure.suptitle(f"{Path(run).name}: AUROC {auroc:.3f}", fontsize=10)
    write(figure, path)
    return auroc


def tasks(cfg, path, row=0, draws=6):
    """Pairs of clips as the temporal tasks take them from one training video, with their labels: pictures and spectrograms."""
    train, _ = next(evaluation.tables(cfg))
    clips, rng = data.Clips(train, cfg, training=False), np.random.default_rng(cfg.seed)
    figure, axes = plt.subplots(2 * draws, 2, figsize=(11, 1.9 * draws), layout="constrained")
    with data.Media(train.root / train.paths[row]) as media:
        first_s, last_s = clips.usable(media)
        if last_s - first_s < 2 * cfg.temporal.speeds[0] * clips.length_s:
            raise data.MediaError(f"{train.root / train.paths[row]} is too short for two clips of {clips.length_s:g} s")
        for draw in range(draws):
            labels = {"order": None}
            while labels["order"] != draw % 3:  # as many of each order
                pair, labels = temporal_tasks.plan(first_s, last_s, clips.length_s, cfg.temporal, rng)
            for column, clip in enumerate(pair):
                picture, sound = axes[2 * draw, column], axes[2 * draw + 1, column]
                frames = clips.picture(media, clip, rng)  # 3×T×S×S
                picture.imshow(frames.permute(2, 1, 3, 0).flatten(1, 2))  # S×T·S×3
                sound.imshow(clips.loudness(media, clip, rng)[0].T, origin="lower", aspect="auto", cmap="magma")
                end_s, way = clip.start_s + clip.speed * clips.length_s, "backward" if clip.backward else "forward"
                picture.set_title(f"{clip.speed}×, {way}: {clip.start_s:.1f} to {end_s:.1f} s", fontsize=9)
                for axis in (picture, sound):
                    axis.set(xticks=[], yticks=[])
            axes[2 * draw, 0].set_ylabel(f"order:\n{temporal_tasks.ORDERS[draw % 3]}", fontsize=9)
    write(figure, path, dpi=64)


def main(arguments):
    with evaluation.plain_errors():
        if arguments.command == "weights":
            path = Path(arguments.run) / "weights.png"
            print(f"AUROC of true against faulty pairs: {weights(arguments.run, path):.3f}; written: {path}")
        else:
            check_picture(arguments.out)
            tasks(arguments.cfg, arguments.out)
            print(f"written: {arguments.out}")


if __name__ == "__main__":
    main(arguments)
