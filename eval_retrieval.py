"""What the features find: the nearest videos by picture, by sound, and from one to the other.

    python eval_retrieval.py --ckpt runs/toy/last.pt                  what it finds, with a contact sheet each
    python eval_retrieval.py --ckpt random --task cross               the floor: an untrained network
    python eval_retrieval.py --ckpt runs/toy/last.pt --task fingerprint

video, audio   evaluation videos query the training videos by their features: is one of the k nearest of the query's class?
cross          among the evaluation videos, by embeddings: does a picture find its own sound, or one of its class, and the
               other way?
fingerprint    distorted copies of the evaluation videos, each of 13 distortions at 3 strengths: does a copy find its original?
               only where asked for: it reads the files some 40 times
"""

from avid import cli, config

TASKS = ("video", "audio", "cross", "fingerprint")


def command_line(argv=None):
    arguments = cli.evaluation_parser(__doc__)
    arguments.add_argument(
        "--task", choices=TASKS, help="default: all that the data set allows but fingerprint"
    )
    return cli.evaluation(arguments, argv)


if __name__ == "__main__":  # before the heavy imports: --help and a wrong argument answer at once
    arguments = command_line()

import numpy as np

from avid import datasets, evaluation
from avid.tools import figures, fingerprint

RANKS = (1, 5, 10, 20)
SHOWN = 6  # queries on a contact sheet, and videos found by each


def main(arguments):
    subject = evaluation.subject(arguments)
    held = evaluation.modalities_of(subject.cfg)
    if arguments.task in ("video", "cross") and "video" not in held:
        config.stop(
            f"--task {arguments.task} needs pictures, and {subject.cfg.data.name} has none; use --task audio"
        )
    tasks = [arguments.task] if arguments.task else [*held] + ["cross"] * (len(held) == 2)
    modalities = held if arguments.task in (None, "cross", "fingerprint") else (arguments.task,)
    for task in tasks:
        evaluation.result_file(subject, f"retrieval-{task}")
        figures.check_picture(picture(subject, task))
    divisions = list(evaluation.tables(subject.cfg))
    if {"video", "audio"} & {*tasks}:
        for part in (part for pair in divisions for part in pair):
            evaluation.labels_of(part, several=True)
    results = {task: [] for task in tasks}
    for train_table, table in divisions:
        print(f"{train_table.report()}\n{table.report()}")
        evaluation.calibrate_batch_norm(subject, train_table, modalities)
        if arguments.task == "fingerprint":
            results["fingerprint"].append(fingerprint.measure(subject, table, modalities, RANKS))
            continue
        found = evaluation.features(subject, table, modalities)
        for task in tasks:
            if task == "cross":
                result = evaluation.cross_modal(found, table.labels[found.index], RANKS)
                query, key = (found.video_level("embeddings", modality) for modality in ("video", "audio"))
                gallery, gallery_table = found, table
            else:
                gallery, gallery_table = evaluation.features(subject, train_table, modalities), train_table
                query, key = (part.video_level("features", task) for part in (found, gallery))
                result = by_class(query, key, table.labels[found.index], train_table.labels[gallery.index])
            counts = {"videos": len(query), "gallery_videos": len(key), "skipped": len(found.failures)}
            results[task].append({**counts, **result})
            if len(results[task]) == 1:
                draw(
                    subject, task, found, table, gallery, gallery_table, evaluation.nearest(query, key, SHOWN)
                )

    for task in tasks:
        recalls = [name for name in results[task][0] if "R@" in name]
        mean = {name: np.mean([result[name] for result in results[task]]).item() for name in recalls}
        row = {
            "task": task,
            "label": subject.cfg.data.label,
            **results[task][0],
            **mean,
            "divisions": results[task],
        }
        row = evaluation.write_result(subject, f"retrieval-{task}", row)
        print(f"{task}: {row['videos']} queries, {row['gallery_videos']} videos to find")
        if task == "fingerprint":
            lines = list(fingerprint.rows(row))
            evaluation.print_table(lines, lines[0])
            path = picture(subject, task)
            fingerprint.draw(path, row)
            print(f"written: {path}")
        else:
            evaluation.print_table([{"R@k, %": name, "": row[name]} for name in recalls], ("R@k, %", ""))


def picture(subject, task):
    return subject.out / f"retrieval-{task}-{subject.cfg.data.name}.png"


def by_class(query, key, query_y, key_y):
    """R@k by class; chance is what a random order would give for k = 1."""
    match, everything = datasets.same_class(query_y, key_y), np.arange(len(key_y))
    chance = 100 * np.mean([match(q, everything).mean() for q in range(len(query_y))]).item()
    return {
        **evaluation.recall(evaluation.nearest(query, key, max(RANKS)), match, RANKS),
        "chance R@1": chance,
    }


def draw(subject, task, found, table, gallery, gallery_table, nearest):
    """A contact sheet of some queries, drawn by the seed, and what each found."""
    some = np.random.default_rng(subject.cfg.seed).permutation(len(nearest))[:SHOWN]
    queries = datasets.take(table, found.index[some])
    finds = [datasets.take(gallery_table, gallery.index[nearest[q]]) for q in some]
    path = picture(subject, task)
    shown = ("video", "audio") if task == "cross" else (task, task)
    figures.contact_sheet(path, queries, finds, *shown, subject.cfg)
    print(f"written: {path}")


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(arguments)
