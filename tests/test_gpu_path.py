"""A GPU's training step, tested without one: devices and dtypes match, and the host never waits for the
device.

fake_cuda.py runs train.main on tensors without data in a process of its own; these tests check what it
reports.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("fake_cuda.py")
# small networks: what a step asks of the device depends only on the kinds of layers
TINY = (
    "model.depth=1 model.width=8 optim.batch_size=16 video.size=32 video.frames=4 loss.warmup_epochs=0"
).split()
TORCHVISION = ["model.video=r2plus1d_18", "model.width=64", "model.depth=2"]

CASES = {
    f"{cfg}, {world} process{'es' * (world > 1)}, {amp}": (cfg, world, [f"optim.amp={amp}"])
    for cfg, world, amp in itertools.product(
        ("robust", "temporal", "robust_temporal"), (1, 8), ("bf16", "fp16")
    )
} | {
    "float32": ("robust", 1, ["optim.amp=none"]),
    "a spread bank": ("robust", 8, ["bank.spread=true"]),
    "a spread bank in half precision": ("robust", 8, ["bank.spread=true", "bank.dtype=float16"]),
    "all candidates": ("robust", 8, ["bank.num_negatives=all"]),
    "each sample's own candidates": ("xid", 8, ["bank.candidates=own", "loss.form=nce"]),
    "agreement": ("xid", 1, ["bank.candidates=own", "loss.form=nce", "weights.cma=0.25", "init=x.pt"]),
    "harder negatives": ("temporal", 8, ["contrast.tau_n=0.5", "contrast.batch=true"]),
    "recomputed activations": ("robust_temporal", 8, ["optim.checkpoint_activations=true"]),
    "a batch in parts": ("robust_temporal", 8, ["optim.accumulate=2"]),
    "statistics of each rank": ("robust", 8, ["optim.sync_bn=false"]),
    "batch norm in the heads": ("robust", 8, ["model.head_norm=batch"]),
    "clipped gradients": ("robust", 1, ["optim.clip_grad=1"]),
    "r2plus1d_18": ("robust", 8, TORCHVISION),
    "r3d_18": ("robust", 1, [*TORCHVISION, "model.video=r3d_18"]),
    "s3d": ("robust", 8, [*TORCHVISION, "model.video=s3d", "video.frames=16", "video.size=64"]),
}


def results_of(*arguments):
    """The JSON of every RESULT line that a Python process prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{name of a case: what its step asked of the device}."""
    file = tmp_path_factory.mktemp("gpu") / "cases.json"
    file.write_text(json.dumps([(cfg, world, [*TINY, *more]) for cfg, world, more in CASES.values()]))
    return dict(zip(CASES, results_of(str(FAKE), "--cases", str(file)), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_host_never_waits_for_the_device(steps, name):
    step = steps[name]
    assert "error" not in step, step["error"]
    assert step["waits"] == []
    assert step["operations"] > 300  # it was a whole step


@pytest.mark.parametrize("name", CASES)
def test_embeddings_and_features_are_float32_whatever_the_network_computes_in(steps, name):
    output = steps[name]["output"]
    amp = {"bf16": "bfloat16", "fp16": "float16"}.get(name.rpartition(" ")[2], "bfloat16")
    for what, dtype in output.items():
        half = what not in ("video", "audio", "video_features", "audio_features")
        assert dtype == (f"torch.{amp}" if half else "torch.float32"), what


def test_equal_buffers_are_not_broadcast(steps):
    assert steps["robust, 8 processes, bf16"]["broadcast_buffers"] is False
    assert steps["statistics of each rank"]["broadcast_buffers"] is True


def test_collectives_of_a_step_do_not_depend_on_the_number_of_terms(steps):
    """Two for each batch norm, then one each for instances, embeddings and terms; with tasks, one for their
    counts.
    """
    robust, both = (
        steps[f"{cfg}, 8 processes, bf16"]["collectives"] for cfg in ("robust", "robust_temporal")
    )
    assert steps["statistics of each rank"]["collectives"] == 3
    assert robust == 3 + 2 * 26 and both == robust + 1


WAITS = {
    "a number is read": "output.video.sum().item()",
    "a condition is evaluated": "bool(output.video.sum() > 0)",
    "a boolean mask": "output.video[output.video[:, 0] > 0]",
    "a number from the host": "torch.tensor(1.0, device=output.video.device)",
    "a number from the host, assigned in place": "output.video.detach().sum(1)[-1] = 0",
    "a count that a kernel copies": (
        "torch.batch_norm_gather_stats(*[output.video.detach()] * 3, None, None, 0.1, 1e-5, 3)"
    ),
    "pageable memory": "torch.zeros(300).to(output.video.device, non_blocking=True)",
    "a blocking copy": "torch.zeros(3).pin_memory().to(output.video.device)",
    "a copy to the host": "output.video.detach().cpu()",
    "a copy over another": "torch.zeros_like(output.video).copy_(torch.zeros(output.video.shape))",
}
MISMATCHES = {
    "devices": "output.video + torch.zeros(output.video.shape)",
    "dtypes": "output.video @ output.video.T.half()",
}
FINE = {
    "pinned memory": "torch.zeros(3).pin_memory().to(output.video.device, non_blocking=True)",
    "a Python number": "torch.where(output.video > 0, output.video, 0.0)",
    "a row that is filled": "output.video.detach().clone()[-1] = 0",
    "a copy to the host that does not block": "output.video.detach().to('cpu', non_blocking=True)",
}
WITHIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import fake_cuda, torch
from avid import config

def within(watch, output):
    for code in json.loads(sys.argv[3]):
        error, before = "", len(watch.step.waits)
        try:
            exec(code)
        except Exception as raised:
            error = type(raised).__name__
        print("RESULT " + json.dumps([len(watch.step.waits) - before, error]))

fake_cuda.run_step(config.load("robust", json.loads(sys.argv[2])), within=within)
"""


def test_the_fake_gpu_reports_waits_and_mismatches():
    """Otherwise the tests above would prove nothing."""
    codes = WAITS | MISMATCHES | FINE
    given = [str(FAKE.parent), json.dumps(TINY), json.dumps([*codes.values()])]
    results = dict(zip(codes, results_of("-c", WITHIN, *given), strict=True))
    for what, (waits, error) in results.items():
        assert waits == (what in WAITS), (what, waits, error)
        assert (error == "RuntimeError") == (what in MISMATCHES), (what, error)
