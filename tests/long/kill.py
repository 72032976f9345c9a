"""Kills a training and its evaluations at random moments and starts them again until each ends by itself: the
end must be that of the undisturbed run.

    python tests/long/kill.py --kills 25 --seed 0

In: nothing; a toy world is written below --folder (default: a temporary folder). Out: how many kills hit
what, and exit code 0 if weights, bank, optimizer, log, features and results are bit for bit those of the
undisturbed run.

The moments of a phase are uniform over its undisturbed course, in files of the toy, steps, checks or seconds.
After every kill, every file with a final name must be whole, and no process of the group may be left.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]  # tests, and the project
import forked

from avid import run

SETTINGS = (
    "out=run data.root=world toy.train=16 toy.test=4 toy.seconds=1 toy.size=32 data.workers=1 video.size=32 "
    "video.frames=4 audio.seconds=0.5 audio.mels=32 model.width=8 model.depth=1 model.embedding=64 "
    "bank.num_negatives=16 optim.batch_size=8 optim.epochs=12 log.every_steps=1 log.check_epochs=6 "
    "log.checkpoint_minutes=0 loss.w_min=0.25 loss.soft=0.5 loss.warmup_epochs=2 eval.clips=2"
).split()
FILES, STEPS, CHECKS = 20, 24, 2
CKPT = ["--ckpt", "run/last.pt"]
STAGES = {
    "train": ["train.py"],
    "linear": ["eval_linear.py", *CKPT],
    "retrieval": ["eval_retrieval.py", *CKPT],
}
PHASES = {  # phase that a kill hits: its stage
    "the toy being written": "train",
    "start and resume": "train",
    "a step": "train",
    "a checkpoint being written": "train",
    "a check of held-out videos": "train",
    "features being computed": "linear",
    "features being written": "linear",
    "retrieval": "retrieval",
}
SPEEDS = ("clips_per_s", "data_wait")


def start(folder, stage):
    """A stage in a process group of its own; its output goes to <folder>/log."""
    script, *arguments = STAGES[stage]
    return forked.start(script, [*arguments, *SETTINGS], folder, folder / "log")


def seen(folder, log_from=0):
    """How far a run is, as its files show."""
    run, metrics = folder / "run", folder / "run" / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    features = [path.name for path in (run / "features").iterdir()] if (run / "features").is_dir() else []
    with open(folder / "log", "rb") as log:
        log.seek(log_from)
        bar = b" train:" in log.read()
    return {
        "files": sum(1 for _ in folder.glob("world/*/*/*.mp4")),
        "world": any(folder.glob("world/*/manifest.csv")),
        "steps": sum(b'"loss"' in line for line in lines),
        "checks": sum(b"agreement_mean" in line for line in lines),
        "checkpoint_part": (run / "last.pt.part").exists(),
        "bar": bar,
        "features_part": any(name.endswith(".part") for name in features),
        "features": sum(name.endswith(".npz") for name in features),
    }


def undisturbed(folder, stages):
    """Run the stages; returns the seconds that each phase took, or one file, step or write of it."""
    seconds = {}
    for stage in stages:
        begin, at, log_from = time.monotonic(), [], (folder / "log").stat().st_size
        process = start(folder, stage)
        while process.is_alive():
            now = seen(folder, log_from)
            if not at or now != at[-1][1]:
                at.append((time.monotonic(), now))
            time.sleep(0.004)
        require_success(process, folder)
        end = time.monotonic()

        def first(holds, at=at, end=end):
            return next((t for t, now in at if holds(now)), end)

        if stage == "train":
            write_s = [b[0] - a[0] for a, b in itertools.pairwise(at) if a[1]["checkpoint_part"]]
            one, all_of = first(lambda now: now["steps"] >= 1), first(lambda now: now["steps"] == STEPS)
            seconds["the toy being written"] = (
                first(lambda now: now["world"]) - first(lambda now: now["files"])
            ) / FILES
            seconds["start and resume"] = one - first(lambda now: now["world"])
            seconds["a step"] = (all_of - one) / (STEPS - 1)
            seconds["a checkpoint being written"] = float(np.median(write_s)) if write_s else 0.0
            seconds["a check of held-out videos"] = end - all_of
        elif stage == "linear":
            seconds["features being computed"] = first(lambda now: now["features"] == 2) - first(
                lambda now: now["bar"]
            )
            seconds["features being written"] = (
                0.0  # too short to be seen: the kill comes as soon as the file is there
            )
        else:
            seconds["retrieval"] = end - begin
    return seconds


def require_success(process, folder):
    if process.exitcode:
        raise SystemExit(f"a stage ended with {process.exitcode}:\n{(folder / 'log').read_text()[-3000:]}")


def draw(phase, rng):
    """(step at which it comes, moment): a moment of a phase, drawn uniformly over it."""
    if phase == "the toy being written":
        return -1, rng.uniform(0, FILES)
    if phase == "a check of held-out videos":
        check = rng.randrange(CHECKS)
        return (check + 1) * STEPS // CHECKS, check + rng.random()
    if phase == "start and resume":
        return rng.randrange(STEPS), rng.random()
    at = rng.uniform(0, STEPS - 1)
    return at, at


def kill(folder, phase, moment, seconds):
    """Start the phase's stage and kill its group at the moment.

    Returns the phase that was hit; "" if the stage had ended before.
    """
    log_from = (folder / "log").stat().st_size
    process = start(folder, PHASES[phase])
    whole, part = int(moment), moment % 1
    # the fraction of a moment is a share of one file, step or write, or else of the whole phase
    reached = {
        "the toy being written": lambda now: now["files"] >= whole,
        "start and resume": lambda now: True,
        "a step": lambda now: now["steps"] >= whole,
        "a checkpoint being written": lambda now: now["steps"] >= whole and now["checkpoint_part"],
        "a check of held-out videos": lambda now: (
            now["steps"] >= (whole + 1) * STEPS // CHECKS and now["checks"] == whole
        ),
        "features being computed": lambda now: now["bar"],
        "features being written": lambda now: now["features_part"],
        "retrieval": lambda now: True,
    }[phase]
    while not reached(seen(folder, log_from)):
        if not process.is_alive():
            require_success(process, folder)
            return ""
        if phase == "features being written" and seen(folder, log_from)["bar"]:
            kill_during_write(folder / "run" / "features", process)  # the file is there for a millisecond
        elif "written" not in phase:
            time.sleep(0.002)
    time.sleep(part * seconds[phase])
    before = seen(folder, log_from)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode != -signal.SIGKILL:
        require_success(process, folder)
        return ""
    if left := forked.left(process.pid, seconds=10):
        raise SystemExit(f"processes {left} are left of a killed group")
    after = seen(folder, log_from)
    if PHASES[phase] == "retrieval":
        return phase
    if PHASES[phase] == "linear":
        if after["features_part"]:
            return "features being written"
        return "features being computed" if after["bar"] and after["features"] < 2 else "linear probe"
    if after["checkpoint_part"]:
        return "a checkpoint being written"
    if phase == "a checkpoint being written":
        return "a step"
    if phase == "a check of held-out videos" and after["checks"] > before["checks"]:
        return "a step"
    return phase


def kill_during_write(features, process):
    """Wait for a file that is being written, and kill at once."""
    while process.is_alive():
        for _ in range(1000):
            with contextlib.suppress(FileNotFoundError):
                if any(name.endswith(".part") for name in os.listdir(features)):
                    os.killpg(process.pid, signal.SIGKILL)
                    return


def require_whole_files(folder, reference):
    """Every file with a final name must be readable, and every video that of the undisturbed run."""
    for path in folder.glob("world/*/*/*.mp4"):
        if path.read_bytes() != (reference / path.relative_to(folder)).read_bytes():
            raise SystemExit(f"{path} is not what the undisturbed run wrote")
    for path in folder.glob("run/*.pt"):
        run.load_checkpoint(path)
    for path in folder.glob("run/features/*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                assert arrays[name] is not None
    for path in folder.glob("run/*.json"):
        json.loads(path.read_text(encoding="utf-8"))


def outcome(folder):
    """{name: value} of everything that a user keeps, except speeds and names with the checkpoint's hash."""
    state = run.load_checkpoint(folder / "run" / "last.pt")
    state.pop("metrics_bytes")  # the log holds speeds
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    state["log"] = [{name: value for name, value in line.items() if name not in SPEEDS} for line in lines]
    for path in folder.glob("run/features/*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            videos = len(arrays["index"])
            state |= {
                f"features of {videos} videos, {name}": torch.from_numpy(arrays[name])
                for name in arrays.files
                if name != "failures"
            }
    for path in folder.glob("run/*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        state[path.name] = {name: value for name, value in result.items() if name != "checkpoint_hash"}
    state["leftover"] = sorted(
        str(path.relative_to(folder / "world")) for path in folder.glob("world/**/*.part")
    )
    return state


def differences(a, b, name=""):
    """The names under which two nested results are not bit for bit the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f"{name}/{key}")
        ]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{name}/{i}")]
    if torch.is_tensor(a) and torch.is_tensor(b):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    return [] if type(a) is type(b) and a == b else [name]


def main(kills, seed, folder, phases):
    rng = random.Random(seed)
    stages = [
        stage for stage in STAGES if stage == "train" or any(PHASES[phase] == stage for phase in phases)
    ]
    reference = folder / "undisturbed"
    reference.mkdir(parents=True)
    (reference / "log").touch()
    seconds = undisturbed(reference, stages)
    print("undisturbed, s:", ", ".join(f"{phase} {s:.3f}" for phase, s in seconds.items()), flush=True)
    expected = outcome(reference)

    todo, hits, missed, round_ = [phases[k % len(phases)] for k in range(kills)], Counter(), 0, 0
    while todo:
        round_ += 1
        if round_ > 4 + kills:
            raise SystemExit(f"{len(todo)} kills always came too late: {', '.join(todo)}")
        world = folder / f"disturbed-{round_}"
        world.mkdir()
        (world / "log").touch()
        now, todo = todo[:12], todo[12:]
        plan = sorted((*draw(phase, rng), phase) for phase in now)
        for stage in stages:
            for _, moment, phase in plan:
                if PHASES[phase] != stage:
                    continue
                hit = kill(world, phase, moment, seconds)
                print(
                    f"round {round_}: aimed at {phase} ({moment:.2f}), hit {hit or 'nothing: it had ended'}",
                    flush=True,
                )
                require_whole_files(world, reference)
                if hit:
                    hits[hit] += 1
                else:
                    missed += 1
                    todo.append(phase)
            process = start(world, stage)
            process.join()
            require_success(process, world)
        if found := differences(expected, outcome(world)):
            raise SystemExit(f"not the same as undisturbed: {', '.join(found[:20])}; see {world}")
        print(f"round {round_}: the same bits as undisturbed, {len(expected)} parts", flush=True)
    print(
        f"{hits.total()} kills in {round_} rounds ({missed} more came after the end); every end was the "
        "undisturbed one, bit for bit"
    )
    for phase, count in hits.items():
        print(f"{count:4d}  {phase}")
    return hits


if __name__ == "__main__":
    forked.from_here()
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--kills", type=int, default=25)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--folder", type=Path, help="kept; must not exist (default: a temporary one)")
    arguments = arguments.parse_args()
    if arguments.folder:
        main(arguments.kills, arguments.seed, arguments.folder.resolve(), list(PHASES))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(arguments.kills, arguments.seed, Path(name), list(PHASES))
