"""The pictures: training curves, confusion matrices, what retrieval found.

In: a run's metrics.jsonl, counts, tables of files. Out: PNG files.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

from avid import data, files, temporal_tasks
from avid.files import ConfigError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {  # title: which quantities it shows
    "loss": lambda name: False,  # all others
    "temporal tasks, %": lambda name: name.endswith("%") and not name.startswith("held-out"),
    "held-out temporal tasks, %": lambda name: name.startswith("held-out"),
    "held-out retrieval, %": lambda name: "→" in name,
    "bank": lambda name: name.startswith(("cosine", "agreement")),
    "gradient's norm": lambda name: name == "grad_norm",
    "learning rate": lambda name: name == "lr",
    "clips/s": lambda name: name == "clips_per_s",
}
# one colour, several modalities
LINES = {"_audio": "--", "a→v ": "--", "_cross": ":", "_video": "-", "v→a ": "-"}
WIDTH = 9.0  # inches of a picture that a page shows some 900 pixels wide
FEW = 40  # points of a line, up to which each is marked
UNSEEN = ("step", "epoch", "data_wait", "bad_files", "not_finite", "files")


def check_picture(path):
    """Raise ConfigError where `path` cannot be written, or something else than a picture of this program
    stands there."""
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
    """One panel a subject over epochs, in two rows: losses, tasks, held-out retrieval, the bank's health,
    …"""
    series = {}
    for line in map(json.loads, Path(metrics).read_text(encoding="utf-8").splitlines()):
        for name in line.keys() - UNSEEN:
            series.setdefault(name, []).append((line["epoch"], line[name]))
    panels = {title: [] for title in PANELS}
    for name in sorted(series):
        panels[next((title for title, holds in PANELS.items() if holds(name)), "loss")].append(name)
    if len(panels["loss"]) == 2 and np.allclose(*(series[name] for name in panels["loss"])):
        panels["loss"].remove("loss")  # the only term is all of it
    panels = {title: names for title, names in panels.items() if names}
    columns = max(-(-len(panels) // 2), 1)
    rows = [list(panels)[start : start + columns] for start in range(0, len(panels), columns)] or [[]]
    # of the legends
    lines = sum(max((-(-len(panels[title]) // 2) for title in row), default=0) for row in rows)
    size = (WIDTH, 2.1 * len(rows) + 0.15 * lines)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for row, places in zip(rows, axes, strict=True):
        for title, axis in zip(row, places, strict=False):
            axis.set_axis_on()
            draw_lines(axis, {name: series[name] for name in panels[title]})
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("epoch", fontsize=7)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
            if len(panels[title]) > 1:
                below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.24), "frameon": False}
                axis.legend(
                    fontsize=6.5, ncols=2, handlelength=2, columnspacing=0.6, labelspacing=0.3, **below
                )
    write(figure, path, dpi=150)


def draw_lines(axis, series):
    """{name: (epoch, value) pairs} as lines; where a name differs by its modality only, the colour is the
    same."""
    colours = {}
    for name, points in series.items():
        modality = next((part for part in LINES if part in name), "")
        colour = colours.setdefault(name.replace(modality, ""), f"C{len(colours) % 10}")
        marker = "o" if len(points) <= FEW else None
        label = name.removeprefix("held-out ").removesuffix(" %")
        style = {"color": colour, "linestyle": LINES.get(modality, "-"), "linewidth": 1.2}
        axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=2.5, **style)


def confusions(counts, temporal, path):
    """Confusion matrices of the temporal tasks, {task: C×C counts, rows: the truth}, a panel a task."""
    columns = min(len(counts), 4)
    rows = -(-len(counts) // columns)
    size = (WIDTH * max(columns, 2) / 4, 2.55 * rows + 0.35)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (task, n) in zip(axes.flat, counts.items(), strict=False):
        share = n / n.sum(1, keepdims=True).clip(1)
        axis.set_axis_on()
        axis.imshow(share, vmin=0, vmax=1, cmap="Blues")
        for (row, column), value in np.ndenumerate(share):
            colour = "white" if value > 0.6 else "black"
            axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color=colour)
        ticks = temporal_tasks.TASKS[task].classes(temporal)
        axis.set_xticks(range(len(n)), ticks, rotation=30, ha="right", fontsize=7)
        axis.set_yticks(range(len(n)), ticks, fontsize=7)
        right = n.trace() / max(n.sum(), 1)
        axis.set_title(f"{task}\n{right:.0%}, chance {1 / len(n):.0%}", fontsize=8)
    what = "confusion matrix" if len(counts) == 1 else "confusion matrices"
    figure.suptitle(f"{what} of held-out clips: rows the truth, columns the answer", fontsize=9)
    write(figure, path, dpi=150)


def contact_sheet(path, queries, finds, query_modality, found_modality, cfg):
    """One row a query, then what it found, best first: pictures or spectrograms with their classes.

    queries: datasets.Table of q videos; finds: q tables of the videos that each found. The frame is green
    where a video found shares a class with the query, red where it does not, grey where one of the two has no
    class.
    """
    columns = 1 + max(map(len, finds))
    figure, axes = plt.subplots(
        len(queries), columns, figsize=(1.4 * columns, 1.6 * len(queries)), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row, found in enumerate(finds):
        draw_video(axes[row, 0], queries, row, query_modality, cfg, "black")
        for column in range(len(found)):
            colour = frame_colour(queries.labels[row], found.labels[column])
            draw_video(axes[row, 1 + column], found, column, found_modality, cfg, colour)
    axes[0, 0].set_title(f"query\n{axes[0, 0].get_title()}", fontsize=8)
    figure.tight_layout()
    write(figure, path, dpi=120)


def frame_colour(query, found):
    """The frame of a video that a query found, by their labels: a number (−1: none), or C of 0 and 1."""
    several = np.ndim(query) > 0
    if not (query.any() and found.any() if several else query >= 0 and found >= 0):
        return "tab:grey"
    return "tab:green" if ((query & found).any() if several else query == found) else "tab:red"


def draw_video(axis, table, row, modality, cfg, colour):
    """Draw the middle of a video, its picture or the spectrogram of its sound, with its classes and a
    frame."""
    clip = data.Clips(table, cfg, training=False, modalities=(modality,), clips=1)[row]
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    label = table.labels[row]
    classes = np.flatnonzero(label) if label.ndim else [label] if label >= 0 else []
    names = [table.classes[i] for i in classes[:2]] or [Path(table.paths[row]).stem]
    names = map(files.printable, names)
    short = [name if len(name) <= 20 else f"{name[:19].rstrip()}…" for name in names]
    axis.set_title("\n".join(short), fontsize=8, parse_math=False)
    for side in axis.spines.values():
        side.set(color=colour, linewidth=3)
    if modality == "video":
        axis.imshow(clip["video"][0, :, clip["video"].shape[2] // 2].permute(1, 2, 0).numpy())
    else:
        axis.imshow(clip["audio"][0, 0].T.numpy(), origin="lower", aspect="auto", cmap="magma")
