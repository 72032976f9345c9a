"""What the features know: a linear probe on a frozen network.

python eval_linear.py --ckpt runs/toy/last.pt                             kind of the toy's things, by picture and by sound
python eval_linear.py --ckpt random                                       the floor: an untrained network
python eval_linear.py --ckpt last.pt --data ucf101 --root /data/ucf101 --split all --modality video
"""

from avid import config

MODES = ("linear",)


def command_line(argv=None):
    arguments = config.evaluation_parser(__doc__)
    arguments.add_argument("--modality", choices=("video", "audio"), help="default: both")
    arguments.add_argument("--mode", choices=MODES, default="linear", help="default: linear")
    return arguments.parse_args(argv)


if __name__ == "__main__":  # before the heavy imports: --help and a wrong argument answer at once
    arguments = command_line()

import numpy as np

from avid import evaluation


def main(arguments):
    subject = evaluation.subject(arguments)
    modalities = (arguments.modality,) if arguments.modality else evaluation.modalities_of(subject.cfg)
    divisions = {modality: [] for modality in modalities}
    for train_table, test_table in evaluation.tables(subject.cfg):
        print(f"{train_table.report()}\n{test_table.report()}")
        if subject.name == "random":
            evaluation.settle(subject.network, train_table, subject.cfg, subject.device, modalities)
        train, test = (evaluation.features(subject, table, modalities) for table in (train_table, test_table))
        train_y, test_y = evaluation.labels_of(train_table, train), evaluation.labels_of(test_table, test)
        counts = {"train_videos": len(train_y), "videos": len(test_y), "skipped": len(train.failures) + len(test.failures)}
        for modality in modalities:
            x, z = train.features[modality], test.features[modality]
            divisions[modality].append({**counts, **evaluation.linear_probe(x, train_y, z, test_y, subject.cfg.seed)})

    rows = []
    for modality in modalities:
        mean = {key: np.mean([d[key] for d in divisions[modality]]).item() for key in ("top1", "top5", "clip_top1")}
        row = {"mode": arguments.mode, "modality": modality, "label": subject.cfg.data.label, **divisions[modality][0], **mean}
        rows.append(evaluation.write_result(subject, f"{arguments.mode}-{modality}", {**row, "divisions": divisions[modality]}))
    evaluation.print_table(rows, ("modality", "label", "train_videos", "videos", "top1", "top5", "clip_top1"))


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(arguments)
