"""What can be known to fail before anything is written, or any worker is started.

In: the settings of a training, the folder that it shall write into, and, once its lists are read, the number of videos.
Out: nothing, or a ConfigError of one line.
"""

import os
from pathlib import Path

from . import config
from .config import ConfigError

RUN_FILES = ("config.yaml", "metrics.jsonl", "curves.png", "temporal.png", "trace.json")


def command_line(description, argv=None):
    """The configuration that a training command line asks for. Ends the program where it cannot be used."""
    arguments = config.parser(description).parse_args(argv)
    try:
        cfg = config.load(arguments.cfg or "toy", arguments.overrides + ([f"out={arguments.out}"] if arguments.out else []))
        if cfg.data.name == "toy":  # of other data sets the number of videos is known when their lists are read
            fits(cfg, cfg.toy.train, int(os.environ.get("WORLD_SIZE", 1)))
        check_run_folder(cfg.out)
    except ConfigError as error:
        config.stop(error)
    return cfg


def fits(cfg, videos, world=1):
    """Raise ConfigError where training cannot be done on so many videos, by `world` processes."""
    batch, contrast, weights = cfg.optim.batch_size, cfg.contrast, vars(cfg.weights)
    if cfg.data.name in config.SOUND_ONLY:
        raise ConfigError(f"data.name={cfg.data.name} has no pictures, and training needs them; choose another data set")
    if not any(weights.values()):
        raise ConfigError("all weights.* are 0, so that there is nothing to learn; set one, such as weights.xid=1")
    if batch > videos:
        raise ConfigError(f"optim.batch_size={batch} is larger than the data set of {videos} videos; lower it")
    if batch % world:
        raise ConfigError(f"optim.batch_size={batch} cannot be shared evenly by {world} processes; make it a multiple of {world}")
    if any(weight for name, weight in weights.items() if name.startswith("contrast")) and contrast.k_pos + 1 >= videos:
        raise ConfigError(f"contrast.k_pos={contrast.k_pos} leaves no negatives among {videos} videos; lower it")
    if cfg.data.name == "toy":  # its videos are all of one length
        clip_s = max(cfg.video.frames / cfg.video.fps, cfg.audio.seconds)
        room_s = cfg.toy.seconds - cfg.audio.n_fft / cfg.audio.rate_hz
        slow, *faster = cfg.temporal.speeds
        needs_s = {"order": 2 * slow * clip_s, "direction": slow * clip_s, "speed": min(faster or [slow]) * clip_s}
        for task, needed_s in needs_s.items():
            wanted = [name for name, weight in weights.items() if weight and name.startswith(task)]
            if wanted and needed_s > room_s:
                raise ConfigError(
                    f"weights.{wanted[0]}={weights[wanted[0]]} needs {needed_s:g} s of every video, and {room_s:g} s of the toy's can be "
                    "used; raise toy.seconds, or lower audio.seconds and video.frames"
                )


def check_folder(out):
    """Raise ConfigError where files cannot be written into the folder `out`, which need not exist."""
    out = Path(out)
    try:
        there = next(place for place in (out, *out.absolute().parents) if place.exists())
        usable = os.access(there, os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:  # too long a name, a NUL
        raise ConfigError(f"cannot write into {str(out)!r}: {getattr(error, 'strerror', error)}; choose another folder") from None
    if not there.is_dir():
        raise ConfigError(f"cannot write into {out}: {there} is a file; choose another folder")
    if not usable:
        raise ConfigError(f"cannot write into {out}: no permission to write into {there}; choose another folder")


def check_run_folder(out):
    """Raise ConfigError where a run cannot write into `out`, or would overwrite files that train.py did not write.

    A folder with a checkpoint is judged by what that holds, when it is loaded. Empty files are what a killed run may leave.
    """
    check_folder(out)
    out, mark = Path(out), config.WRITTEN.encode()
    there = [name for name in RUN_FILES if (out / name).exists() and (out / name).stat().st_size]
    if not there or any((out / name).exists() for name in ("last.pt", "last.previous.pt")):
        return
    settings = out / "config.yaml"
    if not (settings.is_file() and settings.read_bytes()[: len(mark)] == mark):
        raise ConfigError(f"{out} holds {there[0]}, which train.py did not write there; choose another --out")
