"""What a run made of its data: the weights of faulty and of true pairs, and the clips of the temporal tasks.

    python -m avid weights runs/faulty            the weights of both, and how well they tell them apart
    python -m avid tasks --cfg toy_temporal       clips as the temporal tasks take them, with their labels

In: a run folder, or a configuration. Out: PNG files.
"""

import argparse
from pathlib import Path

from avid import config
from avid.cli import Help


def command_line(argv=None):
    """The arguments, of which cfg is the configuration itself. Ends the program where they cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m avid", description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("weights", help="weights of faulty and of true pairs")
    command.add_argument("run", help="folder of a run with toy.faulty above 0")
    command = commands.add_parser("tasks", help="clips of the temporal tasks")
    command.add_argument("--cfg", default="toy_temporal", help="configuration (default: toy_temporal)")
    command.add_argument("--out", default="tasks.png", help="picture to write (default: tasks.png)")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    arguments = parser.parse_args(argv)
    if arguments.command == "tasks":
        try:
            arguments.cfg = config.load(arguments.cfg, arguments.overrides)
            if arguments.cfg.temporal.moments != 2:
                raise config.ConfigError("the order of two clips can only be shown with temporal.moments=2")
        except config.ConfigError as error:
            config.stop(error)
    return arguments


def weights(folder, path, root=None):
    """Draw histograms of agreement and weight of a toy run's true and faulty training pairs.

    → AUROC of the weights, true against faulty pairs. Which pairs are faulty is in the manifest, which
    training never sees. Raises CheckpointError, and ConfigError where no pair is faulty.
    """
    import numpy as np  # here: --help and a wrong argument answer without the heavy imports
    from sklearn.metrics import roc_auc_score

    from avid import datasets, losses, memory_bank, run, toy

    from .figures import plt, write

    saved = run.load_checkpoint(Path(folder) / "last.pt")
    if lacking := {"config", "bank"} - saved.keys():
        raise run.CheckpointError(
            f"{Path(folder) / 'last.pt'} is no checkpoint of train.py, it lacks {min(lacking)}"
        )
    cfg = config.load(None, [f"data.root={root}"] if root else [], base=saved["config"])
    if not datasets.DATA[cfg.data.name].written or not cfg.toy.faulty:
        raise config.ConfigError(
            f"{folder} is a run without known faulty pairs; train on the toy with toy.faulty=0.3"
        )
    sizes = saved["videos"]["count"], cfg.model.embedding
    bank = memory_bank.MemoryBank(*sizes, cfg.bank.momentum, cfg.seed, cfg.bank.dtype)
    run.load_part(bank, saved["bank"], folder)
    table = datasets.load(toy.source(cfg, workers=1), "train")
    faulty = np.array(table.columns["faulty"]) == "1"
    if not faulty.any():
        raise config.ConfigError(f"{table.name} has no faulty pairs; raise toy.faulty")
    w_min = cfg.loss.w_min if cfg.loss.w_min < 1 else 0.25
    mean, std = bank.agreement_mean_std()
    weight = losses.faulty_positive_weights(
        bank.agreement, mean, std, w_min, cfg.loss.delta, cfg.loss.kappa
    ).numpy()
    auroc = float(roc_auc_score(~faulty, weight))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, values, title in zip(
        axes, (bank.agreement.numpy(), weight), ("agreement of the memories", "weight"), strict=True
    ):
        bins = np.linspace(values.min(), values.max(), 30)
        for part, name, colour in ((~faulty, "true pairs", "tab:blue"), (faulty, "faulty pairs", "tab:red")):
            axis.hist(
                values[part], bins, alpha=0.6, density=True, label=f"{name} ({part.sum()})", color=colour
            )
        axis.set(xlabel=title, yticks=[])
        axis.legend(fontsize=8)
    figure.suptitle(f"{Path(folder).name}: AUROC {auroc:.3f}", fontsize=10, parse_math=False)
    write(figure, path)
    return auroc


def tasks(cfg, path, row=0, draws=6):
    """Draw pairs of clips as the temporal tasks take them from one training video, with their labels."""
    import numpy as np

    from avid import data, evaluation, temporal_tasks

    from .figures import plt, write

    train, _ = next(evaluation.tables(cfg))
    clips, rng = data.Clips(train, cfg, training=False), np.random.default_rng(cfg.seed)
    figure, axes = plt.subplots(2 * draws, 2, figsize=(11, 1.9 * draws), layout="constrained")
    with clips.open(row) as media:
        first_s, last_s = clips.usable(media)
        if last_s - first_s < 2 * cfg.temporal.speeds[0] * clips.length_s:
            raise data.MediaError(
                f"{train.root / train.paths[row]} is too short for two clips of {clips.length_s:g} s"
            )
        for draw in range(draws):
            labels = {"order": None}
            while labels["order"] != draw % 3:  # as many of each order
                pair, labels = temporal_tasks.plan(first_s, last_s, clips.length_s, cfg.temporal, rng)
            for column, clip in enumerate(pair):
                picture, sound = axes[2 * draw, column], axes[2 * draw + 1, column]
                frames = clips.picture(media, clip, rng)  # 3×T×S×S
                picture.imshow(frames.permute(2, 1, 3, 0).flatten(1, 2))  # S×T·S×3
                loud = clips.loudness(media, clip, rng)[0]  # F×bins
                sound.imshow(loud.T, origin="lower", aspect="auto", cmap="magma")
                end_s = clip.start_s + clip.speed * clips.length_s
                way = "backward" if clip.backward else "forward"
                picture.set_title(f"{clip.speed}×, {way}: {clip.start_s:.1f} to {end_s:.1f} s", fontsize=9)
                for axis in (picture, sound):
                    axis.set(xticks=[], yticks=[])
            axes[2 * draw, 0].set_ylabel(f"order:\n{temporal_tasks.ORDERS[draw % 3]}", fontsize=9)
    write(figure, path, dpi=64)


def main(argv=None):
    arguments = command_line(argv)
    from avid import evaluation

    from .figures import check_picture

    with evaluation.plain_errors():
        if arguments.command == "weights":
            path = Path(arguments.run) / "weights.png"
            print(f"AUROC of true against faulty pairs: {weights(arguments.run, path):.3f}; written: {path}")
        else:
            check_picture(arguments.out)
            tasks(arguments.cfg, arguments.out)
            print(f"written: {arguments.out}")
