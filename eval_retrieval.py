"""What the features find: the nearest videos by picture, by sound, and from one to the other.

    python eval_retrieval.py --ckpt runs/toy/last.pt                 what it finds, with a contact sheet each
    python eval_retrieval.py --ckpt random --task cross              the floor: an untrained network
    python eval_retrieval.py --ckpt runs/toy/last.pt --task sync
    python eval_retrieval.py --ckpt runs/toy/last.pt --task where --page
    python eval_retrieval.py --ckpt runs/toy/last.pt --task fingerprint

video, audio   evaluation videos query the training videos by their features: is one of the k nearest of the
               query's class?
cross          among the evaluation videos, by embeddings: does a picture find its own sound, or one of its
               class, and the other way?
sync           the sound of the evaluation videos is shifted by −2 … 2 s: which shift does the network prefer?
               only where asked for
where          a heat map of each picture for its own sound; where a manifest knows the place of the thing, as
               the toy's does: is the map brightest there? only where asked for
fingerprint    distorted copies of the evaluation videos, each of 13 distortions at 3 strengths: does a copy
               find its original? only where asked for: it reads the files some 40 times

Each is judged on all files that have what it needs. Printed, and written as JSON beside the checkpoint: R@k,
the share of queries with a match among the k nearest, in percent, with chance beside it; and a picture.
docs/evaluate.md says more.
"""

from avid import cli, config

TASKS = ("video", "audio", "cross", "sync", "where", "fingerprint")


def command_line(argv=None):
    arguments = cli.evaluation_parser(__doc__)
    what = "see above; default: video, audio and cross, as far as the data set has them"
    arguments.add_argument("--task", choices=TASKS, help=what)
    what = "of sync: seconds between two shifts (default: half of the shorter clip, at most 0.5)"
    arguments.add_argument("--step", type=float, metavar="S", help=what)
    what = "also write a page that plays some queries and what they found; not of sync and fingerprint"
    arguments.add_argument("--page", action="store_true", help=what)
    given = cli.evaluation(arguments, argv)
    if given.step is not None and given.task != "sync":
        config.stop("--step is of --task sync alone; leave it out")
    if given.page and given.task in ("sync", "fingerprint"):
        config.stop(f"--page shows what queries found, or heat maps; leave it out with --task {given.task}")
    return given


if __name__ == "__main__":  # before the heavy imports: --help and a wrong argument answer at once
    arguments = command_line()

import numpy as np

from avid import data, datasets, distributed, evaluation
from avid.tools import figures, fingerprint, page, sync, where

RANKS = (1, 5, 10, 20)
SHOWN = 6  # queries on a contact sheet, and videos found by each
ON_PAGE, FOUND_ON_PAGE = 20, 10  # queries on a page, and videos found by each
MAPS = 24  # heat maps in a picture, and on a page


def main(arguments):
    subject = evaluation.subject(arguments)
    held = evaluation.modalities_of(subject.cfg)
    if arguments.task in ("video", "cross", "sync", "where") and "video" not in held:
        config.stop(
            f"--task {arguments.task} needs pictures, and {subject.cfg.data.name} has none; use --task audio"
        )
    if arguments.task == "sync":
        sync.steps(subject.cfg, arguments.step)
    tasks = [arguments.task] if arguments.task else [*held] + ["cross"] * (len(held) == 2)
    for task in tasks:
        evaluation.result_file(subject, f"retrieval-{task}")
        figures.check_picture(picture(subject, task))
        page.check_page(picture(subject, task).with_suffix(".html"))
    divisions = list(evaluation.tables(subject.cfg))
    for part in (part for pair in divisions for part in pair if arguments.page):
        page.check_files(part)
    if {"video", "audio"} & {*tasks}:
        for part in (part for pair in divisions for part in pair):
            evaluation.labels_of(part, several=True)
            evaluation.not_empty(part)
    results = {task: [] for task in tasks}
    for train_table, table in divisions:
        print(f"{train_table.report()}\n{table.report()}")
        for task in list(results):
            try:
                evaluation.calibrate_batch_norm(subject, train_table, held if task not in held else (task,))
                result = measure(subject, task, train_table, table, arguments, not results[task])
                results[task].append(result)
            except data.MediaError as error:  # such as a folder of mute videos
                if len(results) == 1:
                    raise
                print(f"no retrieval, {task}: {evaluation.message_of(error)}")
                del results[task]

    for task, found in results.items():
        # of a division with few files there is no R@20
        first = {name: x for name, x in found[0].items() if all(name in result for result in found)}
        mean = {name: np.mean([result[name] for result in found]).item() for name in scores(first)}
        row = {"task": task, "label": subject.cfg.data.label, **first, **mean, "divisions": found}
        show(subject, task, evaluation.write_result(subject, f"retrieval-{task}", row))
    distributed.end()


def measure(subject, task, train_table, table, arguments, first):
    """The result of a task on one division, a flat dict; of the first one, what was found is drawn."""
    if task == "fingerprint":
        return fingerprint.measure(subject, table, evaluation.modalities_of(subject.cfg), RANKS)
    if task == "sync":
        return sync.measure(subject, table, arguments.step)
    if task == "where":
        result, maps = where.measure(subject, table)
        if first:
            draw_maps(subject, table, maps, arguments.page)
        return result
    gallery_table = table if task == "cross" else train_table
    if task == "cross":
        parts = [evaluation.features_of(subject, table, modality) for modality in data.MODALITIES]
        found = gallery = evaluation.in_common(parts)
        if not len(found.index):
            raise data.MediaError(f"no file of {table.name} has both a picture and a sound that can be used")
        labels = table.labels[found.index]
        result = evaluation.cross_modal(found, labels, RANKS) | evaluation.chance_among(labels, RANKS)
        query, key = (found.video_level("embeddings", modality) for modality in data.MODALITIES)
    else:
        found, gallery = (evaluation.features_of(subject, t, task) for t in (table, gallery_table))
        query, key = (part.video_level("features", task) for part in (found, gallery))
        result = by_class(query, key, table.labels[found.index], train_table.labels[gallery.index])
    if first:
        nearest = evaluation.nearest(query, key, FOUND_ON_PAGE)
        draw(subject, task, found, table, gallery, gallery_table, nearest[:, :SHOWN])
        if arguments.page:
            write_page(subject, task, (found, table), (gallery, gallery_table), nearest)
    counts = {"videos": len(query), "files": len(table), "gallery_videos": len(key)}
    return {**counts, "gallery_files": len(gallery_table), "skipped": len(table) - len(query), **result}


def by_class(query, key, query_y, key_y):
    """R@k by class, and chance."""
    found, match = evaluation.nearest(query, key, max(RANKS)), datasets.same_class(query_y, key_y)
    chance = evaluation.chance(evaluation.matching(query_y, key_y), len(key_y), RANKS)
    return evaluation.recall(found, match, RANKS) | {f"chance {name}": x for name, x in chance.items()}


def scores(result):
    """The numbers of a result that are no counts."""
    return [name for name, value in result.items() if isinstance(value, float)]


def show(subject, task, row):
    """Print a task's table; the tasks that draw their own picture draw it."""
    gallery = f", {row['gallery_videos']} videos to find" if "gallery_videos" in row else ""
    print(f"{task}: {row['videos']} of {row['files']} files{gallery}")
    path = picture(subject, task)
    if task in ("fingerprint", "sync"):
        tool = {"fingerprint": fingerprint, "sync": sync}[task]
        lines = list(tool.rows(row))
        tool.draw(path, row)
        print(f"written: {path}")
    elif task == "where":
        lines = [{"share of the videos": name, "%": row[name]} for name in scores(row)]
        if not lines:
            print("nobody knows where the things are: heat maps alone")
            return
    else:
        names = [name.removesuffix("R@1") for name in row if name.endswith("R@1")]
        lines = [
            {"R@k, %": f"R@{k}", **{name.strip() or "of its class": row[f"{name}R@{k}"] for name in names}}
            for k in RANKS
            if f"{names[0]}R@{k}" in row
        ]
    evaluation.print_table(lines, lines[0])


def picture(subject, task):
    return subject.out / f"retrieval-{task}-{subject.cfg.data.name}.png"


def draw(subject, task, found, table, gallery, gallery_table, nearest):
    """A contact sheet of some queries, drawn by the seed, and what each found."""
    some = np.random.default_rng(subject.cfg.seed).permutation(len(nearest))[:SHOWN]
    queries = datasets.take(table, found.index[some])
    finds = [datasets.take(gallery_table, gallery.index[nearest[q]]) for q in some]
    path = picture(subject, task)
    shown = ("video", "audio") if task == "cross" else (task, task)
    figures.contact_sheet(path, queries, finds, *shown, subject.cfg)
    print(f"written: {path}")


def write_page(subject, task, queries, gallery, nearest):
    """A page of some queries, drawn by the seed, and what each found; queries, gallery: (Features, Table)."""
    some = np.random.default_rng(subject.cfg.seed).permutation(len(nearest))[:ON_PAGE]
    path = picture(subject, task).with_suffix(".html")
    page.write_retrieval(path, subject, task, queries, gallery, {q: nearest[q] for q in some.tolist()})
    print(f"written: {path}")


def draw_maps(subject, table, maps, on_page):
    """Some heat maps, drawn by the seed, as a picture and, where asked for, on a page."""
    some = [maps[i] for i in np.random.default_rng(subject.cfg.seed).permutation(len(maps))[:MAPS]]
    path = picture(subject, "where")
    where.draw(path, table, some, subject.cfg)
    print(f"written: {path}")
    if on_page:
        path = path.with_suffix(".html")
        where.write_page(path, table, some, subject)
        print(f"written: {path}")


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(arguments)
