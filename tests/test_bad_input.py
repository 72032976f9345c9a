"""Wrong input ends with a one-line error and exit code 2, before a file is written or a worker is started."""

import ast
import dataclasses
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import TINY

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import eval_linear
import eval_retrieval
import train
from avid import cli, config, evaluation, models, run
from avid.tools import figures, prepare, show

MANIFEST = "path,label,split\na.mp4,dog,train\nb.mp4,cat,train\nc.mp4,dog,test\nd.mp4,cat,test\n"


class MaliciousPickle:
    """An object that makes the folder `sprung` when its pickle is loaded."""

    def __reduce__(self):
        return (os.mkdir, ("sprung",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a tiny network, as train.py writes it, and some files that are no checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    cfg = config.load("toy", TINY)
    state = {
        "network": models.AudioVisual(cfg.model).state_dict(),
        "config": dataclasses.asdict(cfg),
        "bank": {},
    }
    run.save_checkpoint(folder / "run" / "last.pt", state)
    run.save_checkpoint(folder / "list.pt", [1, 2])
    run.save_checkpoint(folder / "wide.pt", {**state, "config": {**state["config"], "model": {"width": 8}}})
    run.save_checkpoint(folder / "newer.pt", {**state, "config": {"model": {"wings": 2}}})
    run.save_checkpoint(folder / "odd.pt", {**state, "config": 3})
    torch.save({"network": MaliciousPickle()}, folder / "malicious.pt")
    (folder / "plain.pkl").write_bytes(pickle.dumps(MaliciousPickle()))
    (folder / "text.pt").write_text("no checkpoint")
    (folder / "half.pt").write_bytes((folder / "run" / "last.pt").read_bytes()[:2000])
    return folder


@pytest.fixture
def workdir(tmp_path, monkeypatch, saved):
    """The current folder, with small data sets of empty files and with files that must not be overwritten."""
    for name in (
        "list/a.mp4",
        "list/b.mp4",
        "list/c.mp4",
        "list/d.mp4",
        "classes/x/a.mp4",
        "classes/y/b.mp4",
        "a file",
        "nothing/b.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list" / "manifest.csv").write_text(MANIFEST)
    (tmp_path / "esc" / "meta").mkdir(parents=True)
    (tmp_path / "esc" / "audio").mkdir()
    rows = [f"{fold}.wav,{fold},0,dog,True\n" for fold in range(1, 6)]
    (tmp_path / "esc" / "meta" / "esc50.csv").write_text(
        "".join(["filename,fold,target,category,esc10\n", *rows])
    )
    for fold in range(1, 6):
        (tmp_path / "esc" / "audio" / f"{fold}.wav").touch()
    for name, content in (("metrics.jsonl", "{}\n"), ("config.yaml", "seed: 3\n"), ("curves.png", "PNG")):
        (tmp_path / f"foreign {name}").mkdir()
        (tmp_path / f"foreign {name}" / name).write_text(content)
    (tmp_path / "foreign eval").mkdir()
    (tmp_path / "foreign eval" / "linear-video-toy-test.json").write_text("[1]")
    (tmp_path / "foreign eval" / "retrieval-audio-toy.png").write_text("PNG")
    (tmp_path / "other.csv").write_text("other,columns\n")
    (tmp_path / "other.npz").write_text("no npz")
    (tmp_path / "tasks.png").write_text("no png")
    (tmp_path / "evil.yaml").write_text("out: !!python/object/apply:pathlib.Path.touch ['sprung']\n")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "list.yaml").write_text("- seed\n")
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "ckpt").symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    """{path: bytes} of everything below a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


SCRIPTS = {
    "train": lambda argv: train.main(cli.training("", argv)),
    "linear": lambda argv: eval_linear.main(eval_linear.command_line(argv)),
    "retrieval": lambda argv: eval_retrieval.main(eval_retrieval.command_line(argv)),
    "data": lambda argv: prepare.main(argv),
    "show": lambda argv: show.main(argv),
}


def error_of(script, argv, workdir, capsys, monkeypatch):
    """The error of a script that must refuse its arguments: one line, perhaps with the expected layout below.

    No file may change and no worker may be started."""

    def start_worker(*_, **__):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(torch.utils.data, "DataLoader", start_worker)
    monkeypatch.setattr(prepare.processes, "outcomes", start_worker)
    before = contents(workdir)
    with pytest.raises(SystemExit) as ended, evaluation.plain_errors():
        SCRIPTS[script](argv)
    assert ended.value.code == 2
    assert contents(workdir) == before
    message, *layout = capsys.readouterr().err.splitlines()
    assert not layout or layout[0].startswith("expected, with root")
    assert message.startswith("error: ") and len(message) < 800, message
    return message


TRAIN_LIST = "data.name=manifest data.root=list optim.batch_size=2"
CASES = [  # script, command line, part of the error message
    # settings
    ("train", "optim.lrr=1", "unknown setting optim.lrr; did you mean optim.lr?"),
    ("train", "optim..lr=1", "optim..lr=1 is no setting; write key=value"),
    ("train", "optim.lr=fast", "wrong value for optim.lr: fast; expected a number"),
    ("train", "optim.epochs=1.5", "wrong value for optim.epochs: 1.5; expected a whole number"),
    ("train", "optim.epochs=99999999999999999999", "expected a number below 2"),
    ("train", "optim=fast", "optim is not a setting but a group"),
    ("train", "temporal.speeds=[]", "wrong value for temporal.speeds"),
    ("train", "video.jitter=[[1]]", "expected a list of numbers"),
    ("train", "video.crop_area={}", "wrong value for video.crop_area: not a list"),
    ("train", "data.root=${nowhere}", "wrong value for data.root"),
    ("train", "seed=???", "wrong value for seed: ???"),
    ("train", "--cfg nowhere", "no configuration nowhere: neither a file nor one of"),
    ("train", "--cfg list", "no configuration list: neither a file nor one of"),
    ("train", "--cfg binary.yaml", "cannot read binary.yaml"),
    ("train", "--cfg list.yaml", "cannot read list.yaml: expected lines of the form key: value"),
    ("train", "--cfg twice.yaml", "cannot read twice.yaml: line 2, found duplicate key"),
    ("train", "--cfg evil.yaml",
     "cannot read evil.yaml: line 1, could not determine a constructor for the tag"),
    # settings that contradict each other
    ("train", "model.video=resnet",
     "wrong value for model.video: resnet; expected one of avid, timewise, r2plus1d_18"),
    ("train", "audio.mels=300", "wrong value for audio.mels: 300; expected at most 257, the linear bins"),
    ("train", "audio.frames_per_s=7", "expected a divisor of audio.rate_hz"),
    ("train", "contrast.n_pos=9 contrast.k_pos=8",
     "wrong value for contrast.n_pos: 9; expected at most contrast.k_pos = 8"),
    ("train", "weights.contrast_va=1 contrast.k_pos=23",
     "contrast.k_pos=23 leaves no negatives among 24 videos"),
    ("train", "optim.batch_size=25", "optim.batch_size=25 is larger than the data set of 24 videos"),
    ("train", "weights.xid=0", "all weights.* are 0"),
    ("train", "weights.order_video=1", "weights.order_video=1.0 needs temporal.moments=2"),
    ("train", "weights.speed_video=1", "weights.speed_video=1.0 needs temporal.speeds"),
    ("train", "weights.direction_audio=1", "weights.direction_audio=1.0 needs temporal.reverse=true"),
    ("train", "weights.order_audio=1 temporal.moments=2 audio.seconds=1",
     "needs 2 s of every video, and 1.9"),
    ("train", "weights.speed_audio=1 temporal.speeds=[1,8]", "needs 4 s of every video"),
    ("train", "weights.direction_video=1 temporal.reverse=true video.frames=40",
     "needs 2.5 s of every video"),
    ("train", "data.split=nowhere",
     "wrong value for data.split: nowhere; expected one of nothing, train, test, all"),
    ("train", "data.label=colour", "wrong value for data.label: colour; expected one of label, motion"),
    ("train", "data.subset=esc10", "wrong value for data.subset: esc10"),
    ("train", "toy.size=33", "toy.size is 33, but H.264 needs an even number: use 34"),
    ("train", "toy.rate_hz=12345", "toy.rate_hz is 12345, but AAC needs one of"),
    ("train", "toy.seconds=0.01", "wrong value for toy.seconds: 0.01; expected at least a frame"),
    ("train", "data.name=esc50 data.root=esc", "data.name=esc50 has no pictures"),
    # the run folder
    ("train", "--out 'a file'", "cannot write into a file: a file is a file; choose another folder"),
    ("train", "--out 'a file/run'", "cannot write into a file/run: "),
    ("train", f"--out {'x' * 300}", "File name too long"),
    ("train", "--out 'foreign metrics.jsonl'",
     "holds metrics.jsonl, which train.py did not write there; choose another --out"),
    ("train", "--out 'foreign config.yaml'", "holds config.yaml, which train.py did not write there"),
    ("train", "--out 'foreign curves.png'", "holds curves.png, which train.py did not write there"),
    # data sets
    ("train", "data.name=folder data.root=nowhere", "no list or file in nowhere, which does not exist"),
    ("train", "data.name=folder data.root=nothing", "no list or file in nothing"),
    ("train", "data.name=folder 'data.root=a file'", "no list or file in a file"),
    ("train", "data.name=manifest data.root=classes", "cannot read classes/manifest.csv: No such file"),
    ("train", "data.name=manifest data.root=list data.split=val", "no such split in list, only test, train"),
    ("train", "data.name=manifest data.root=list data.label=colour",
     "manifest.csv, line 1: no column colour; there are path, label, split"),
    ("train", "data.name=manifest data.root=list",
     "optim.batch_size=8 is larger than the data set of 2 videos"),
    ("train", f"{TRAIN_LIST} data.subset=esc10", "data.subset=esc10: manifest has none of that name"),
    ("train", f"{TRAIN_LIST} weights.contrast_va=1", "contrast.k_pos=32 leaves no negatives among 2 videos"),
    ("train", "data.name=ucf101 data.root=list data.split=train4",
     "no split train4; there are train1, test1"),
    # checkpoints
    ("linear", "--ckpt nowhere.pt", "no checkpoint nowhere.pt"),
    ("linear", "--ckpt list", "cannot read the checkpoint list: Is a directory"),
    ("linear", "--ckpt ckpt/text.pt", "cannot read the checkpoint ckpt/text.pt"),
    ("linear", "--ckpt ckpt/half.pt", "cannot read the checkpoint ckpt/half.pt"),
    ("linear", "--ckpt ckpt/list.pt", "it holds a list, not a dict"),
    ("linear", "--ckpt ckpt/malicious.pt", "and no code is run from a file"),
    ("linear", "--ckpt ckpt/plain.pkl", "cannot read the checkpoint ckpt/plain.pkl"),
    ("linear", "--ckpt ckpt/newer.pt",
     "ckpt/newer.pt holds settings that this version does not take: unknown setting model.wings"),
    ("linear", "--ckpt ckpt/odd.pt",
     "ckpt/odd.pt holds settings that this version does not take: the settings hold what is none"),
    ("linear", "--ckpt ckpt/wide.pt", "wide.pt"),
    # evaluations
    ("linear", "--ckpt ckpt/run/last.pt --out 'a file'", "cannot write into a file"),
    ("linear", "--ckpt ckpt/run/last.pt --out e --data esc50 --root esc --modality video",
     "esc50 has no pictures; use --modality audio"),
    ("linear", "--ckpt ckpt/run/last.pt --out e --data esc50 --root esc --split 9", "no split train9"),
    ("linear", "--ckpt ckpt/run/last.pt --out e --data esc50 --root esc --split all --save f.npz",
     "name it, such as --split 1"),
    ("linear", "--ckpt ckpt/run/last.pt --out e --data manifest --root list --save other.npz",
     "other.npz exists, and is not overwritten"),
    ("linear", "--ckpt ckpt/run/last.pt --out e --data manifest --root list --save 'a file/f'",
     "cannot write into a file"),
    ("linear", "--ckpt ckpt/run/last.pt --out e --data manifest --root list --mode finetune --save f.npz",
     "no frozen features"),
    ("linear", "--ckpt ckpt/run/last.pt --out e --data manifest --root list --mode finetune",
     "finetune.batch_size: 64; expected at most 2"),
    ("linear", "--ckpt ckpt/run/last.pt --out e --data manifest --root list --split a/b",
     "wrong value for data.split: a/b"),
    ("linear", "--ckpt ckpt/run/last.pt --out 'foreign eval'",
     "linear-video-toy-test.json is no result of an evaluation"),
    ("linear", "--ckpt random --out e --data folder --root nothing", "no list or file in nothing"),
    ("linear", "--ckpt random --out e data.label=colour", "wrong value for data.label: colour"),
    ("retrieval", "--ckpt nowhere.pt", "no checkpoint nowhere.pt"),
    ("retrieval", "--ckpt random --out 'a file'", "cannot write into a file"),
    ("retrieval", "--ckpt random --out 'foreign eval'", "retrieval-audio-toy.png is no picture of avid's"),
    ("retrieval", "--ckpt ckpt/run/last.pt --out e --data esc50 --root esc --task cross",
     "--task cross needs pictures, and esc50 has none"),
    ("retrieval", "--ckpt ckpt/run/last.pt --out e --data manifest --root nowhere",
     "cannot read nowhere/manifest.csv"),
    # whole folders
    ("data", "check --data folder --root nowhere", "no list or file in nowhere, which does not exist"),
    ("data", "check --data manifest --root list --split val", "no such split in list, only test, train"),
    ("data", "check --data manifest --root list --out other.csv",
     "other.csv is not the CSV of a check; name another one with --out"),
    ("data", "check --data manifest --root list --out 'a file/c.csv'", "cannot write into a file"),
    ("data", "check --data manifest --root list --out list", "list"),
    ("data", "check --data manifest --root list optim.lrr=1", "unknown setting optim.lrr"),
    ("data", "prepare nowhere new", "nowhere"),
    ("data", "prepare nothing new", "no media files below"),
    ("data", "prepare list list/small", "lie within each other"),
    ("data", "prepare list classes",
     "holds files that were not prepared, e.g. x/a.mp4; name an empty folder"),
    ("data", "prepare list 'a file'", "is a file; choose another folder"),
    ("show", "weights nowhere", "no checkpoint nowhere/last.pt"),
    ("show", "weights ckpt/run", "is a run without known faulty pairs"),
    ("show", "tasks --cfg nowhere", "no configuration nowhere"),
    ("show", "tasks temporal.moments=1", "needs temporal.moments=2"),
    ("show", "tasks --cfg toy", "can only be shown with temporal.moments=2"),
    ("show", "tasks", "tasks.png is no picture of avid's"),
]  # fmt: skip


@pytest.mark.parametrize("script, line, message", CASES)
def test_wrong_input_is_refused_beforehand(script, line, message, workdir, capsys, monkeypatch):
    argv = shlex.split(line)
    if script == "train":
        argv = [*(TINY if "--cfg" not in argv else []), "data.root=toy", *argv]
    assert message in error_of(script, argv, workdir, capsys, monkeypatch)


def test_a_batch_that_the_processes_cannot_share_is_refused_beforehand(workdir, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = error_of("train", TINY, workdir, capsys, monkeypatch)
    assert (
        message == "error: optim.batch_size=8 cannot be shared evenly by 3 processes; make it a multiple of 3"
    )


def test_batch_norm_needs_two_clips_at_once():
    cfg = config.load("toy", ["optim.batch_size=4", "optim.accumulate=4"])
    with pytest.raises(config.ConfigError, match="needs two clips at once"):
        cli.fits(cfg, 100)
    cli.fits(config.load("toy", ["optim.batch_size=4", "optim.accumulate=2"]), 100)


HEAD = b"path,label,split,start,end\n"
LISTS = [  # content of a manifest, number of the wrong line, cause
    (b"", None, "lists no file"),
    (HEAD, None, "lists no file"),
    (b"\xef\xbb\xbf" + HEAD, None, "lists no file"),
    (b"file,label\na.mp4,dog\n", 1, "no column path; there are file, label"),
    (b"path;label\na.mp4;dog\n", 1, "no column path; there are path;label"),
    (b"path,label,label\na.mp4,dog,cat\n", 1, "two columns 'label'; rename one"),
    (HEAD + b"a.mp4,dog,train\n", 2, "3 fields where 5 belong: path, label, split, start, end"),
    (HEAD + b"a.mp4,dog,train,,,,\n", 2, "7 fields where 5 belong"),
    (HEAD + b"a.mp4,dog,train,,\n\nb.mp4\n", 4, "1 fields where 5 belong"),
    (
        HEAD + b'"a.mp4,dog,train,,\nb.mp4,cat,train,,\n',
        2,
        "not CSV: unexpected end of data; put a field with a comma",
    ),
    (HEAD + b'"a"b.mp4,dog,train,,\n', 2, "not CSV"),
    (HEAD + b"a.mp4," + b"x" * 200_000 + b",train,,\n", 2, "not CSV: field larger than field limit"),
    (HEAD + b"a.mp4,dog\0,train,,\n", 2, "a zero byte; save the list as text in UTF-8"),
    (HEAD + b"a.mp4,H\xe4her,train,,\n", 2, "not UTF-8; save the list as text in UTF-8"),
    (HEAD.decode().encode("utf-16"), 1, "not UTF-8"),
    (HEAD.decode().encode("utf-16-le"), 1, "a zero byte"),
    (bytes(range(10)) * 50, 1, "a zero byte"),
    (b"\x1f\x8b\x08" + bytes(range(128, 256)), 1, "not UTF-8"),
    (HEAD + b"a.mp4,dog,train,4,4\n", 2, "start 4 s is not before end 4 s"),
    (HEAD + b"a.mp4,dog,train,9,2\n", 2, "start 9 s is not before end 2 s"),
    (HEAD + b"a.mp4,dog,train,-1,2\n", 2, "'-1' where a number from 0 on belongs"),
    (HEAD + b"a.mp4,dog,train,1e3,\n", 2, "'1e3' where a number"),
    (HEAD + b"a.mp4,dog,train,0,inf\n", 2, "'inf' where a number"),
    (HEAD + b"a.mp4,dog,train,0," + b"9" * 320 + b"\n", 2, "'9999"),
    (HEAD + "a.mp4,dog,train,٣,\n".encode(), 2, "'٣' where a number from 0 on belongs"),
    (
        HEAD + b"a.mp4,dog,train,,\na.mp4,dog,test,,\n",
        3,
        "a.mp4 again, as in manifest.csv, line 2; keep one of them",
    ),
    (HEAD + b"a.mp4,dog,train,,\n./a.mp4,dog,train,,\n", 3, "a.mp4 again, as in manifest.csv, line 2"),
    (
        HEAD + b"../../etc/passwd,dog,train,,\n",
        2,
        "'../../etc/passwd' is not a path below the data root; give a relative one",
    ),
    (HEAD + b"/etc/passwd,dog,train,,\n", 2, "'/etc/passwd' is not a path below the data root"),
    (HEAD + b",dog,train,,\n", 2, "'.' is not a path below the data root"),
    (HEAD + b"a\x1b[2J.mp4,dog\n", 2, "2 fields where 5 belong"),
    (HEAD + b"nowhere.mp4,dog,train,,\n", None, "none of the 1 listed files, e.g. nowhere.mp4, is in list"),
    (HEAD + b"a.mp4,dog,test,,\n", None, "no such split in list, only test"),
]


@pytest.mark.parametrize("content, line, cause", LISTS)
def test_a_list_that_cannot_be_read_is_refused_beforehand(content, line, cause, workdir, capsys, monkeypatch):
    (workdir / "list" / "manifest.csv").write_bytes(content)
    for script, command in (
        ("train", "data.name=manifest data.root=list optim.batch_size=1"),
        ("data", "check --data manifest --root list"),
    ):
        if cause.startswith("no such split") and script == "data":
            continue  # a check reads every split
        message = error_of(script, command.split(), workdir, capsys, monkeypatch)
        assert (
            message.startswith(f"error: list/manifest.csv, line {line}: {cause}" if line else "error: ")
            and cause in message
        )


@pytest.mark.parametrize(
    "script, command",
    [("linear", ""), ("linear", "--mode svm"), ("linear", "--mode finetune"), ("retrieval", "")],
)
def test_files_without_a_class_are_counted_before_any_is_read(script, command, workdir, capsys, monkeypatch):
    (workdir / "list" / "manifest.csv").write_text(MANIFEST.replace("d.mp4,cat", "d.mp4,"))
    argv = f"--ckpt ckpt/run/last.pt --out e --data manifest --root list {command}".split()
    assert "1 of 2 files have no class, e.g. d.mp4; give them one" in error_of(
        script, argv, workdir, capsys, monkeypatch
    )


# ----------------------------------------------------------------------------------------------------- output


def test_a_run_folder_is_known_by_its_settings(tmp_path):
    """It may be new, empty, or left by an interrupted run. A checkpoint in it is checked when it is read."""
    out = tmp_path / "run"
    cfg = config.load("toy", [f"out={out}"])
    cli.check_run_folder(cfg)
    out.mkdir()
    (out / "metrics.jsonl").touch()
    (out / "notes.txt").write_text("notes")
    cli.check_run_folder(cfg)
    (out / "metrics.jsonl").write_text("{}")
    with pytest.raises(config.ConfigError, match=r"holds metrics\.jsonl"):
        cli.check_run_folder(cfg)
    config.save(config.load("toy"), out / "config.yaml")
    cli.check_run_folder(cfg)
    assert config.load(out / "config.yaml", [f"out={out}"]) == config.load("toy", [f"out={out}"])
    (out / "config.yaml").unlink()
    (out / "last.pt").write_text("anything")
    cli.check_run_folder(cfg)
    config.save(cfg, out / "config.yaml")
    cli.check_run_folder(cfg)
    # found before a toy is written or a list is read
    with pytest.raises(config.ConfigError, match=r"model\.width"):
        cli.check_run_folder(config.load("toy", [f"out={out}", "model.width=8"]))


def test_pictures_are_known_by_their_metadata(tmp_path):
    path = tmp_path / "curves.png"
    figures.check_picture(path)
    figures.write(figures.plt.figure(), path)
    figures.check_picture(path)
    figures.plt.figure().savefig(path)
    with pytest.raises(config.ConfigError, match=r"curves\.png is no picture of avid's"):
        figures.check_picture(path)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


# ----------------------------------------------------------------------------------------------------- safety


def subject(out):
    cfg = config.load("toy", TINY)
    return evaluation.Subject(models.AudioVisual(cfg.model), cfg, torch.device("cpu"), "x.pt", "hash", out)


@pytest.mark.parametrize("spoil", ["objects", "pickle", "half", "text", "array"])
def test_kept_features_that_cannot_be_read_are_computed_again_and_run_no_code(
    spoil, workdir, capsys, monkeypatch
):
    table = evaluation.datasets.load(config.Data(name="manifest", root="list"), "train")
    features = evaluation.Features(
        np.array([0]), {"audio": np.ones((1, 1, 3), np.float32)}, failures={1: "no sound"}
    )
    extractions = []
    monkeypatch.setattr(evaluation, "extract", lambda *_: extractions.append(1) or features)

    def kept():
        return evaluation.features_of(subject(workdir), table, "audio")

    kept()
    (path,) = (workdir / "features").iterdir()
    if spoil == "objects":
        arrays = dict(np.load(path)) | {"features_audio": np.array([MaliciousPickle()], object)}
        np.savez(path, **arrays)
    elif spoil == "array":
        np.save(path, np.ones(3))
        path.with_suffix(".npz.npy").replace(path)
    else:
        path.write_bytes(
            {"pickle": pickle.dumps(MaliciousPickle()), "half": path.read_bytes()[:200], "text": b"text"}[
                spoil
            ]
        )
    capsys.readouterr()
    np.testing.assert_equal(kept().features, features.features)
    assert f"{path} cannot be read and is written anew" in capsys.readouterr().out
    assert kept().failures == features.failures and len(extractions) == 2
    assert not (workdir / "sprung").exists()


def test_saved_features_need_no_pickle(tmp_path):
    features = evaluation.Features(
        np.array([0]), {"audio": np.ones((1, 1, 3), np.float32)}, failures={1: "no sound"}
    )
    features.save(tmp_path / "f.npz", labels=np.array([1]), classes=["a", "b"], paths=np.array(["a.mp4"]))
    with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays:
        assert {arrays[name].dtype.hasobject for name in arrays.files} == {False}


def calls():
    """(file, line, dotted name, keywords, positional arguments) of every call in the package and its
    scripts."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "avid").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield (
                    path.name,
                    node.lineno,
                    ast.unparse(node.func),
                    {k.arg: ast.unparse(k.value) for k in node.keywords},
                    node.args,
                )


def test_the_order_of_bytes_is_said():
    """Only Python 3.11 and later have a default for it."""
    orders = [args[1:] for _, _, name, _, args in calls() if name.endswith((".from_bytes", ".to_bytes"))]
    assert orders and all(orders)


def test_no_shell_no_pickle_and_no_code_from_data():
    found = list(calls())
    assert {"torch.load", "np.load", "subprocess.run"} <= {name for _, _, name, _, _ in found}
    forbidden = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "pickle.load",
        "pickle.loads",
        "yaml.load",
        "yaml.unsafe_load",
    }
    forbidden |= {
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "joblib.load",
        "shelve.open",
        "marshal.loads",
    }
    for file, line, name, keywords, _ in found:
        assert name not in forbidden, (file, line)
        assert "shell" not in keywords, (file, line)
        assert name != "torch.load" or keywords.get("weights_only") == "True", (file, line)
        assert name != "np.load" or keywords.get("allow_pickle") == "False", (file, line)


def test_links_are_followed_but_lists_do_not_lead_out_of_the_root(workdir, monkeypatch):
    """The owner of a folder makes its links, but a list may come from anyone."""
    (workdir / "elsewhere").mkdir()
    (workdir / "elsewhere" / "e.mp4").touch()
    (workdir / "classes" / "z").symlink_to(workdir / "elsewhere")
    table = evaluation.datasets.load(config.Data(name="folder", root="classes"), "train")
    assert table.paths == ["x/a.mp4", "y/b.mp4", "z/e.mp4"]
    for name, file, line in (
        ("kinetics400", "train.csv", "label,youtube_id,time_start,time_end\ndog,../../elsewhere/e,0,10\n"),
        ("vggsound", "vggsound.csv", "../elsewhere/e,0,dog,train\n"),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "../e.mp4 1\n"),
        ("hmdb51", "testTrainMulti_7030_splits/.._test_split1.txt", "e.mp4 1\n"),
        ("esc50", "meta/esc50.csv", "filename,fold,category,esc10\n../../elsewhere/e.wav,2,dog,True\n"),
    ):
        root = workdir / name
        (root / file).parent.mkdir(parents=True)
        (root / file).write_text(line)
        (root / "ucfTrainTestlist").mkdir(exist_ok=True)
        (root / "ucfTrainTestlist" / "testlist01.txt").touch()
        with pytest.raises(
            evaluation.datasets.DataError, match=r"is not a path below the data root|no list or file"
        ):
            evaluation.datasets.load(config.Data(name=name, root=str(root)), "train")


def test_a_folder_that_links_back_to_itself_is_prepared_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.mp4").touch()
    for name in "xy":
        (tmp_path / "a" / name).symlink_to(tmp_path)
    assert prepare._files(tmp_path) == ["a/b.mp4"]


# ----------------------------------------------------------------------------------------------- as processes


PROGRAMS = ["train.py", "eval_linear.py", "eval_retrieval.py"]
PROGRAMS += [
    "-m avid.data",
    "-m avid.data check",
    "-m avid.data prepare",
    "-m avid.figures",
    "-m avid.figures tasks",
]
PROGRAMS += ["-m avid", "-m avid check", "-m avid prepare", "-m avid weights", "-m avid tasks"]
BENCHMARKS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", [*PROGRAMS, *(f"benchmarks/{path.name}" for path in BENCHMARKS)])
def test_help_does_not_import_torch(script):
    command = [sys.executable, "-X", "importtime", *script.split(), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr[-2000:]
    assert re.findall(r"\| +(torch|torchvision|sklearn|matplotlib|decord|av)$", done.stderr, re.M) == []


@pytest.mark.parametrize(
    "command, message",
    [
        ("train.py data.name=folder data.root=nowhere", "error: folder: no list or file in nowhere"),
        ("eval_linear.py --ckpt nowhere.pt", "error: no checkpoint nowhere.pt"),
        (
            "-m avid.data check --data manifest --root list optim.lr=fast",
            "error: wrong value for optim.lr: fast",
        ),
        ("-m avid.figures tasks temporal.moments=1", "needs temporal.moments=2"),
    ],
)
def test_the_programs_end_with_exit_code_2_and_no_traceback(command, message, workdir):
    script, *rest = command.split()
    argv = [sys.executable, *([script] if script == "-m" else [str(ROOT / script)]), *rest]
    before = contents(workdir)
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr[
        -2000:
    ]
    assert contents(workdir) == before
