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

from avid import config

MODES = ("linear", "svm", "fewshot", "finetune")


def command_line(argv=None):
    arguments = config.evaluation_parser(__doc__)
    arguments.add_argument("--modality", choices=("video", "audio"), help="default: what the data set has, both if it can")
    arguments.add_argument("--mode", choices=MODES, default="linear", help="default: linear")
    arguments.add_argument(
        "--save", metavar="FILE.npz", help="also write features, embeddings, labels and paths of the evaluated part"
    )
    return arguments.parse_args(argv)


if __name__ == "__main__":  # before the heavy imports: --help and a wrong argument answer at once
    arguments = command_line()

import numpy as np

from avid import distributed, evaluation, finetune


def main(arguments):
    subject = evaluation.subject(arguments)
    modalities = (arguments.modality,) if arguments.modality else evaluation.modalities_of(subject.cfg)
    divisions = {modality: [] for modality in modalities}
    for train_table, test_table in evaluation.tables(subject.cfg):
        print(f"{train_table.report()}\n{test_table.report()}")
        evaluation.settle(subject, train_table, modalities)
        if arguments.mode == "finetune":
            for modality in modalities:
                divisions[modality].append(finetune.finetune(subject, train_table, test_table, modality, subject.out))
            continue
        train, test = (evaluation.features(subject, table, modalities) for table in (train_table, test_table))
        train_y, test_y = evaluation.labels_of(train_table, train), evaluation.labels_of(test_table, test)
        counts = {"train_videos": len(train_y), "videos": len(test_y), "skipped": len(train.failures) + len(test.failures)}
        for modality in modalities:
            known = (train.features[modality], train_y, test.features[modality], test_y, subject.cfg.seed)
            if arguments.mode == "fewshot":
                result = evaluation.few_shot(*known)
            else:
                result = evaluation.linear_probe(*known, arguments.mode)
            divisions[modality].append({**counts, **result})
        if arguments.save:
            test.save(arguments.save, labels=test_y, classes=test_table.classes, paths=np.array(test_table.paths)[test.index])

    first = distributed.rank() == 0
    distributed.end()
    if not first:
        return
    rows = []
    for modality in modalities:
        scores = [key for key in divisions[modality][0] if key.endswith(("top1", "top5", "std"))]
        mean = {key: np.mean([d[key] for d in divisions[modality]]).item() for key in scores}
        row = {"mode": arguments.mode, "modality": modality, "label": subject.cfg.data.label, **divisions[modality][0], **mean}
        rows.append(evaluation.write_result(subject, f"{arguments.mode}-{modality}", {**row, "divisions": divisions[modality]}))
    evaluation.print_table(rows, ("modality", "label", "train_videos", "videos", *scores))


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(arguments)
