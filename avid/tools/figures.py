"""The pictures: training curves, confusion matrices, what retrieval found.

In: a run's metrics.jsonl, counts, tables of files. Out: PNG files.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

from avid import data, datasets, files, temporal_tasks
from avid.files import ConfigError

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
    files.check_folder(path.parent)
    if path.exists() and not (path.is_file() and b"Software\0avid" in path.read_bytes()[:4096]):
        raise ConfigError(f"{path} is no picture of avid's; move it away, or write elsewhere")


def write(figure, path, dpi=110):
    """Write a figure as a PNG that `check_picture` knows, whole or not at all."""
    with files.replacing(path, "wb") as file:
        figure.savefig(file, dpi=dpi, format="png", metadata={"Software": "avid"})
    plt.close(figure)


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
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            axis.plot(*zip(*series[name], strict=True), label=name, linewidth=1.2)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    write(figure, path)


def confusions(counts, temporal, path):
    """Confusion matrices of the temporal tasks: {task: C×C counts}, a panel a task, rows: the truth."""
    figure, axes = plt.subplots(
        1, len(counts), figsize=(2.6 * len(counts), 2.9), squeeze=False, layout="constrained"
    )
    for axis, (task, n) in zip(axes[0], counts.items(), strict=True):
        share = n / n.sum(1, keepdims=True).clip(1)
        axis.imshow(share, vmin=0, vmax=1, cmap="Blues")
        for (row, column), value in np.ndenumerate(share):
            axis.text(
                column,
                row,
                f"{value:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.6 else "black",
            )
        ticks = temporal_tasks.TASKS[task].classes(temporal)
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
    figure, axes = plt.subplots(
        len(queries), columns, figsize=(1.4 * columns, 1.6 * len(queries)), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row, found in enumerate(finds):
        tell(axes[row, 0], queries, row, query_modality, cfg, "black")
        for column in range(len(found)):
            right = datasets.same_class(queries.labels, found.labels)(row, column)
            tell(
                axes[row, 1 + column], found, column, found_modality, cfg, "tab:green" if right else "tab:red"
            )
    axes[0, 0].set_title(f"query\n{axes[0, 0].get_title()}", fontsize=8)
    figure.tight_layout()
    write(figure, path, dpi=64)


def tell(axis, table, row, modality, cfg, colour):
    """Draw the middle of a video: its picture, or the spectrogram of its sound, with its class."""
    clip = data.Clips(table, cfg, training=False, modalities=(modality,), clips=1)[row]
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    label = table.labels[row]
    names = [
        table.classes[i] for i in (np.flatnonzero(label) if label.ndim else [label] if label >= 0 else [])
    ]
    axis.set_title("\n".join(names[:2]) or Path(table.paths[row]).stem, fontsize=8)
    for side in axis.spines.values():
        side.set(color=colour, linewidth=3)
    if modality == "video":
        axis.imshow(clip["video"][0, :, clip["video"].shape[2] // 2].permute(1, 2, 0))
    else:
        axis.imshow(clip["audio"][0, 0].T, origin="lower", aspect="auto", cmap="magma")
