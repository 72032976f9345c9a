"""The pictures: training curves, what retrieval found, how weights tell faulty pairs from true ones.

In: a run's metrics.jsonl, tables of files, or arrays. Out: PNG files.
"""

import json
from pathlib import Path

import matplotlib

from . import data

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def curves(metrics, path):
    """One panel a quantity over epochs: losses, learning rate, held-out retrieval, the bank's health, speed."""
    lines = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    series = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "epoch", "data_wait", "bad_files"):
                series.setdefault(name, []).append((line["epoch"], value))
    panels = {"loss": [], "held-out retrieval, %": [], "bank": [], "lr": [], "clips/s": []}
    for name in series:
        where = next(
            (
                panel
                for panel, mine in (
                    ("held-out retrieval, %", "→" in name),
                    ("bank", name.startswith(("cosine", "agreement"))),
                    ("lr", name == "lr"),
                    ("clips/s", name == "clips_per_s"),
                )
                if mine
            ),
            "loss",
        )
        panels[where].append(name)
    panels = {title: names for title, names in panels.items() if names}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            axis.plot(*zip(*series[name], strict=True), label=name, linewidth=1.2)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
            right = found.labels[column] == queries.labels[row] >= 0
            tell(axes[row, 1 + column], found, column, found_modality, cfg, "tab:green" if right else "tab:red")
    axes[0, 0].set_title(f"query\n{axes[0, 0].get_title()}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tell(axis, table, row, modality, cfg, colour):
    """Draw the middle of a video: its picture, or the spectrogram of its sound, with its class."""
    clip = data.Clips(table, cfg, training=False, modalities=(modality,), clips=1)[row]
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    axis.set_title(table.classes[table.labels[row]] if table.labels[row] >= 0 else Path(table.paths[row]).stem, fontsize=8)
    for side in axis.spines.values():
        side.set(color=colour, linewidth=3)
    if modality == "video":
        axis.imshow(clip["video"][0, :, clip["video"].shape[2] // 2].permute(1, 2, 0))
    else:
        axis.imshow(clip["audio"][0, 0].T, origin="lower", aspect="auto", cmap="magma")
