"""train.py as a user runs it: in processes of its own, on a toy world that is written within a second or two.

Most processes are forked from one that has already imported everything (see forked.py).
"""

import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch

from avid import config, models

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = (
    "toy.train=24 toy.test=8 toy.seconds=2 toy.size=32 data.workers=0 video.size=32 video.frames=4 "
    "audio.seconds=0.5 audio.mels=32 model.width=4 model.depth=1 model.embedding=16 bank.num_negatives=16 "
    "optim.batch_size=8 optim.epochs=4 log.every_steps=1 log.check_epochs=2 eval.clips=2"
).split()


def command(root, out, *overrides, ranks=1, script="train.py"):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    return [
        sys.executable,
        *launcher,
        str(ROOT / script),
        f"out={out}",
        f"data.root={root}",
        *TINY,
        *overrides,
    ]


def start(root, out, *overrides, rank="", environment=None, before=None):
    """A process that trains, and the file that it prints to."""
    log = Path(f"{out}{rank}.log")
    log.write_text("")
    words = (f"out={out}", f"data.root={root}", *TINY, *overrides)
    return forked.start("train.py", words, root, log, environment, before), log


def run(root, out, *overrides, ranks=1, before=None):
    """Train in this many processes, which must end well; what they print."""
    environments = {"": {}}
    if ranks > 1:
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
        environments = {r: shared | dict.fromkeys(("RANK", "LOCAL_RANK"), str(r)) for r in range(ranks)}
    started = [
        start(root, out, *overrides, rank=rank, environment=environment, before=before)
        for rank, environment in environments.items()
    ]
    text = ""
    for process, log in started:
        process.join(300)
        text += log.read_text()
        assert process.exitcode == 0, text[-3000:]
    return text


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def final(out):
    return torch.load(out / "last.pt", weights_only=True)


def assert_same(a, b, path=""):
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("out", "root", "metrics_bytes"):  # the log holds speeds
                assert_same(a[key], b[key], f"{path}.{key}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), path
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}.{i}")
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, robust after two epochs: (folder of the toy, run folder, what it printed)."""
    root = tmp_path_factory.mktemp("world")
    words = command(root, root / "whole", *ROBUST)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, root / "whole", done.stdout + done.stderr


TASKS = (
    "temporal.moments=2 temporal.speeds=[1,2] temporal.reverse=true weights.contrast_vv=1 "
    "weights.contrast_aa=1 weights.contrast_va=1 weights.contrast_av=1 weights.speed_video=1 "
    "weights.speed_audio=1 weights.direction_video=1 weights.direction_audio=1 weights.order_video=1 "
    "weights.order_audio=1 weights.order_cross=1 contrast.k_pos=4 contrast.n_pos=2 contrast.negatives=8 "
    "contrast.batch=true "
    "video.grey=0.2 audio.mask_time=0.2 audio.mask_frequency=0.2 audio.seconds=0.25"
).split()
ROBUST = "loss.w_min=0.25 loss.soft=0.5 loss.warmup_epochs=2".split()
AVID_CMA = (
    "optim.draws=copies loss.soft=0 bank.candidates=own loss.form=nce weights.cma=0.5 agreement.positives=4 "
    "agreement.negatives=8 agreement.every_epochs=1"
).split()


def test_a_run_leaves_what_a_user_expects(whole):
    _, out, text = whole
    assert {"config.yaml", "metrics.jsonl", "last.pt", "curves.png"} <= {path.name for path in out.iterdir()}
    steps = [line for line in metrics(out) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"epoch", "xid", "lr", "clips_per_s", "data_wait"} <= steps[0].keys()
    checks = [line for line in metrics(out) if "v→a class R@1" in line]
    assert [line["step"] for line in checks] == [6, 12]
    assert {"cosine_video", "cosine_audio", "agreement_mean"} <= checks[0].keys()
    assert "eval_linear.py --ckpt" in text
    assert "\r" not in text  # no terminal: progress in plain lines


def test_the_same_seed_gives_the_same_bits(whole):
    root, out, _ = whole
    run(root, root / "again", *ROBUST)
    assert_same(final(out), final(root / "again"))


def test_another_seed_gives_another_network(whole):
    root, out, _ = whole
    run(root, root / "other", *ROBUST, "seed=1", "optim.epochs=1", "log.check_epochs=0")
    assert not torch.equal(
        final(out)["network"]["audio_model.conv1.0.weight"],
        final(root / "other")["network"]["audio_model.conv1.0.weight"],
    )


@pytest.mark.parametrize(
    "more",
    [["optim.draws=iid"], ["optim.draws=epoch", *TASKS], AVID_CMA],
    ids=["robust, iid", "all tasks, epochs", "AVID+CMA, copies"],
)
def test_a_run_killed_at_a_random_step_resumes_to_the_same_bits(whole, more, tmp_path):
    root, _out, _ = whole
    settings = (*ROBUST, "log.checkpoint_minutes=0", *more)
    reference = tmp_path / "reference"
    run(root, reference, *settings)
    killed = tmp_path / "killed"
    after = random.Random(more[0]).randrange(2, 11)  # steps
    process, _ = start(root, killed, *settings)
    deadline = time.monotonic() + 120
    while not (killed / "metrics.jsonl").exists() or len(metrics_so_far(killed)) < after:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    text = run(root, killed, *settings)
    assert "resuming" in text or not (killed / "last.pt").exists()
    assert_same(final(reference), final(killed))
    drop = ("clips_per_s", "data_wait")
    clean = [
        [{k: v for k, v in line.items() if k not in drop} for line in metrics(folder)]
        for folder in (reference, killed)
    ]
    assert clean[0] == clean[1]


def metrics_so_far(out):
    return (out / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_the_run_finishes_the_step_saves_and_exits(whole, number, tmp_path):
    root, out, _ = whole
    process, printed = start(root, tmp_path / "run", *ROBUST, "data.workers=1")
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):  # a step is done
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(120)
    text = printed.read_text()
    assert process.exitcode == 128 + number
    assert "saved; the same command goes on from here" in text and "Traceback" not in text
    run(root, tmp_path / "run", *ROBUST, "data.workers=1")
    saved, reference = final(tmp_path / "run"), final(out)
    saved.pop("config"), reference.pop("config")
    assert_same(saved, reference)


def in_float64():
    scaler = torch.amp.GradScaler
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    torch.amp.GradScaler = lambda device, **_: scaler(device, enabled=False)  # it supports float32 only


@pytest.mark.parametrize(
    "more",
    [["optim.draws=iid"], ["optim.draws=epoch", *TASKS], AVID_CMA],
    ids=["robust, iid", "all tasks, epochs", "AVID+CMA, copies"],
)
def test_two_processes_equal_one(whole, more, tmp_path):
    """Twelve steps, six of them robust. They run in float64: in float32, batch norm, max-pooling and Adam
    amplify rounding to 1e-4. Batch norm takes its statistics over both ranks (optim.sync_bn), so only the
    global batch counts.
    """
    root, _, _ = whole
    for ranks in (1, 2):
        settings = (*ROBUST, "log.check_epochs=0", *more)
        run(root, tmp_path / str(ranks), *settings, ranks=ranks, before=in_float64)
    one, two = (final(tmp_path / name) for name in "12")
    for line, other in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        for name in line.keys() - {"clips_per_s", "data_wait"}:
            assert line[name] == pytest.approx(other[name], rel=1e-7), (line["step"], name)
    for part in ("bank", "network"):
        for name, value in one[part].items():
            torch.testing.assert_close(
                value, two[part][name], atol=1e-7, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
            )


# ------------------------------------------------------------------------------------------- a batch in parts


@pytest.fixture
def float64(monkeypatch):
    """Whatever the network converts to float32 becomes float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def two_networks(head_norm="none"):
    """The same small network twice, in float64, and a batch of eight clips of picture and sound."""
    torch.manual_seed(0)
    network = (
        models.AudioVisual(config.Model(width=4, depth=1, embedding=8, head_norm=head_norm)).double().train()
    )
    clips = torch.randn(8, 3, 2, 16, 16).double(), torch.randn(8, 1, 16, 16).double()
    return network, copy.deepcopy(network), clips


def losses_and_gradients(network, clips, forward=None):
    """A loss in which every clip meets every other one, its gradients, and the running statistics."""
    output = (network if forward is None else forward)(*clips)
    loss = (output[0] @ output[1].T).logsumexp(1).sum() + (output[2].square().sum() + output[3].sum()) / 100
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in network.named_parameters()}, dict(network.named_buffers())


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_in_parts_the_loss_is_that_of_the_whole_batch(float64):
    """Its gradient too, if batch norm takes no statistics: those would be of a part."""
    network, same, clips = two_networks()
    for each in (network, same):
        for module in each.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
    models.in_parts(network, 4)
    assert_close(losses_and_gradients(network, clips), losses_and_gradients(same, clips))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("head_norm", ["none", "batch"])
def test_in_parts_batch_norm_takes_the_statistics_of_each_part_and_counts_it_once(
    head_norm, checkpointed, float64
):
    network, same, clips = two_networks(head_norm)

    def one_after_the_other(video, audio):
        outputs = [same(*part)[:4] for part in zip(video.chunk(4), audio.chunk(4), strict=True)]
        return [torch.cat(x) for x in zip(*outputs, strict=True)]

    if checkpointed:
        models.checkpoint_activations(network)
    models.in_parts(network, 4)
    found, expected = (
        losses_and_gradients(network, clips),
        losses_and_gradients(same, clips, one_after_the_other),
    )
    assert_close(found, expected)
    assert network.video_model.conv1[1].num_batches_tracked == 4
    network.eval(), same.eval()
    assert_close(network(*clips)[:4], same(*clips)[:4])


def test_in_parts_only_one_part_is_kept_for_backward(float64):
    kept = {}
    for parts in (1, 4):
        network, _, clips = two_networks()
        if parts > 1:
            models.in_parts(network, parts)
        sizes = {}

        def keep(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = network(*clips)
        kept[parts] = sum(sizes.values())
        del output
    assert kept[4] < kept[1] / 4  # this counts the clips and the parameters too


def test_a_run_in_parts_trains_and_resumes(whole):
    """It resumes with another number of parts and logs the change; a number that does not divide the batch is
    refused.
    """
    root, _, _ = whole
    settings = (*ROBUST, "log.check_epochs=0", "optim.schedule=constant")
    run(root, root / "parts", *settings, "optim.epochs=1", "optim.accumulate=2")
    text = run(root, root / "parts", *settings, "optim.epochs=2", "optim.accumulate=4")
    assert "from here on optim.accumulate was 2 and is 4" in text
    assert all(line["loss"] > 0 for line in metrics(root / "parts"))
    done = subprocess.run(
        command(root, root / "odd", "optim.accumulate=3"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: optim.accumulate=3 does not divide the 8 videos of a process; choose a divisor\n"
    )


def test_fewer_epochs_than_are_done_end_a_run_where_it_is(whole):
    root, _, _ = whole
    settings = (*ROBUST, "log.check_epochs=0")
    run(root, root / "fewer", *settings, "optim.epochs=2")
    before = final(root / "fewer")
    text = run(root, root / "fewer", *settings, "optim.epochs=1")
    assert "6 steps done" in text and "6 of 6 steps" in text
    assert_same(final(root / "fewer"), before)


def test_other_settings_do_not_resume(whole):
    root, out, _ = whole
    done = subprocess.run(
        command(root, out, *ROBUST, "loss.delta=1"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "loss.delta was" in done.stderr and "Traceback" not in done.stderr


def test_the_evaluations_write_their_results(whole):
    root, out, _ = whole
    for ckpt in (str(out / "last.pt"), "random"):
        folder = out if ckpt != "random" else root / "random"
        for script in ("eval_linear.py", "eval_retrieval.py"):
            words = ("--ckpt", ckpt, "--root", root, "--out", folder, *TINY)
            forked.run(script, words, root)
        for name in ("linear-video", "linear-audio", "retrieval-video", "retrieval-audio", "retrieval-cross"):
            result = json.loads((folder / f"{name}-toy-test.json").read_text())
            assert result["videos"] == 8 and result["seed"] == 0 and result["checkpoint"] == ckpt
        assert (folder / "retrieval-cross-toy.png").stat().st_size > 10_000
