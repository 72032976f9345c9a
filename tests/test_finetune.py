"""Fine-tuning on a toy world that is written within a second. Tests that need processes of their own run this
file as a script, which fine-tunes.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script: this folder's parent holds avid
from avid import cli, config, data, datasets, distributed, evaluation, finetune, models, run, toy

TINY = (
    "toy.train=20 toy.test=6 toy.seconds=1 toy.size=32 data.workers=0 video.size=32 video.frames=4 "
    "audio.seconds=0.5 audio.mels=32 model.width=4 model.depth=1 model.embedding=16 eval.clips=2 "
    "eval.batch_size=20 finetune.batch_size=10 finetune.epochs=4 finetune.warmup_epochs=2 "
    "finetune.lr=1e-3 log.every_steps=4"
).split()


def subject_of(*overrides):
    """An untrained network under the tiny settings."""
    cfg = config.load("toy", [*TINY, *overrides])
    torch.manual_seed(cfg.seed)
    network = models.AudioVisual(cfg.model).eval()
    return evaluation.Subject(network, cfg, torch.device("cpu"), "random", "untrained, seed 0", Path("."))


def tables_of(subject, root):
    folder = toy.write(root, subject.cfg.toy, subject.cfg.seed, 1, progress=False)
    source = dataclasses.replace(subject.cfg.data, root=str(folder))
    return datasets.load(source, "train"), datasets.load(source, "test")


def script(root, out, *overrides):
    subject = subject_of(*overrides)
    result = finetune.finetune(subject, *tables_of(subject, root), "video", out)
    if distributed.rank() == 0:
        (Path(out) / "result.json").write_text(json.dumps(result))
    distributed.end()


def start_process(root, out, *overrides, ranks=1):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    command = [sys.executable, *launcher, __file__, str(root), str(out), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def saved(out, modality="video"):
    state = torch.load(out / f"finetune-{modality}-toy-train.pt", weights_only=True)
    state.pop("metrics_bytes")  # the log holds speeds
    return state


def assert_same(a, b):
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(autouse=True)
def restored_settings():
    """One thread, as in the processes; threads and signal handlers are restored afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (folder of the toy, run folder, result, subject)."""
    torch.set_num_threads(1)
    root, out = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("whole")
    subject = subject_of()
    before = {name: x.clone() for name, x in subject.network.state_dict().items()}
    result = finetune.finetune(subject, *tables_of(subject, root), "video", out)
    assert_same(subject.network.state_dict(), before)  # the next division starts from the same network
    return root, out, result, subject


@pytest.mark.parametrize("modality", data.MODALITIES)
def test_fine_tuning_learns_the_training_videos(whole, modality, tmp_path):
    root = whole[0]
    clips = "video.crop_area=[0.9,1]", "video.jitter=[0,0,0,0]", "video.flip=0"
    settings = "finetune.lr=1e-2", "finetune.epochs=25", "finetune.dropout=0", "finetune.milestones=[0.8]"
    subject = subject_of("model.width=8", *clips, *settings)
    train, _ = tables_of(subject, root)
    result = finetune.finetune(subject, train, train, modality, tmp_path)
    assert result["top1"] >= 60 and result["clip_top1"] >= 50  # chance: 10
    assert result["top5"] >= result["top1"]
    assert (result["videos"], result["train_videos"], result["skipped"]) == (20, 20, 0)


def test_the_warm_up_moves_the_linear_layer_alone(whole, tmp_path):
    """In the encoder only the batch-norm statistics change."""
    subject = subject_of("finetune.epochs=1", "finetune.warmup_epochs=3", "log.checkpoint_minutes=0")
    states = {}

    def keep(path, state):
        states[state["step"]] = {name: x.clone() for name, x in state["classifier"].items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "save_checkpoint", keep)
        finetune.finetune(subject, *tables_of(subject, whole[0]), "video", tmp_path)
    start = subject.network.video_model.state_dict()
    moved = {
        step: {name for name in start if not torch.equal(state[f"encoder.{name}"], start[name])}
        for step, state in states.items()
    }
    parameters = {name for name, _ in subject.network.video_model.named_parameters()}
    assert list(states) == list(range(1, 9))
    assert not moved[6] & parameters and any("running_mean" in name for name in moved[6])
    assert moved[7] >= parameters
    assert not torch.equal(states[1]["linear.weight"], states[6]["linear.weight"])


def test_the_learning_rate_falls_at_the_milestones(whole, tmp_path):
    settings = (
        "finetune.milestones=[0.25,0.5]",
        "finetune.gamma=0.1",
        "finetune.warmup_epochs=1",
        "log.checkpoint_minutes=0",
    )
    subject = subject_of(*settings)
    rates = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run,
            "save_checkpoint",
            lambda path, state: rates.append(state["optimizer"]["param_groups"][0]["lr"]),
        )
        finetune.finetune(subject, *tables_of(subject, whole[0]), "video", tmp_path)
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 2 + [1e-5] * 4)  # 2 steps an epoch; warm-up first


def test_dropout_is_a_function_of_seed_and_step():
    a, b, c = (finetune.dropout(0.3, (400, 50), *key) for key in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert a.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(finetune.dropout(0.0, (4, 5), 0, 1), torch.ones(4, 5))


def test_a_finished_run_is_only_tested(whole):
    root, out, result, subject = whole
    before = (out / "finetune-video-toy-train.pt").stat().st_mtime_ns
    assert finetune.finetune(subject, *tables_of(subject, root), "video", out) == result
    assert (out / "finetune-video-toy-train.pt").stat().st_mtime_ns == before


def test_clips_are_plain_whatever_the_checkpoint_was_trained_with(whole, tmp_path):
    """A network that learned temporal tasks is fine-tuned on the same clips as any other."""
    root, out, result, _ = whole
    subject = subject_of("temporal={moments: 2, speeds: [1, 2], reverse: true}")
    assert finetune.finetune(subject, *tables_of(subject, root), "video", tmp_path) == result
    assert_same(saved(tmp_path), saved(out))


def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path):
    root, out, result, subject = whole
    file = tmp_path / "finetune-video-toy-train.pt"
    running = start_process(root, tmp_path, "log.checkpoint_minutes=0")
    deadline, versions = time.monotonic() + 120, set()
    while len(versions) < 4:  # about the end of the warm-up
        assert running.poll() is None and time.monotonic() < deadline, running.stdout.read()
        versions |= {file.stat().st_mtime_ns} if file.exists() else set()
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert saved(tmp_path)["step"] < 12
    assert finetune.finetune(subject, *tables_of(subject, root), "video", tmp_path) == result
    assert_same(saved(tmp_path), saved(out))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_the_run_finishes_the_step_saves_and_exits(whole, number, tmp_path, capsys):
    root, out, result, subject = whole
    tables = tables_of(subject, root)
    count, steps = data.BadFiles.count, []

    def signalled(*arguments):  # in the fifth step, the first that trains the whole network
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(number)
        return count(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(data.BadFiles, "count", signalled)
        finetune.finetune(subject, *tables, "video", tmp_path)
    assert left.value.code == 128 + number
    assert "after step 5, saved; the same command goes on from here" in capsys.readouterr().out
    assert saved(tmp_path)["step"] == 5
    assert finetune.finetune(subject, *tables, "video", tmp_path) == result
    assert_same(saved(tmp_path), saved(out))


def test_two_processes_equal_one(whole, tmp_path):
    """Also with a bad file, which may be drawn by one of them only."""
    root = shutil.copytree(whole[0], tmp_path / "world")
    subject = subject_of("finetune.lr=1e-4")
    train, test = tables_of(subject, root)
    (train.root / train.paths[3]).write_text("no video")
    result = finetune.finetune(subject, train, test, "video", tmp_path / "1")
    assert result["skipped"] == 1
    running = start_process(root, tmp_path / "2", "finetune.lr=1e-4", ranks=2)
    text = running.communicate(timeout=300)[0]
    assert running.returncode == 0, f"the processes say: {text[-3000:]}"
    assert json.loads((tmp_path / "2" / "result.json").read_text()) == result
    one, two = (saved(tmp_path / name)["classifier"] for name in "12")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_bad_files_are_named_replaced_and_counted(whole, tmp_path, capsys):
    """They are still counted when a finished run is only tested again."""
    root, _, _, subject = whole
    train, test = (dataclasses.replace(t, paths=list(t.paths)) for t in tables_of(subject, root))
    for table in (train, test):
        (table.root / "broken.mp4").write_text("no video")
        table.paths[3] = "broken.mp4"
    cfg = dataclasses.replace(subject.cfg, data=dataclasses.replace(subject.cfg.data, max_bad_share=0.5))
    first = finetune.finetune(dataclasses.replace(subject, cfg=cfg), train, test, "video", tmp_path)
    assert (first["videos"], first["train_videos"], first["skipped"]) == (5, 19, 2)
    assert capsys.readouterr().out.count(f"skipped {train.root / 'broken.mp4'}: ") == 2  # once of each table
    assert finetune.finetune(dataclasses.replace(subject, cfg=cfg), train, test, "video", tmp_path) == first


def test_too_many_bad_files_end_the_run(whole, tmp_path):
    root, _, _, subject = whole
    train, test = tables_of(subject, root)
    (train.root / "broken.mp4").write_text("no video")
    train = dataclasses.replace(train, paths=["broken.mp4"] * 5 + train.paths[5:])
    with pytest.raises(data.MediaError, match=r"data.max_bad_share = 0.1; the lines above name them"):
        finetune.finetune(subject, train, test, "video", tmp_path)


def test_unusable_data_and_settings_are_refused(whole, tmp_path):
    root, out, _, subject = whole
    train, test = tables_of(subject, root)
    nothing = dataclasses.replace(test, labels=np.full(len(test), -1))
    with pytest.raises(datasets.DataError, match="6 of 6 files have no class"):
        finetune.finetune(subject, train, nothing, "video", tmp_path)
    with pytest.raises(config.ConfigError, match=r"finetune.batch_size: 21; expected at most 20"):
        finetune.finetune(subject_of("finetune.batch_size=21"), train, test, "video", tmp_path)
    with pytest.raises(config.ConfigError, match=r"finetune.lr was 0.001 and is 0.5\); choose another --out"):
        finetune.finetune(subject_of("finetune.lr=0.5"), train, test, "video", out)
    with pytest.raises(config.ConfigError, match="videos was"):
        finetune.finetune(subject, datasets.take(train, slice(1, None)), test, "video", out)
    with pytest.raises(
        FloatingPointError, match=r"up to step 11, were not finite .*; try a lower finetune.lr"
    ):
        finetune.finetune(subject_of("finetune.lr=1e38"), train, test, "video", tmp_path)


def test_the_log_lies_beside_the_checkpoint(whole):
    _, out, _, _ = whole
    lines = [json.loads(line) for line in (out / "finetune-video-toy-train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]  # log.every_steps=4
    assert all({"epoch", "loss", "grad_norm", "lr", "clips_per_s"} <= line.keys() for line in lines)


def test_a_step_that_is_not_finite_moves_nothing_and_is_named(whole, tmp_path, monkeypatch):
    """Not even the batch-norm statistics. It is the third of the warm-up's four steps."""
    root, _, _, subject = whole
    states, loss = {}, finetune.F.cross_entropy

    def keep(path, state):
        states[state["step"]] = {name: x.clone() for name, x in state["classifier"].items()}

    def spoilt(logits, target):
        return loss(logits, target) * (float("inf") if len(states) == 2 else 1.0)

    monkeypatch.setattr(run, "save_checkpoint", keep)
    monkeypatch.setattr(finetune.F, "cross_entropy", spoilt)
    subject = subject_of("log.checkpoint_minutes=0", "finetune.epochs=1")
    finetune.finetune(subject, *tables_of(subject, root), "video", tmp_path)
    assert_same(states[3], states[2])
    assert not torch.equal(states[4]["linear.weight"], states[3]["linear.weight"])
    lines = map(json.loads, (tmp_path / "finetune-video-toy-train.jsonl").read_text().splitlines())
    (named,) = [line for line in lines if "not_finite" in line]
    assert named["step"] == 3 and len(named["files"]) == 10


def test_a_second_run_of_the_same_fine_tuning_is_refused(whole, tmp_path):
    """The error names the other process. Fine-tuning the other modality meanwhile is allowed."""
    root, _, _, subject = whole
    path = tmp_path / "finetune-video-toy-train.pt"
    child = os.fork()
    if not child:
        held = run.files.lock(path, path)  # as long as the file is open
        time.sleep(100 if held else 0)
    try:
        while (
            not (tmp_path / f".{path.name}.lock").exists()
            or not (tmp_path / f".{path.name}.lock").read_text()
        ):
            time.sleep(0.01)
        with pytest.raises(
            config.ConfigError, match=rf"{path} is in use by process {child} on .*choose another"
        ):
            finetune.finetune(subject, *tables_of(subject, root), "video", tmp_path)
        finetune.finetune(subject, *tables_of(subject, root), "audio", tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    finetune.finetune(
        subject, *tables_of(subject, root), "video", tmp_path
    )  # the kernel has released the lock


def test_the_network_stays_on_the_device_of_its_process(tmp_path, monkeypatch):
    """Each process has its own GPU, from the start and while batch norm is calibrated."""
    world = distributed.World(3, 4, torch.device("meta"))
    monkeypatch.setattr(distributed, "start", lambda: world)
    arguments = ["--ckpt", "random", "--out", str(tmp_path), *TINY]
    subject = evaluation.subject(cli.evaluation_parser("").parse_args(arguments))
    assert subject.device == world.device
    assert {x.device for x in subject.network.state_dict().values()} == {world.device}


def test_evaluation_computes_in_the_precision_of_the_run(whole, monkeypatch):
    asked, plain = [], run.autocast
    monkeypatch.setattr(
        run, "autocast", lambda amp, device: asked.append((amp, device)) or plain(amp, device)
    )
    subject = subject_of("optim.amp=fp16", "temporal={speeds: [1, 2]}", "weights.speed_video=1")
    _, table = tables_of(subject, whole[0])
    clips = data.Clips(table, subject.cfg, training=False, clips=1)
    evaluation.extract(subject.network, clips, subject.device)
    assert set(asked) == {("fp16", subject.device)}
    asked.clear()
    evaluation.confusions(subject.network, table, subject.cfg, subject.device, draws=1)
    assert set(asked) == {("fp16", subject.device)}


if __name__ == "__main__":
    script(*sys.argv[1:])
