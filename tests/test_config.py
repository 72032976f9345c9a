"""Settings: given values win over packaged ones, and a mistake is reported in one line."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from avid import cli, config
from avid.config import ConfigError

PACKAGED = sorted(path.stem for path in config.PACKAGED.glob("*.yaml"))
SETTINGS = {key: (default, help) for key, default, help in config.settings()}


def get(cfg, key):
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


def complaint(*overrides, name="toy", base=None):
    with pytest.raises(ConfigError) as caught:
        config.load(name, overrides, base)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_configurations_load(name):
    assert config.load(name) == config.load(f"{name}.yaml") == config.load(config.PACKAGED / f"{name}.yaml")
    assert config.load(name).out == f"runs/{name}"


def test_layers_win_in_order(tmp_path):
    """Defaults, then a base, then a file, then overrides; of two overrides the last one counts."""
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.2, epochs: 7}\nseed: 5\n")
    base = {"optim": {"lr": 0.1, "batch_size": 3, "epochs": 6}}
    cfg = config.load(file, ["seed=8", "video.fps=12", "seed=9"], base)
    assert (cfg.optim.batch_size, cfg.optim.lr, cfg.optim.epochs, cfg.seed, cfg.video.fps) == (
        3,
        0.2,
        7,
        9,
        12.0,
    )
    assert cfg.bank.momentum == config.Bank().momentum
    assert cfg.out == "runs/mine"
    assert config.load(None, base=base).out == "runs/eval"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.root=/data/with space/a=b:c", "/data/with space/a=b:c"),
        ("data.root=/data/take #2", "/data/take #2"),
        ("data.root=~", "~"),
        ("out=null", "null"),
        ("out=[a", "[a"),
        ("data.split=1", "1"),
        ("out=7", "7"),
        ("bank.num_negatives=all", "all"),
        ("bank.num_negatives=64", 64),
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=1", 1.0),
        ("optim.compile=yes", True),
        ("video.jitter=[0,0,0,0]", [0.0] * 4),
        ("optim.milestones=[]", []),
        ("audio={mels: 0}", 0),
    ],
)
def test_overrides_take_the_type_of_their_setting(override, value):
    key = "audio.mels" if override.startswith("audio") else override.partition("=")[0]
    found = get(config.load("xid", [override]), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_saved_configuration_loads_unchanged(tmp_path, name):
    cfg = config.load(
        name,
        [
            "bank.candidates=shared",
            "loss.form=softmax",
            "bank.num_negatives=all",
            "data.root=/a b/ü",
            "out=some/where",
            "seed=3",
            "video.jitter=[0,0.1,0,0]",
        ],
    )
    config.save(cfg, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == cfg
    assert config.load(None, base=dataclasses.asdict(cfg)) == cfg
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    config.save(config.load("toy", ["seed=1"]), path)

    def interrupted(cfg, file):
        file.write("see")
        raise KeyboardInterrupt

    monkeypatch.setattr(config.OmegaConf, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        config.save(config.load("toy", ["seed=2"]), path)
    assert config.load(path).seed == 1


def test_flat_names_every_setting():
    assert config.flat(dataclasses.asdict(config.Config())) == {
        key: default for key, (default, _) in SETTINGS.items()
    }


# ----------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optim.lrr=1", "optim.lr"),
        ("optim.learning_rate=1", None),
        ("data.nam=toy", "data.name"),
        ("lr=1", "optim.lr"),
        ("temperature=0.1", "loss.temperature"),
        ("optim.temperature=0.1", "loss.temperature"),
        ("optim.batchsize=3", "optim.batch_size"),
        ("bank.negatives=3", "bank.num_negatives"),
        ("dat.name=toy", "data"),
        ("zzz=1", None),
    ],
)
def test_an_unknown_key_suggests_the_nearest_one(wrong, right):
    text = complaint(wrong)
    given = "dat" if wrong.startswith("dat.") else wrong.partition("=")[0]  # no such group
    assert text.startswith(f"unknown setting {given};")
    if right:
        assert text.endswith(f"; did you mean {right}?")
    elif wrong.startswith("zzz"):
        assert text.endswith("; --help lists them all")


@pytest.mark.parametrize(
    ("override", "found", "expected"),
    [
        ("optim.lr=fast", "fast", "a number, such as 0.0002"),
        ("optim.lr=", "None", "a number"),
        ("optim.lr=[1]", "[1]", "a number"),
        ("optim.epochs=1.5", "1.5", "a whole number, such as 200"),
        ("optim.epochs=many", "many", "a whole number"),
        ("seed=null", "None", "a whole number"),
        ("optim.compile=maybe", "maybe", "true or false, such as false"),
        ("video.jitter=3", "3", "a list, such as [0.4, 0.4, 0.4, 0.2]"),
        ("video.jitter=[0,0,x,0]", "[0, 0, 'x', 0]", "a list"),
        ("video.frames.x=3", "{'x': 3}", "a whole number"),
        ("bank.num_negatives=true", "True", "a whole number"),
        ("seed=???", "???", "a value"),
        ("optim.milestones=[[1]]", "[[1]]", "a list of numbers"),
        ("video.crop_area={}", "not a list", "one, such as"),
        ("optim.epochs=99999999999999999999", "99999999999999999999", "a number below 2^63"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override, found, expected):
    key = "video.frames" if override.startswith("video.frames") else override.partition("=")[0]
    assert complaint(override).startswith(f"wrong value for {key}: {found}; expected {expected}")


@pytest.mark.parametrize(
    "override",
    """data.name=imagenet model.head_norm=layer loss.estimator=best optim.draws=some optim.schedule=linear
    optim.amp=fp8 bank.num_negatives=0 bank.num_negatives=most bank.momentum=1.5 optim.lr=-1 optim.lr=nan
    optim.lr=.inf optim.epochs=0 optim.batch_size=0 optim.weight_decay=-1 optim.milestones=[2] optim.gamma=-1
    seed=-1 seed=99999999999999999999 data.workers=-1 data.max_bad_share=2 video.flip=1.1
    video.crop_area=[0.5] video.crop_area=[0.5,0.1] video.crop_area=[0.5,2] video.crop_ratio=[0,1]
    video.jitter=[0.1,0.1,0.1] video.jitter=[0.1,0.1,0.1,0.6] video.jitter=[2,0,0,0] video.jitter=[.nan,0,0,0]
    video.fps=0 video.frames=0 audio.seconds=0.01 audio.frames_per_s=7 audio.volume=1 audio.mels=300
    audio.mels=-1 eval.crop=0 eval.crop=1.5 eval.clips=0 eval.calibration_batches=-1 loss.temperature=0
    loss.w_min=-0.1 loss.soft=1.1 loss.kappa=0 weights.xid=-1 toy.train=0 toy.faulty=1.1 log.every_steps=0
    log.check_videos=0 log.checkpoint_minutes=-1""".split(),
)
def test_a_value_that_is_not_allowed_is_refused(override):
    key = override.partition("=")[0]
    assert re.fullmatch(rf"wrong value for {key}: .+; expected .+", complaint(override))


@pytest.mark.parametrize("override", ["data=3", "data=", "data=[1]", "optim=fast"])
def test_a_group_is_not_a_setting(override):
    group = override.partition("=")[0]
    first = {"data": "data.name", "optim": "optim.epochs"}[group]
    assert complaint(override) == f"{group} is not a setting but a group of them, such as {first}"


@pytest.mark.parametrize("override", ["lr", "=3", "", "optim.lr"])
def test_an_override_must_be_key_and_value(override):
    assert complaint(override) == f"{override} is no setting; write key=value, --help lists the keys"


@pytest.mark.parametrize("override", ["seed=[", "optim.lr={a", "video.jitter=[1,2"])
def test_an_override_that_is_not_yaml_is_refused(override):
    assert complaint("seed=1", override).startswith(f"cannot read {override}: ")


def test_an_interpolation_of_an_unknown_key_is_refused():
    assert complaint("data.root=${nowhere}").startswith("wrong value for data.root: ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data: {name: toy\n", "cannot read FILE: "),
        (b"optim:\n\tlr: 3\n", "cannot read FILE: "),
        (b"seed: 1\nseed: 2\n", "cannot read FILE: "),
        (b"\xff\xfe\x00", "cannot read FILE: "),
        (b"- seed\n- optim\n", "cannot read FILE: expected lines of the form key: value"),
        (b"data: toy\n", "data is not a setting but a group of them, such as data.name"),
        (b"optim: {lrr: 1}\n", "unknown setting optim.lrr; did you mean optim.lr?"),
        (b"optim: {lr: fast}\n", "wrong value for optim.lr: fast; expected a number, such as 0.0002"),
        (b"3: 4\n", "unknown setting 3; --help lists them all"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, content, expected):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    assert complaint(name=file).startswith(expected.replace("FILE", str(file)))


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text("# nothing\n")
    assert dataclasses.replace(config.load(tmp_path / "mine.yaml"), out="") == config.Config()


@pytest.mark.parametrize("name", ["nowhere", "nowhere.yaml", "/nowhere/mine.yaml", "."])
def test_a_missing_file_names_the_packaged_ones(name):
    assert complaint(name=name) == f"no configuration {name}: neither a file nor one of {', '.join(PACKAGED)}"


# ----------------------------------------------------------------------------------------- help, command line


def test_every_setting_has_a_help_text():
    """The help of a number names its source, or its unit where the number is not part of the method."""
    units = r"\b(s|Hz|pixels|videos|frames a second|share|minutes|steps|epochs|processes|everything random)\b"
    for key, (default, help) in SETTINGS.items():
        assert len(help) >= 5, key
        assert re.search(r"\[[PAFCS][\]:;]", help) or isinstance(default, str) or re.search(units, help), key


def test_method_settings_name_their_source():
    for key, (_, help) in SETTINGS.items():
        if key.partition(".")[0] in ("video", "audio", "model", "bank", "loss", "weights", "optim"):
            assert re.search(r"\[[PAFCS][\]:;]", help) or re.search(r"robust: .* \[F\]", help), key


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.training("What it does.", ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "What it does." in text
    for key, (default, help) in SETTINGS.items():
        assert re.search(
            rf"^  {re.escape(key)}={re.escape(str(default).replace(' ', ''))} +{re.escape(help)}$", text, re.M
        ), key
    for name in PACKAGED:
        assert name in text


def test_options_and_settings_come_in_any_order():
    cfg = cli.training("", ["seed=4", "--cfg", "toy", "optim.lr=1", "--out", "there", "optim.epochs=2"])
    assert (cfg.seed, cfg.optim.lr, cfg.out, cfg.optim.epochs) == (4, 1.0, "there", 2)
    arguments = cli.evaluation_parser("").parse_args(["seed=4", "--ckpt", "random", "eval.clips=3"])
    assert arguments.overrides == ["seed=4", "eval.clips=3"]


@pytest.mark.parametrize(
    "arguments", [["data=3"], ["optim.lrr=1"], ["--cfg", "nowhere"], ["seed=x"], ["seed=["], ["nonsense"]]
)
def test_a_mistake_ends_the_program_with_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.training("", arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"error: .+\n", err)


def test_train_reports_a_mistake_at_once():
    """Without importing torch, which takes seconds."""
    train = Path(__file__).parents[1] / "train.py"
    command = [sys.executable, "-X", "importtime", str(train), "optim.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: unknown setting optim.lrr; did you mean optim.lr?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not re.search(r"\| +torch\b", done.stderr)


def test_train_takes_data_and_root_like_the_evaluations(tmp_path):
    """They set data.name and data.root; key=value overrides them."""
    given = ["--data", "manifest", "--root", "my videos", "--out", str(tmp_path)]
    cfg = cli.training("", given)
    assert (cfg.data.name, cfg.data.root) == ("manifest", "my videos")
    assert cli.training("", [*given, "data.root=others"]).data.root == "others"
    arguments = cli.evaluation_parser("").parse_args(["--ckpt", "random", *given, "--split", "val"])
    assert cli.overrides(arguments) == ["data.name=manifest", "data.root=my videos", "data.split=val"]


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--config", "--cfg"),
        ("--chkpt", "--ckpt"),
        ("--checkpoint", "--ckpt"),
        ("--rot", "--root"),
        ("--zzz", None),
    ],
)
def test_an_unknown_option_suggests_the_nearest_one(capsys, option, meant):
    for parse in (cli.training, lambda _, argv: cli.evaluation(cli.evaluation_parser(""), argv)):
        if meant == "--ckpt" and parse is cli.training:
            continue
        with pytest.raises(SystemExit) as ended:
            parse("", ["--ckpt", "random"] * (parse is not cli.training) + [option, "x"])
        last = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and f"unrecognized arguments: {option}" in last
        assert last.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in last


@pytest.mark.parametrize("script", ["eval_linear.py", "eval_retrieval.py"])
def test_a_wrong_checkpoint_is_reported_at_once(script, tmp_path):
    """Without importing torch, which takes seconds."""
    command = [sys.executable, "-X", "importtime", str(Path(__file__).parents[1] / script)]
    missing = tmp_path / "nowhere" / "last.pt"
    for path, expected in (
        (missing, f"error: no checkpoint {missing}"),
        (tmp_path, f"error: cannot read the checkpoint {tmp_path}: Is a directory"),
    ):
        done = subprocess.run([*command, "--ckpt", str(path)], capture_output=True, text=True)
        assert done.returncode == 2 and expected in done.stderr.splitlines()
        assert not re.search(r"\| +(torch|sklearn|matplotlib)\b", done.stderr)


def test_the_help_of_an_evaluation_lists_the_settings_that_it_uses(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.evaluation(cli.evaluation_parser("What it does."), ["-h"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "What it does." in text
    assert {"(default: the checkpoint's own)", "(default: the checkpoint's)"} <= set(
        re.findall(r"\(default: [^)]*\)", " ".join(text.split()))
    )
    listed = {line.split("=")[0].strip() for line in text.splitlines() if re.match(r"  [a-z_.]+=", line)}
    assert {
        "seed",
        "data.name",
        "data.label",
        "eval.clips",
        "finetune.lr",
        "video.frames",
        "toy.test",
    } <= listed
    assert not any(
        key.startswith(("optim.", "loss.", "weights.", "bank.", "log.", "contrast.")) for key in listed
    )
    assert listed - {"key"} <= SETTINGS.keys()  # key=value
