"""The studies' pictures.

In: rows of a study's CSV; for maps and neighbours, checkpoints of one seed's runs.
Out: PNG files.
"""

import matplotlib
import numpy as np
from sklearn.manifold import TSNE

from avid import datasets, evaluation, toy
from avid.tools import figures as single

from . import measures, runs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = 5  # queries on a contact sheet, and videos found by each


def save(figure, path):
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def panels(count, width, height):
    """A figure of up to four panels a line, and their axes."""
    down = -(-count // 4)
    across = -(-count // down)
    figure, axes = plt.subplots(
        down, across, figsize=(width * across + 1.4, height * down), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def legend(figure):
    """One legend of all that the panels name, beside them."""
    named = {}
    for axis in figure.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=8)


def bars(path, rows, methods, columns, group=None):
    """A panel a column, a bar a method, with the deviation over seeds and a dot a run; with `group` (column,
    {value: its name}), a bar a value beside each other."""
    key, values = group or (None, [None])
    figure, axes = panels(len(columns), 4.4, 0.9 + 0.34 * len(methods))
    height = 0.8 / len(values)
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for k, value in enumerate(values):
            if key:
                axis.barh(0, 0, color=f"C{k}", alpha=0.7, label=values[value])
            for at, method in enumerate(methods):
                mine = runs.select(rows, method=method, **({key: value} if key else {}))
                if not (found := runs.mean_std(mine, column)):
                    continue
                y = at + (k - (len(values) - 1) / 2) * height
                axis.barh(y, found[0], height, xerr=found[1] or 0, color=f"C{k}", alpha=0.7)
                axis.plot(
                    [float(row[column]) for row in mine], [y] * len(mine), ".", color="black", markersize=3
                )
        axis.set_yticks(range(len(methods)), methods)
        axis.invert_yaxis()
        axis.set_xlabel(title)
        axis.grid(alpha=0.3, axis="x")
    if key:
        legend(figure)
    return save(figure, path)


def bands(path, rows, methods, columns):
    """A panel a column of curves: mean over seeds and, as a band, the deviation, over epochs."""
    figure, axes = panels(len(columns), 3.8, 3.0)
    colours = plt.get_cmap("tab20" if len(methods) > 10 else "tab10")
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for k, method in enumerate(methods):
            mine = [row for row in runs.select(rows, method=method) if row.get(f"curve {column}")]
            lines = [(runs.numbers(row, "curve epoch"), runs.numbers(row, f"curve {column}")) for row in mine]
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
    """Histograms of the weights of true and of faulty pairs, all seeds together: a row a group, {title:
    rows}, a column a method."""
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
            mine = [row for row in runs.select(rows, method=method) if row.get("weights true")]
            for name, colour in (("true", "tab:blue"), ("faulty", "tab:red")):
                if mine:
                    count = np.sum([runs.numbers(row, f"weights {name}") for row in mine], 0)
                    axis.bar(
                        left,
                        count / count.sum(),
                        width,
                        align="edge",
                        alpha=0.6,
                        color=colour,
                        label=f"{name} pairs",
                    )
            auroc = runs.mean_std(mine, "AUROC")
            axis.set_title(f"{method}, {title}" + (f": AUROC {auroc[0]:.2f}" if auroc else ""), fontsize=9)
            axis.set(yticks=[], xlabel="weight")
    legend(figure)
    return save(figure, path)


def soft_targets(path, groups):
    """Where soft targets put their mass, mean over seeds: a row a group, {title: rows}, a column an
    estimator; in each, from the kind of the picture (rows) to that of the sound (columns; music and noise
    last), the own instance left out."""
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
            mine = [runs.numbers(row, f"matrix {name}") for row in rows if row.get(f"matrix {name}")]
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{name}, {title}", fontsize=9)
            if mine:
                matrix = np.mean(mine, 0).reshape(len(toy.KINDS), len(measures.SOUNDS))
                axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(toy.KINDS)), toy.KINDS, fontsize=6)
    for axis in axes[-1]:
        axis.set_xticks(range(len(measures.SOUNDS)), measures.SOUNDS, fontsize=6, rotation=90)
    return save(figure, path)


# ----------------------------------------------------------------------------------------- out of checkpoints


def maps(path, subjects, labels):
    """Maps of embeddings, t-SNE of pictures and sounds of the evaluation videos together, coloured by kind: a
    column a network.

    subjects: {name: Features}; labels n of the same videos.
    """
    figure, axes = plt.subplots(
        1, len(subjects), figsize=(4.2 * len(subjects), 4.2), squeeze=False, layout="constrained"
    )
    for axis, (name, found) in zip(axes[0], subjects.items(), strict=True):
        both = np.concatenate(
            [found.video_level("embeddings", modality) for modality in ("video", "audio")]
        )  # 2n×D
        place = TSNE(random_state=0, init="pca", metric="cosine").fit_transform(both)  # 2n×2
        for part, marker, what in (
            (place[: len(labels)], "o", "pictures"),
            (place[len(labels) :], "x", "sounds"),
        ):
            axis.scatter(
                *part.T, c=labels, cmap="tab10", marker=marker, s=14, linewidths=0.8, alpha=0.8, label=what
            )
        axis.set(xticks=[], yticks=[], title=name)
    axes[0, 0].legend(fontsize=7)
    return save(figure, path)


def neighbours(path, found, table, cfg, query="video", key="audio", space="embeddings"):
    """Some videos' pictures, or sounds, and the sounds that each found first among all others, by embeddings
    or by features."""
    some = np.random.default_rng(0).permutation(len(found.index))[:SHOWN]
    queries, gallery = found.video_level(space, query)[some], found.video_level(space, key)
    nearest = evaluation.nearest(queries, gallery, SHOWN, exclude=some if query == key else None)
    finds = [datasets.take(table, found.index[row]) for row in nearest]
    single.contact_sheet(path, datasets.take(table, found.index[some]), finds, query, key, cfg)
    return path


def pictures(study, methods, images, folder, arguments, **group):
    """Maps of the untrained network and of the runs of these methods and this group, seed 0, and what the
    last of them finds; nothing where their checkpoints are not at hand."""
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
