"""What the features know: linear classifiers on a frozen network, or the whole network fine-tuned.

    python eval_linear.py --ckpt runs/toy/last.pt                             kind of the toy's things, by picture and by sound
    python eval_linear.py --ckpt random                                       the floor: an untrained network
    python eval_linear.py --ckpt last.pt --data ucf101 --root /data/ucf101 --split all --modality video
    python eval_linear.py --ckpt last.pt --data esc50 --root /data/esc50 --split all --mode svm

linear     L2-regularised logistic regression on frozen features
svm        linear SVM on frozen features
fewshot    linear SVM from 1, 5 and 20 labelled videos a class, mean and deviation over 20 draws
finetune   the whole network, trained on (settings finetune.*); under torchrun on several GPUs; the same command resumes
"""

from avid import cli, config

MODES = ("linear", "svm", "fewshot", "finetune")


def command_line(argv=None):
    arguments = cli.evaluation_parser(__doc__)
    arguments.add_argument(
        "--modality", choices=("video", "audio"), help="default: what the data set has, both if it can"
    )
    arguments.add_argument("--mode", choices=MODES, default="linear", help="default: linear")
    arguments.add_argument(
        "--save",
        metavar="FILE.npz",
        help="also write features, embeddings, labels and paths of the evaluated part",
    )
    return cli.evaluation(arguments, argv)


if __name__ == "__main__":  # before the heavy imports: --help and a wrong argument answer at once
    arguments = command_line()

from pathlib import Path

import numpy as np

from avid import distributed, evaluation, files, finetune


def main(arguments):
    subject = evaluation.subject(arguments)
    modalities = evaluation.modalities_of(subject.cfg, arguments.modality)
    for modality in modalities:
        evaluation.result_file(subject, f"{arguments.mode}-{modality}")
    tables = list(evaluation.tables(subject.cfg))
    if arguments.save:
        can_save(arguments, len(tables))
    for table in (table for pair in tables for table in pair):
        evaluation.labels_of(table)
    divisions = {modality: [] for modality in modalities}
    for train_table, test_table in tables:
        print(f"{train_table.report()}\n{test_table.report()}")
        evaluation.calibrate_batch_norm(subject, train_table, modalities)
        if arguments.mode == "finetune":
            for modality in modalities:
                divisions[modality].append(
                    finetune.finetune(subject, train_table, test_table, modality, subject.out)
                )
            continue
        train, test = (evaluation.features(subject, table, modalities) for table in (train_table, test_table))
        train_y, test_y = train_table.labels[train.index], test_table.labels[test.index]
        counts = {
            "train_videos": len(train_y),
            "videos": len(test_y),
            "skipped": len(train.failures) + len(test.failures),
        }
        for modality in modalities:
            known = (train.features[modality], train_y, test.features[modality], test_y, subject.cfg.seed)
            if arguments.mode == "fewshot":
                result = evaluation.few_shot(*known)
            else:
                result = evaluation.linear_probe(*known, arguments.mode)
            divisions[modality].append({**counts, **result})
        if arguments.save:
            test.save(
                arguments.save,
                labels=test_y,
                classes=test_table.classes,
                paths=np.array(test_table.paths)[test.index],
            )

    first = distributed.rank() == 0
    distributed.end()
    if not first:
        return
    rows = []
    for modality in modalities:
        scores = [key for key in divisions[modality][0] if key.endswith(("top1", "top5", "std"))]
        mean = {key: np.mean([d[key] for d in divisions[modality]]).item() for key in scores}
        row = {
            "mode": arguments.mode,
            "modality": modality,
            "label": subject.cfg.data.label,
            **divisions[modality][0],
            **mean,
        }
        rows.append(
            evaluation.write_result(
                subject, f"{arguments.mode}-{modality}", {**row, "divisions": divisions[modality]}
            )
        )
    evaluation.print_table(rows, ("modality", "label", "train_videos", "videos", *scores))


def can_save(arguments, divisions):
    """Raise ConfigError where --save asks for what there is not, or would overwrite a file."""
    path = Path(arguments.save)
    if arguments.mode == "finetune":
        raise config.ConfigError(
            f"--save {path} cannot be written: there are no frozen features with --mode finetune"
        )
    if divisions > 1:
        raise config.ConfigError(
            f"--save {path} cannot be written: it keeps one division; name it, such as --split 1"
        )
    if path.exists():
        raise config.ConfigError(
            f"--save {path} exists, and is not overwritten; delete it, or name another file"
        )
    files.check_folder(path.parent)


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(arguments)
