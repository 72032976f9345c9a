"""What the features know: linear classifiers on a frozen network, or the whole network fine-tuned.

    python eval_linear.py --ckpt runs/toy/last.pt         the toy's kinds, by picture and by sound
    python eval_linear.py --ckpt random                   the floor: an untrained network
    python eval_linear.py --ckpt last.pt --data ucf101 --root /data/ucf101 --split all --modality video
    python eval_linear.py --ckpt last.pt --data esc50 --root /data/esc50 --split all --mode svm
    python eval_linear.py --ckpt last.pt --data audioset --root /data/audioset

linear     L2-regularised logistic regression on frozen features
svm        linear SVM on frozen features
fewshot    linear SVM from 1, 5 and 20 labelled videos a class, mean and deviation over 20 draws
finetune   the whole network, trained on (settings finetune.*); under torchrun on several GPUs; the same
           command resumes
linear_layers
           AVID's protocol on Kinetics: batch norm and a linear layer on each stage of the video network, by
           Adam; the same command resumes
crisscross CrissCross's on ESC-50: linear SVM on one clip of 5 s, C chosen on the test part
           (docs/reproduce.md)

Each modality is judged on all files that have it. Printed, and written as JSON beside the checkpoint: top-1
and top-5 accuracy of videos; where a file has several classes (AudioSet), linear and svm give the mean
average precision and the mean area under the ROC curve. All in percent; docs/evaluate.md says more.
"""

from avid import cli, config, files

MODES = ("linear", "svm", "fewshot", "finetune", "linear_layers", "crisscross")
SCORES = ("top1", "top5", "std", "mAP", "AUC")


def command_line(argv=None):
    arguments = cli.evaluation_parser(__doc__)
    arguments.add_argument(
        "--modality", choices=("video", "audio"), help="default: all that the data set has"
    )
    arguments.add_argument("--mode", choices=MODES, default="linear", help="see above; default: linear")
    what = "also write features, embeddings, labels and paths of the evaluated part"
    arguments.add_argument("--save", metavar="FILE.npz", help=what)
    return cli.evaluation(arguments, argv)


if __name__ == "__main__":  # before the heavy imports: --help and a wrong argument answer at once
    arguments = command_line()

from pathlib import Path

import numpy as np

from avid import data, distributed, evaluation, finetune, protocols

TRAINED = {"finetune": finetune.finetune, **protocols.PROTOCOLS}  # with a training of their own


def main(arguments):
    subject = evaluation.subject(arguments)
    mode = arguments.mode
    modalities = evaluation.modalities_of(subject.cfg, arguments.modality or protocols.MODALITY.get(mode))
    for modality in modalities:
        evaluation.result_file(subject, f"{mode}-{modality}")
    tables = list(evaluation.tables(subject.cfg))
    if arguments.save:
        can_save(arguments, len(tables))
    for table in (table for pair in tables for table in pair):
        evaluation.labels_of(table, several=mode in ("linear", "svm"))
        evaluation.not_empty(table)
    divisions = {modality: [] for modality in modalities}
    for train_table, test_table in tables:
        print(f"{train_table.report()}\n{test_table.report()}")
        found = {}
        for modality in list(divisions):
            try:
                result, found[modality] = measure(subject, train_table, test_table, modality, mode)
            except data.MediaError as error:  # such as a folder of mute videos
                if mode in TRAINED or len(divisions) == 1:
                    raise
                print(f"not judged by {modality}: {evaluation.message_of(error)}")
                del divisions[modality]
                continue
            listed = {"train_files": len(train_table), "files": len(test_table)}
            divisions[modality].append({**listed, **result})
        if arguments.save:
            save(arguments.save, test_table, found)

    first = distributed.rank() == 0
    distributed.end()
    if not first:
        return
    rows = []
    for modality, results in divisions.items():
        scores = [key for key in results[0] if key.endswith(SCORES)]
        mean = {key: np.mean([result[key] for result in results]).item() for key in scores}
        row = {"mode": mode, "modality": modality, "label": subject.cfg.data.label, **results[0], **mean}
        rows.append(evaluation.write_result(subject, f"{mode}-{modality}", {**row, "divisions": results}))
    for row in rows:  # how many were judged, of how many
        row["train_videos"] = f"{row['train_videos']} of {row['train_files']}"
        row["videos"] = f"{row['videos']} of {row['files']}"
    evaluation.print_table(rows, ("modality", "label", "train_videos", "videos", *scores))


def measure(subject, train_table, test_table, modality, mode):
    """What one modality knows of all files that have it: scores and counts; and the tested Features."""
    evaluation.calibrate_batch_norm(subject, train_table, (modality,))
    if mode in TRAINED:
        return TRAINED[mode](subject, train_table, test_table, modality, subject.out), None
    train, test = (evaluation.features_of(subject, table, modality) for table in (train_table, test_table))
    train_y, test_y = train_table.labels[train.index], test_table.labels[test.index]
    known = (train.features[modality], train_y, test.features[modality], test_y, subject.cfg.seed)
    result = evaluation.few_shot(*known) if mode == "fewshot" else evaluation.linear_probe(*known, mode)
    skipped = len(train.failures) + len(test.failures)
    return {"train_videos": len(train_y), "videos": len(test_y), "skipped": skipped, **result}, test


def save(path, table, found):
    """Write the Features of each modality as one .npz, with labels, paths and the part of each file that was
    used (start_s, end_s); NaN where a video lacks a modality."""
    rows = np.unique(np.concatenate([part.index for part in found.values()]))
    failures = {row: reason for part in found.values() for row, reason in part.failures.items()}
    whole = evaluation.Features(rows, failures=failures)
    for modality, part in found.items():
        for what in ("features", "embeddings"):
            known = getattr(part, what)[modality]  # n×K×D
            filled = np.full((len(rows), *known.shape[1:]), np.nan, known.dtype)
            filled[np.searchsorted(rows, part.index)] = known
            getattr(whole, what)[modality] = filled
    of = {"paths": np.array(table.paths)[rows], "start_s": table.start_s[rows], "end_s": table.end_s[rows]}
    whole.save(path, labels=table.labels[rows], classes=table.classes, **of)


def can_save(arguments, divisions):
    """Raise ConfigError where --save asks for what there is not, or would overwrite a file."""
    path = Path(arguments.save)
    if arguments.mode in TRAINED:
        raise config.ConfigError(
            f"--save {path} cannot be written: there are no frozen features with --mode {arguments.mode}"
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
