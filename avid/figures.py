"""The pictures: training curves, what retrieval found, how weights tell faulty pairs from true ones.

In: a run's metrics.jsonl, or arrays. Out: PNG files.
"""

import json
from pathlib import Path

import matplotlib

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
