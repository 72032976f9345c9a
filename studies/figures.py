"""The figures of the studies.

In: rows of a study's CSV; for embedding maps and neighbours, the checkpoints of one seed's runs.
Out: PNG files.
"""

import matplotlib
import numpy as np
from sklearn.manifold import TSNE

from avid import datasets, evaluation, toy
from avid.tools import figures as tool_figures

from . import measures, runs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = 5  # queries on a contact sheet, and neighbours of each


def save(figure, path):
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def panels(count, width, height):
    """A figure with up to four panels in a row, and the axes of its panels."""
    rows = -(-count // 4)
    columns = -(-count // rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns + 1.4, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def legend(figure):
    """One legend for all panels, beside them."""
    named = {}
    for axis in figure.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=8)


def bars(path, rows, methods, columns, group=None):
    """One panel per column of the CSV, one bar per method: the mean over seeds, its deviation, and a dot for
    each run; methods without runs are left out. group: (column, {value: label}) draws one bar per value for
    each method."""
    methods = [method for method in methods if runs.select(rows, method=method)]
    key, values = group or (None, [None])
    figure, axes = panels(len(columns), 4.4, 0.9 + 0.34 * len(methods))
    height = 0.8 / len(values)
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for k, value in enumerate(values):
            if key:
                axis.barh(0, 0, color=f"C{k}", alpha=0.7, label=values[value])
            for at, method in enumerate(methods):
                selected = runs.select(rows, method=method, **({key: value} if key else {}))
                if not (found := runs.mean_std(selected, column)):
                    continue
                y = at + (k - (len(values) - 1) / 2) * height
                axis.barh(y, found[0], height, xerr=found[1] or 0, color=f"C{k}", alpha=0.7)
                shown = [float(row[column]) for row in selected if row.get(column)]
                axis.plot(shown, [y] * len(shown), ".", color="black", markersize=3)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3, axis="x")
    if key:
        legend(figure)
    return save(figure, path)


def bands(path, rows, methods, columns):
    """One panel of curves over epochs per column: the mean over seeds, with the deviation as a band."""
    figure, axes = panels(len(columns), 3.8, 3.0)
    colours = plt.get_cmap("tab20" if len(methods) > 10 else "tab10")
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for k, method in enumerate(methods):
            selected = [row for row in runs.select(rows, method=method) if row.get(f"curve {column}")]
            lines = [
                (runs.numbers(row, "curve epoch"), runs.numbers(row, f"curve {column}")) for row in selected
            ]
            if not lines:
                continue
            x, y = np.array(lines[0][0]), np.array([y for _, y in lines])  # seeds×checks
            axis.plot(x, y.mean(0), color=colours(k), label=method, linewidth=1.3)
            if len(y) > 1:
                deviation = y.std(0, ddof=1)
                axis.fill_between(
                    x, y.mean(0) - deviation, y.mean(0) + deviation, color=colours(k), alpha=0.15, linewidth=0
                )
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    legend(figure)
    return save(figure, path)


def weights(path, groups, methods):
    """Histograms of the weights of true and of faulty pairs, all seeds together: one row of panels per group
    ({title: rows}), one column per method."""
    figure, axes = plt.subplots(
        len(groups),
        len(methods),
        figsize=(3.2 * len(methods) + 1.4, 2.2 * len(groups)),
        squeeze=False,
        layout="constrained",
    )
    left, width = measures.BINS[:-1], np.diff(measures.BINS)
    for line, (title, rows) in zip(axes, groups.items(), strict=True):
        for axis, method in zip(line, methods, strict=True):
            selected = [row for row in runs.select(rows, method=method) if row.get("weights true")]
            for name, colour in (("true", "tab:blue"), ("faulty", "tab:red")):
                if selected:
                    count = np.sum([runs.numbers(row, f"weights {name}") for row in selected], 0)
                    axis.bar(
                        left,
                        count / count.sum(),
                        width,
                        align="edge",
                        alpha=0.6,
                        color=colour,
                        label=f"{name} pairs",
                    )
            auroc = runs.mean_std(selected, "AUROC")
            axis.set_title(f"{method}, {title}" + (f": AUROC {auroc[0]:.2f}" if auroc else ""), fontsize=9)
            axis.set(yticks=[], xlabel="weight")
    legend(figure)
    return save(figure, path)


def soft_targets(path, groups):
    """Mass of the soft targets by kind, mean over seeds: one row of panels per group ({title: rows}), one
    column per estimator. In a panel, rows are the kind of the picture and columns that of the sound (music
    and noise last). An instance's target for itself is left out."""
    names = measures.ESTIMATORS
    figure, axes = plt.subplots(
        len(groups),
        len(names),
        figsize=(2.9 * len(names), 2.7 * len(groups)),
        squeeze=False,
        layout="constrained",
    )
    for line, (title, rows) in zip(axes, groups.items(), strict=True):
        for axis, name in zip(line, names, strict=True):
            selected = [runs.numbers(row, f"matrix {name}") for row in rows if row.get(f"matrix {name}")]
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{name}, {title}", fontsize=9)
            if selected:
                matrix = np.mean(selected, 0).reshape(len(toy.KINDS), len(measures.SOUNDS))
                axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(toy.KINDS)), toy.KINDS, fontsize=6)
    for axis in axes[-1]:
        axis.set_xticks(range(len(measures.SOUNDS)), measures.SOUNDS, fontsize=6, rotation=90)
    return save(figure, path)


# ------------------------------------------------------------------------------------------- from checkpoints


def maps(path, subjects, labels):
    """t-SNE of the embeddings of the evaluation videos, pictures and sounds together, coloured by kind: one
    panel per network.

    subjects: {name: Features}; labels: n, of the same videos.
    """
    figure, axes = plt.subplots(
        1, len(subjects), figsize=(4.2 * len(subjects), 4.2), squeeze=False, layout="constrained"
    )
    for axis, (name, found) in zip(axes[0], subjects.items(), strict=True):
        both = np.concatenate(
            [found.video_level("embeddings", modality) for modality in ("video", "audio")]
        )  # 2n×D
        place = TSNE(random_state=0, init="pca", metric="cosine").fit_transform(both)  # 2n×2
        for points, marker, modality in (
            (place[: len(labels)], "o", "pictures"),
            (place[len(labels) :], "x", "sounds"),
        ):
            axis.scatter(
                *points.T,
                c=labels,
                cmap="tab10",
                marker=marker,
                s=14,
                linewidths=0.8,
                alpha=0.8,
                label=modality,
            )
        axis.set(xticks=[], yticks=[], title=name)
    axes[0, 0].legend(fontsize=7)
    return save(figure, path)


def neighbours(path, found, table, cfg, query="video", key="audio", space="embeddings"):
    """A contact sheet: SHOWN queries, and the nearest neighbours of each among all others, by embeddings or
    by features."""
    queried = np.random.default_rng(0).permutation(len(found.index))[:SHOWN]
    queries, gallery = found.video_level(space, query)[queried], found.video_level(space, key)
    nearest = evaluation.nearest(queries, gallery, SHOWN, exclude=queried if query == key else None)
    neighbour_tables = [datasets.take(table, found.index[row]) for row in nearest]
    tool_figures.contact_sheet(
        path, datasets.take(table, found.index[queried]), neighbour_tables, query, key, cfg
    )
    return path


def pictures(study, methods, images, folder, arguments, **group):
    """Embedding maps of the untrained network and of the first seed's runs of these methods and this group,
    and the neighbours found by the last of them. Without their checkpoints, one line says why there are
    none."""
    subjects = {}
    for run in study.plan(arguments.seeds[:1]):
        method = run.group["method"]
        if method not in methods or any(run.group[key] != value for key, value in group.items()):
            continue
        cfg = runs.configuration(
            study, run, arguments.quick, arguments.root, runs.folder_of(study, run, folder, arguments.quick)
        )
        if not subjects:
            (_, found), (_, table) = measures.features(measures.untrained(cfg), cfg)
            subjects["untrained"] = found
        try:
            network, _ = measures.trained(cfg)
        except measures.run.CheckpointError as error:
            print(f"no maps: {error}; run the study first")
            return
        (_, found), _ = measures.features(network, cfg)
        subjects[method] = found
    if len(subjects) > 1:
        yield maps(images / f"{study.name}-maps.png", subjects, table.labels[found.index])
        yield neighbours(images / f"{study.name}-neighbours.png", found, table, cfg)
