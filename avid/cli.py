"""What the scripts are asked, and what can be refused before torch is imported, anything is written or a
worker started.

In: a command line; the settings of a training and, once its lists are read, the number of videos.
Out: arguments or a configuration; or a ConfigError of one line.
"""

import argparse
import difflib
import importlib.util
import os
import re
from pathlib import Path

from . import config, datasets
from .files import ConfigError, check_folder

EVALUATED = ("seed", "data", "video", "audio", "model", "eval", "finetune", "toy")  # groups of settings
RUN_FILES = ("config.yaml", "metrics.jsonl", "curves.png", "temporal.png", "trace.json")


class CommandLine(argparse.ArgumentParser):
    """Options and settings in any order; an unknown option names the nearest right one."""

    def parse_args(self, args=None, namespace=None):
        return self.parse_intermixed_args(args, namespace)

    def error(self, message):
        options = [option for action in self._actions for option in action.option_strings]
        for unknown in re.findall(r"--[\w-]+", message) if "unrecognized" in message else ():
            near = {"--config": "--cfg"}.get(unknown) or next(
                iter(difflib.get_close_matches(unknown, options, 1)), None
            )
            message += f"; did you mean {near}?" if near else ""
        super().error(message)


def positive(text):
    """The type of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, width=120, max_help_position=30)


def parser(description, evaluation=False):
    """A command line of --cfg, --out, --data, --root and key=value; its help lists the settings."""
    lines = [
        f"  {key + '=' + str(default).replace(' ', ''):42s} {help}"
        for key, default, help in config.settings()
        if not evaluation or key.partition(".")[0] in EVALUATED
    ]
    title = "settings (key=default; of a checkpoint, its own)" if evaluation else "settings (key=default)"
    epilog = f"{title}:\n" + "\n".join(lines)
    arguments = CommandLine(description=description, formatter_class=Help, epilog=epilog)
    names = ", ".join(sorted(path.stem for path in config.PACKAGED.glob("*.yaml")))
    default = "the checkpoint's own" if evaluation else "toy"
    arguments.add_argument(
        "--cfg", metavar="FILE", help=f"a YAML file, or one of {names} (default: {default})"
    )
    what = (
        "folder of the results (default: the checkpoint's)"
        if evaluation
        else "run folder; the same as out=DIR"
    )
    arguments.add_argument("--out", metavar="DIR", help=what)
    arguments.add_argument("--data", metavar="NAME", help="the same as data.name=NAME")
    arguments.add_argument("--root", metavar="DIR", help="the same as data.root=DIR")
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    return arguments


def evaluation_parser(description):
    """A command line as `parser`'s, with the checkpoint to evaluate and the part of the data."""
    arguments = parser(description, evaluation=True)
    what = "a checkpoint; random: an untrained network"
    arguments.add_argument("--ckpt", required=True, metavar="PATH|random", help=what)
    numbered = ", ".join(name for name, row in datasets.DATA.items() if row.divisions)
    what = f"evaluated part: test, val, …; of {numbered}: 1, 2, … or all, their mean"
    arguments.add_argument("--split", metavar="S", help=what)
    return arguments


def overrides(arguments):
    """The settings that the options stand for, then those given as key=value."""
    given = {
        "data.name": arguments.data,
        "data.root": arguments.root,
        "data.split": getattr(arguments, "split", None),
    }
    return [f"{key}={value}" for key, value in given.items() if value is not None] + arguments.overrides


def training(description, argv=None):
    """The configuration that a command line of train.py asks for. Ends the program where it cannot be
    used."""
    arguments = parser(description).parse_args(argv)
    try:
        out = [f"out={arguments.out}"] if arguments.out else []
        cfg = config.load(arguments.cfg or "toy", overrides(arguments) + out)
        if datasets.DATA[cfg.data.name].written:  # else lists tell the number of videos, when they are read
            fits(cfg, cfg.toy.train, int(os.environ.get("WORLD_SIZE", 1)))
        config.band_statistics(cfg.audio)
        if cfg.init and not Path(cfg.init).is_file():
            raise ConfigError(f"init: no checkpoint {cfg.init}")
        if cfg.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "log.tensorboard=true needs the package: pip install tensorboard, or leave it out"
            )
        check_run_folder(cfg)
    except ConfigError as error:
        config.stop(error)
    return cfg


def evaluation(parser, argv=None):
    """The arguments of an evaluation. Ends the program where their checkpoint is no file that can be read."""
    arguments = parser.parse_args(argv)
    if arguments.ckpt != "random":
        try:
            open(arguments.ckpt, "rb").close()
        except FileNotFoundError:
            config.stop(f"no checkpoint {arguments.ckpt}")
        except OSError as error:
            config.stop(f"cannot read the checkpoint {arguments.ckpt}: {error.strerror}")
    return arguments


def fits(cfg, videos, processes=1):
    """Raise ConfigError where training cannot be done on so many videos, by so many processes."""
    batch, contrast, weights = cfg.optim.batch_size, cfg.contrast, vars(cfg.weights)
    if not any(weights.values()):
        raise ConfigError(
            "all weights.* are 0, so that there is nothing to learn; set one, such as weights.xid=1"
        )
    if "video" not in datasets.row(cfg.data).modalities:
        pictures = [name for name, weight in weights.items() if weight and "video" in config.needs(name)]
        if pictures or cfg.data.need != "any":
            need = f"weights.{pictures[0]}={weights[pictures[0]]:g}" if pictures else "data.need=both"
            raise ConfigError(
                f"data.name={cfg.data.name} has no pictures, and {need} needs them; choose another data set, "
                "or data.need=any and terms of sound alone, such as weights.contrast_aa"
            )
    if weights["cma"] and not cfg.init and not cfg.loss.warmup_epochs:
        raise ConfigError(
            "weights.cma needs a bank that has learned: init=CHECKPOINT of a run on the same videos, "
            "or loss.warmup_epochs"
        )
    if weights["cma"] and cfg.agreement.positives + 1 >= videos:
        raise ConfigError(
            f"agreement.positives={cfg.agreement.positives} leaves no negatives among {videos} videos; "
            "lower it"
        )
    if batch > videos:
        raise ConfigError(
            f"optim.batch_size={batch} is larger than the data set of {videos} videos; lower it"
        )
    clips = cfg.data.clips_per_open
    if batch % (processes * clips):
        sharing = f"{processes} processes" + f", {clips} clips a file" * (clips > 1)
        raise ConfigError(
            f"optim.batch_size={batch} cannot be shared evenly by {sharing}; make it a multiple of "
            f"{processes * clips}"
        )
    if cfg.data.need == "any" and cfg.optim.sync_bn and processes > 1:
        raise ConfigError(
            "data.need=any cannot be had with optim.sync_bn=true and several processes, of which one may get "
            "a batch without pictures or sound; set optim.sync_bn=false"
        )
    if batch // processes % cfg.optim.accumulate:
        raise ConfigError(
            f"optim.accumulate={cfg.optim.accumulate} does not divide the {batch // processes} videos of a "
            "process; choose a divisor"
        )
    seen = batch // processes // cfg.optim.accumulate * cfg.temporal.moments  # clips, by batch norm at once
    if seen == 1 and cfg.model.head_norm == "batch" and not (cfg.optim.sync_bn and processes > 1):
        raise ConfigError(
            "model.head_norm=batch needs two clips at once; raise optim.batch_size, or lower "
            "optim.accumulate or the number of processes"
        )
    contrasts = any(weight for name, weight in weights.items() if name.startswith("contrast"))
    among = min(contrast.sample or videos, videos)
    if contrasts and contrast.k_pos + 1 >= among:
        raise ConfigError(
            f"contrast.k_pos={contrast.k_pos} leaves no negatives among {among} videos; lower it"
        )
    if datasets.DATA[cfg.data.name].written:  # its videos are all of one length
        clip_s = max(cfg.video.frames / cfg.video.fps, cfg.audio.seconds)
        room_s = cfg.toy.seconds - cfg.audio.n_fft / cfg.audio.rate_hz
        slow, *faster = cfg.temporal.speeds
        needs_s = {
            "order": 2 * slow * clip_s,
            "direction": slow * clip_s,
            "speed": min(faster or [slow]) * clip_s,
        }
        for task, needed_s in needs_s.items():
            wanted = [name for name, weight in weights.items() if weight and name.startswith(task)]
            if wanted and needed_s > room_s:
                raise ConfigError(
                    f"weights.{wanted[0]}={weights[wanted[0]]} needs {needed_s:g} s of every video, and "
                    f"{room_s:g} s of "
                    "the toy's can be used; raise toy.seconds, or lower audio.seconds and video.frames"
                )


def check_run_folder(cfg):
    """Raise ConfigError where a run cannot write into cfg.out, would overwrite files that train.py did not
    write, or would go on with a run of other settings.

    Empty files are what an interrupted run may leave. The checkpoint itself is judged when it is loaded.
    """
    check_folder(cfg.out)
    out, mark = Path(cfg.out), config.WRITTEN.encode()
    settings = out / "config.yaml"
    written = settings.is_file() and settings.read_bytes()[: len(mark)] == mark
    if any((out / name).exists() for name in ("last.pt", "last.previous.pt")):
        if written:
            try:
                before = config.load(settings)
            except ConfigError:  # of another version: its checkpoint says what is wrong
                return
            config.same_run(before, cfg)
        return
    there = [name for name in RUN_FILES if (out / name).exists() and (out / name).stat().st_size]
    if there and not written:
        raise ConfigError(f"{out} holds {there[0]}, which train.py did not write there; choose another --out")
