"""The settings of a run: every one with its default, its unit and its source.

In: a YAML file that states what differs from the defaults here, and `key=value` overrides.
Out: a `Config`. A wrong key, type or value raises `ConfigError`, one line that names the nearest right key.

Sources: [P] the papers, [A] the public AVID-CMA code, [F] published follow-up work, [C] our choice; docs/method.md explains.
"""

import argparse
import dataclasses
import difflib
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

PACKAGED = Path(__file__).parent / "configs"
DATA_SETS = ("toy", "folder", "manifest", "kinetics400", "kinetics600", "kinetics700", "vggsound", "audioset")
DATA_SETS += ("ucf101", "hmdb51", "esc50")
SOUND_ONLY = ("esc50",)  # data sets without pictures
TOY_LABELS = ("label", "motion", "tempo", "faulty", "sound", "pitch_hz")  # columns of the toy's manifest that can be the class
BACKBONES = ("avid", "r2plus1d_18", "r3d_18", "s3d")
WRITTEN = "# settings of a run, written by train.py; the run folder is known by this line\n"


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that says which and what to do."""

    def __init__(self, message):
        super().__init__(str(message).replace("\n", "\\n"))  # what was given may have several


def setting(default, help):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Data:
    name: str = setting("toy", f"data set: {', '.join(DATA_SETS)}")
    root: str = setting("data", "folder of the data set; the toy is written into a folder of its own below it")
    split: str = setting("", "part to read; empty: the data set's own train (test for evaluation)")
    label: str = setting("label", "column of the manifest that is the class (evaluation only)")
    subset: str = setting("", "esc10: the 10 classes of ESC-10 of data set esc50; empty: the whole data set")
    workers: int = setting(8, "decoding processes a rank; 0: none, and a decoder that hangs or dies is the end of the run [C]")
    timeout_s: float = setting(60.0, "s; a file on which a decoding process takes longer, twice, is given up [C]")
    in_memory: bool = setting(False, "each process keeps what it decoded, whole and as it is: for small data sets [C]")
    max_bad_share: float = setting(0.1, "stop when more than this share of the drawn files cannot be used [C]")


@dataclass
class Video:
    frames: int = setting(8, "frames a clip [A]")
    fps: float = setting(16.0, "frames a second of the clip, whatever the file's [A]")
    size: int = setting(112, "side of the square clip, pixels [A: 224; C: 112]")
    crop_area: list[float] = setting([0.08, 1.0], "area of the random crop, share of the frame [A]")
    crop_ratio: list[float] = setting([0.75, 1.3333], "width / height of the random crop [A]")
    flip: float = setting(0.5, "probability of a horizontal flip [A]")
    jitter: list[float] = setting([0.4, 0.4, 0.4, 0.2], "strength of brightness, contrast, saturation, hue [A]")
    grey: float = setting(0.0, "probability of a clip without colour. temporal: 0.2 [C]")


@dataclass
class Audio:
    seconds: float = setting(2.0, "length of the sound clip, s [A]")
    rate_hz: int = setting(24000, "sample rate, Hz [A]")
    frames_per_s: int = setting(100, "spectrogram columns a second [A]")
    n_fft: int = setting(512, "window and FFT length, samples: 257 linear bins [A]")
    mels: int = setting(80, "mel bands; 0: the linear bins [C; A: linear]")
    volume: float = setting(0.1, "random gain, ± this share [A]")
    mask_time: float = setting(0.0, "widest masked stretch, share of the columns. temporal: 0.2 [C]")
    mask_frequency: float = setting(0.0, "widest masked band, share of the bins. temporal: 0.2 [C]")


@dataclass
class Temporal:
    moments: int = setting(1, "clips a video: 1, or 2, which order and the contrast within a modality need [P]")
    speeds: list[int] = setting([1], "playback speeds, drawn equally often. temporal: 1, 2, 4, 8 [C]")
    reverse: bool = setting(False, "half of the clips run backwards [P]")


@dataclass
class Model:
    video: str = setting("avid", f"video network: {', '.join(BACKBONES)} (all but avid are torchvision's) [A]")
    width: int = setting(64, "channels of the stem; features are 8 × this [A]")
    depth: int = setting(2, "residual blocks a stage of the video network [A]")
    embedding: int = setting(128, "D, dimensions of the embeddings [A]")
    head_norm: str = setting("none", "none [A], or batch: batch norm in the heads and at their end [C]")


@dataclass
class Bank:
    momentum: float = setting(0.5, "m: memory ← m · memory + (1 − m) · embedding [A]")
    num_negatives: int | str = setting(1024, "K, negatives drawn a step and shared by the batch; all: every instance [A]")
    dtype: str = setting("float32", "what memories are stored as: float32 [A], float16, bfloat16 [C]")
    spread: bool = setting(False, "each rank holds a part of the bank instead of all of it, docs/scaling.md [C]")


@dataclass
class Loss:
    temperature: float = setting(0.07, "τ [A]")
    w_min: float = setting(1.0, "least weight of a faulty positive; 1: weights off. robust: 0.25 [F]")
    delta: float = setting(0.0, "δ: the weights' threshold is μ + δσ [F]")
    kappa: float = setting(0.5, "κ: the weights' variance is κσ² [F]")
    soft: float = setting(0.0, "λ, share of the soft target; 0: one-hot. robust: 0.5 [F]")
    estimator: str = setting("cycle", "soft target: bootstrap, swapped, neighbor, cycle [P]")
    tau_s: float = setting(0.02, "τ_s of the soft targets [F]")
    tau_t: float = setting(0.07, "τ_t of the cycle's outer steps [F]")
    warmup_epochs: int = setting(0, "epochs of plain xID before weights and soft targets [C]")


@dataclass
class Contrast:
    temperature: float = setting(0.07, "τ of the contrast between clips [C]")
    n_pos: int = setting(4, "positives from the bank besides the usual one; 0: none [C]")
    k_pos: int = setting(32, "they are drawn from the k nearest memories, which are never negatives [C]")
    tau_p: float = setting(0.1, "τ_p: drawn with probability ∝ exp(sim/τ_p) [C]")
    negatives: int = setting(1024, "negatives drawn for each instance [C]")
    tau_n: float = setting(float("inf"), "τ_n: drawn with probability ∝ exp(sim/τ_n); .inf: uniformly, smaller: harder [C]")


@dataclass
class Weights:
    xid: float = setting(1.0, "cross-modal instance discrimination, plain or robust [P]")
    contrast_vv: float = setting(0.0, "contrast of the two moments' video clips, (v, v') [P]")
    contrast_aa: float = setting(0.0, "contrast of the two moments' audio clips, (a, a') [P]")
    contrast_va: float = setting(0.0, "contrast of a video clip with sounds, (v, a) [P]")
    contrast_av: float = setting(0.0, "contrast of an audio clip with videos, (a, v) [P]")
    speed_video: float = setting(0.0, "playback speed of a video clip [P]")
    speed_audio: float = setting(0.0, "playback speed of an audio clip [P]")
    direction_video: float = setting(0.0, "direction of a video clip [P]")
    direction_audio: float = setting(0.0, "direction of an audio clip [P]")
    order_video: float = setting(0.0, "order of two video clips, (v, v') [P]")
    order_audio: float = setting(0.0, "order of two audio clips, (a, a') [P]")
    order_cross: float = setting(0.0, "order of a video clip and an audio clip, (v, a') and (a, v') [P]")


@dataclass
class Optim:
    epochs: int = setting(200, "epochs; one is N / batch_size steps [C; A: 400]")
    batch_size: int = setting(256, "clips a step over all ranks [A]")
    draws: str = setting("epoch", "epoch: shuffled passes [A]; iid: instances drawn independently, with replacement [C]")
    lr: float = setting(2e-4, "learning rate of Adam [A]")
    weight_decay: float = setting(1e-5, "L2 penalty of Adam [A]")
    schedule: str = setting("cosine", "after the warm-up: cosine [C], steps, or constant [A]")
    warmup_epochs: float = setting(5.0, "epochs of linear warm-up [C]")
    milestones: list[float] = setting([0.5, 0.75], "schedule=steps: shares of the run after which lr is multiplied by gamma [C]")
    gamma: float = setting(0.1, "factor of schedule=steps [C]")
    max_bad_steps: int = setting(10, "stop when so many steps in a row are not finite [C]")
    clip_grad: float = setting(0.0, "largest norm of the gradient; 0: no clipping [C]")
    amp: str = setting("bf16", "autocast on CUDA: bf16, fp16 (with loss scaling) or none; CPU always float32 [C]")
    compile: bool = setting(False, "torch.compile the network [C]")
    checkpoint_activations: bool = setting(False, "backward computes the video network again: less memory, more time [C]")
    sync_bn: bool = setting(True, "batch statistics over all ranks [C]")


@dataclass
class Finetune:
    epochs: int = setting(160, "passes over the labelled videos, one clip each, by the whole network [A: 16 of 10 clips]")
    warmup_epochs: int = setting(50, "passes before them that train the classifier alone [A: 5 of 10 clips]")
    batch_size: int = setting(64, "clips a step over all ranks [A; of 32 frames: 32]")
    lr: float = setting(1e-4, "learning rate of Adam [A]")
    weight_decay: float = setting(0.0, "L2 penalty of Adam [A]")
    milestones: list[float] = setting([0.375, 0.625, 0.875], "shares of the epochs after which lr is multiplied by gamma [A]")
    gamma: float = setting(0.3, "factor at the milestones [A]")
    dropout: float = setting(0.5, "probability that a feature is dropped before the classifier [A]")


@dataclass
class Log:
    every_steps: int = setting(20, "steps between two lines of metrics.jsonl")
    check_epochs: int = setting(5, "epochs between two checks on held-out videos; 0: none")
    check_videos: int = setting(2000, "held-out videos a check looks at, at most")
    checkpoint_minutes: float = setting(10.0, "minutes between two checkpoints within an epoch")


@dataclass
class Eval:
    clips: int = setting(10, "clips a video, evenly spaced [A]")
    crop: float = setting(0.875, "side of the central crop, share of the short side [A]")
    batch_size: int = setting(64, "videos a forward pass")
    settle_batches: int = setting(20, "batches that set an untrained network's batch-norm statistics [C]")


@dataclass
class Toy:
    train: int = setting(800, "training videos")
    test: int = setting(300, "test videos")
    seconds: float = setting(6.0, "length of a video, s")
    size: int = setting(64, "side of a video, pixels")
    fps: int = setting(16, "frames a second")
    rate_hz: int = setting(16000, "sample rate of the sound, Hz")
    faulty: float = setting(0.0, "share of training videos whose sound does not belong to them")


@dataclass
class Config:
    seed: int = setting(0, "decides everything random, the toy data included")
    out: str = setting("", "run folder; empty: runs/<name of the configuration>")
    profile: bool = setting(False, "trace a few steps of training with torch's profiler")
    data: Data = field(default_factory=Data)
    video: Video = field(default_factory=Video)
    audio: Audio = field(default_factory=Audio)
    model: Model = field(default_factory=Model)
    bank: Bank = field(default_factory=Bank)
    loss: Loss = field(default_factory=Loss)
    temporal: Temporal = field(default_factory=Temporal)
    contrast: Contrast = field(default_factory=Contrast)
    weights: Weights = field(default_factory=Weights)
    optim: Optim = field(default_factory=Optim)
    finetune: Finetune = field(default_factory=Finetune)
    log: Log = field(default_factory=Log)
    eval: Eval = field(default_factory=Eval)
    toy: Toy = field(default_factory=Toy)


def settings(schema=Config, prefix=""):
    """Every setting as (dotted key, default, help)."""
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            yield from settings(f.type, f"{prefix}{f.name}.")
        else:
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            yield prefix + f.name, default, f.metadata["help"]


TEXTS = {key for key, default, _ in settings() if isinstance(default, str)}
GROUPS = {  # name of a group: its first setting
    f.name: f"{f.name}.{dataclasses.fields(f.type)[0].name}"
    for f in dataclasses.fields(Config)
    if dataclasses.is_dataclass(f.type)
}


def load(name="toy", overrides=(), base=None):
    """The configuration `name` (a path, or a packaged name with or without .yaml) with `key=value` overrides.

    `base`: a dict of settings to start from instead of a file (an evaluation starts from its checkpoint's).
    Raises ConfigError.
    """
    layers = [] if base is None else [_layer(base)]
    if name:
        layers.append(_read(name))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or "" in key.split("."):
            raise ConfigError(f"{override} is no setting; write key=value, --help lists the keys")
        try:
            if key in TEXTS:  # as it is: YAML would end a folder's name at a # and take ~ for nothing
                layers.append(OmegaConf.create())
                OmegaConf.update(layers[-1], key, value)
            else:
                layers.append(OmegaConf.from_dotlist([override]))
        except Exception as error:  # the YAML parser's own errors
            raise ConfigError(f"cannot read {override}: {_fault(error)}") from None
    for layer in layers:
        for key, value in OmegaConf.to_container(layer).items():
            if key in GROUPS and not isinstance(value, dict):
                raise ConfigError(f"{key} is not a setting but a group of them, such as {GROUPS[key]}")
    try:
        for key, default, _ in settings():  # OmegaConf's own complaint about these names no setting
            given = [OmegaConf.select(layer, key) for layer in layers]
            if isinstance(default, list) and any(OmegaConf.is_dict(value) for value in given):
                raise ConfigError(f"wrong value for {key}: not a list; expected one, such as {default}")
        if missing := set().union(*map(OmegaConf.missing_keys, layers)):
            raise ConfigError(f"wrong value for {min(missing)}: ???; expected a value, which ??? does not give")
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), *layers))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error, layers)) from None
    cfg.out = cfg.out or f"runs/{Path(name).stem if name else 'eval'}"
    _check(cfg)
    return cfg


def _layer(base):
    """A dict of settings, of a checkpoint perhaps, which may hold anything."""
    try:
        layer = OmegaConf.create(base)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the settings hold what is none: {str(error).splitlines()[0]}") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"the settings are a {type(base).__name__}, not a dict")
    return layer


def _read(name):
    path = next((p for p in (Path(name), PACKAGED / name, PACKAGED / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        packaged = ", ".join(sorted(p.stem for p in PACKAGED.glob("*.yaml")))
        raise ConfigError(f"no configuration {name}: neither a file nor one of {packaged}")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # the YAML parser's own errors
        raise ConfigError(f"cannot read {path}: {_fault(error)}") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"cannot read {path}: expected lines of the form key: value")
    return layer


def _fault(error):
    """What a YAML parser complains of, in one line."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, {error.problem}" if mark else " ".join(str(error).split())


def _one_line(error, layers):
    """What is wrong, said of the setting that OmegaConf complains of."""
    key = str(error.full_key or "").partition("[")[0]
    defaults = {known: default for known, default, _ in settings()}
    if key not in defaults:
        near = _nearest(key, [*defaults, *GROUPS])
        return f"unknown setting {key}" + (f"; did you mean {near}?" if near else "; --help lists them all")
    if isinstance(error, InterpolationResolutionError):
        return f"wrong value for {key}: {str(error).splitlines()[0]}"
    given = [OmegaConf.select(layer, key, default=OmegaConf) for layer in layers]  # OmegaConf: this layer does not name it
    value = next(value for value in reversed(given) if value is not OmegaConf)
    kind = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", str: "a text"}[type(defaults[key])]
    example = str(defaults[key]).lower() if isinstance(defaults[key], bool) else defaults[key]
    return f"wrong value for {key}: {value}; expected {kind}, such as {example}"


def _nearest(key, known):
    """The known key that `key` is most like, with its group or without; None if there is none."""

    def likeness(other):
        whole, last = ((key, other), (key.rpartition(".")[2], other.rpartition(".")[2]))
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in (whole, last))
        return max(whole, 0.85 * last), whole

    best = max(known, key=likeness)
    return best if likeness(best)[0] >= 0.6 else None


def _check(cfg):
    """Values that the types let through and no run could use."""

    def require(ok, key, expected):
        value = cfg
        for part in key.split("."):
            value = getattr(value, part)
        if not ok(value):
            raise ConfigError(f"wrong value for {key}: {value}; expected {expected}")

    def one_of(key, names):
        require(lambda v: v in names, key, "one of " + ", ".join(name or "nothing" for name in names))

    for key, default, _ in settings():
        if isinstance(default, float) and math.isfinite(default):
            require(math.isfinite, key, "a finite number")
        if isinstance(default, int):
            require(lambda v: isinstance(v, str) or abs(v) < 2**63, key, "a number below 2^63")
        if isinstance(default, list):
            require(lambda v: all(type(x) in (int, float) for x in v), key, f"a list of numbers, such as {default}")
    one_of("data.name", DATA_SETS)
    require(lambda v: not {"/", "\\"} & set(v), "data.split", "a name without / and \\, it becomes part of file names")
    if cfg.data.name == "toy":
        one_of("data.split", ("", "train", "test", "all"))
        one_of("data.label", TOY_LABELS)
        require(lambda v: not v, "data.subset", "none, the toy has no subsets")
    one_of("model.video", BACKBONES)
    one_of("model.head_norm", ("none", "batch"))
    one_of("loss.estimator", ("bootstrap", "swapped", "neighbor", "cycle"))
    one_of("optim.draws", ("epoch", "iid"))
    one_of("optim.schedule", ("cosine", "steps", "constant"))
    one_of("optim.amp", ("bf16", "fp16", "none"))
    require(lambda k: k == "all" or (isinstance(k, int) and k >= 1), "bank.num_negatives", "a count, or all")
    one_of("bank.dtype", ("float32", "float16", "bfloat16"))
    if cfg.bank.spread and cfg.bank.num_negatives == "all":
        raise ConfigError("bank.spread=true needs a count of bank.num_negatives: to read all memories is to hold them all")
    for name in ("contrast_vv", "contrast_aa", "contrast_va", "contrast_av"):
        if cfg.bank.spread and getattr(cfg.weights, name):
            raise ConfigError(f"weights.{name} needs bank.spread=false: each rank looks for neighbours in the whole bank")
    require(lambda v: v in (1, 2), "temporal.moments", "1 or 2")
    require(lambda v: v and min(v) >= 1 and sorted(set(v)) == v, "temporal.speeds", "whole numbers from 1 on, ascending")
    needs = {
        "order_": (cfg.temporal.moments == 2, "temporal.moments=2"),
        "contrast_vv": (cfg.temporal.moments == 2, "temporal.moments=2"),
        "contrast_aa": (cfg.temporal.moments == 2, "temporal.moments=2"),
        "speed_": (len(cfg.temporal.speeds) > 1, "temporal.speeds=[1,2,4,8]"),
        "direction_": (cfg.temporal.reverse, "temporal.reverse=true"),
    }
    for name, weight in vars(cfg.weights).items():
        for prefix, (there, setting_) in needs.items():
            if weight and name.startswith(prefix) and not there:
                raise ConfigError(f"weights.{name}={weight} needs {setting_}")
    require(lambda v: v <= cfg.contrast.k_pos, "contrast.n_pos", f"at most contrast.k_pos = {cfg.contrast.k_pos}")
    for key in (
        "contrast.temperature contrast.tau_p contrast.tau_n contrast.negatives optim.epochs optim.batch_size optim.lr eval.clips eval.batch_size video.frames video.fps video.size audio.seconds "
        "audio.rate_hz audio.frames_per_s audio.n_fft model.width model.depth model.embedding loss.temperature loss.tau_s "
        "loss.tau_t loss.kappa toy.train toy.test toy.seconds toy.size toy.fps toy.rate_hz log.every_steps log.check_videos "
        "finetune.epochs finetune.batch_size finetune.lr optim.max_bad_steps"
    ).split():
        require(lambda v: v > 0, key, "more than 0")
    for key in "data.max_bad_share video.flip video.grey audio.mask_time audio.mask_frequency bank.momentum loss.w_min loss.soft toy.faulty".split():
        require(lambda v: 0 <= v <= 1, key, "0 to 1")
    for key in (
        "seed contrast.n_pos contrast.k_pos data.workers loss.warmup_epochs optim.warmup_epochs optim.weight_decay optim.gamma optim.clip_grad log.check_epochs "
        "log.checkpoint_minutes eval.settle_batches audio.mels finetune.warmup_epochs finetune.weight_decay finetune.gamma"
    ).split() + [f"weights.{f.name}" for f in dataclasses.fields(Weights)]:
        require(lambda v: 0 <= v < 2**63, key, "0 or more")
    require(lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1, "video.crop_area", "[least, largest], shares of the frame")
    require(lambda v: len(v) == 2 and 0 < v[0] <= v[1] < math.inf, "video.crop_ratio", "[least, largest]")
    require(
        lambda v: len(v) == 4 and all(0 <= x <= 1 for x in v) and v[3] <= 0.5,
        "video.jitter",
        "four of 0 to 1, the last at most 0.5",
    )
    for key in ("optim.milestones", "finetune.milestones"):
        require(lambda v: all(0 <= x <= 1 for x in v), key, "shares of the run, 0 to 1")
    require(lambda v: 0 < v <= 86400, "data.timeout_s", "more than 0 s and at most 86400 s, a day")
    require(lambda v: 0 <= v < 1, "finetune.dropout", "0 or more, less than 1")
    require(lambda v: 0 < v <= 1, "eval.crop", "a share of the short side, more than 0 and at most 1")
    require(lambda v: 0 <= v < 1, "audio.volume", "0 or more, less than 1")
    require(lambda v: v >= cfg.audio.n_fft / cfg.audio.rate_hz, "audio.seconds", "at least a window, audio.n_fft / audio.rate_hz")
    require(lambda v: cfg.audio.rate_hz % v == 0, "audio.frames_per_s", f"a divisor of audio.rate_hz = {cfg.audio.rate_hz}")
    require(lambda v: v <= cfg.audio.n_fft // 2 + 1, "audio.mels", f"at most {cfg.audio.n_fft // 2 + 1}, the linear bins")
    require(lambda v: v * cfg.toy.fps >= 1, "toy.seconds", f"at least a frame, 1/{cfg.toy.fps}")


class CommandLine(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None):
        """Options and settings in any order."""
        return self.parse_intermixed_args(args, namespace)


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, width=120, max_help_position=30)


def parser(description):
    """A command line of --cfg, --out and key=value; the help lists every setting."""
    lines = [f"  {key + '=' + str(default).replace(' ', ''):42s} {help}" for key, default, help in settings()]
    arguments = CommandLine(description=description, formatter_class=Help, epilog="settings (key=default):\n" + "\n".join(lines))
    names = ", ".join(sorted(p.stem for p in PACKAGED.glob("*.yaml")))
    arguments.add_argument("--cfg", metavar="FILE", help=f"a YAML file, or one of {names} (default: toy)")
    arguments.add_argument("--out", metavar="DIR", help="run folder; the same as out=DIR")
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    return arguments


def evaluation_parser(description):
    """A command line as `parser`'s, with the checkpoint to evaluate and the data to evaluate it on."""
    arguments = parser(description)
    arguments.add_argument("--ckpt", required=True, metavar="PATH|random", help="a checkpoint; random: an untrained network")
    arguments.add_argument("--data", choices=DATA_SETS, metavar="NAME", help="the same as data.name=NAME (default: the run's)")
    arguments.add_argument("--root", metavar="DIR", help="the same as data.root=DIR")
    arguments.add_argument(
        "--split", metavar="S", help="evaluated part: test, val, …; of ucf101, hmdb51 and esc50: 1, 2, … or all, their mean"
    )
    return arguments


def stop(message):
    """End the program with one line and exit code 2: the user's input, not the program, is at fault."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def flat(nested, prefix=""):
    """A nested dict of settings as {dotted key: value}."""
    pairs = {}
    for key, value in nested.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def save(cfg, path):
    """Write the configuration as YAML that `load` reads, whole or not at all."""
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(WRITTEN)
        OmegaConf.save(OmegaConf.structured(cfg), file)
    os.replace(part, path)
