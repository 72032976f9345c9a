"""The run folder: settings, metrics, checkpoint, curves; the same command goes on from what is there.

In: what has a state_dict (network, bank, optimizer, …), and values by name. Out: config.yaml, metrics.jsonl, last.pt, curves.png. Every
rank calls; rank 0 writes.
"""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

from tqdm import tqdm

from . import checkpoint, config, distributed, figures

MAY_CHANGE = (  # when a run goes on; of the last ones the run's own course depends: they are said
    *(
        "out",
        "profile",
        "data.root",
        "data.workers",
        "data.in_memory",
        "data.timeout_s",
        "data.max_bad_share",
        "log",
        "eval",
        "finetune",
    ),
    *(
        "bank.spread",
        "optim.checkpoint_activations",
        "optim.epochs",
        "optim.max_bad_steps",
        "optim.lr",
        "optim.clip_grad",
        "optim.amp",
    ),
)


class Run:
    """The folder cfg.out of a training; table: its videos; state: {name: what has a state_dict}."""

    def __init__(self, cfg, place, table, **state):
        self.cfg, self.place, self.out = cfg, place, Path(cfg.out)
        videos = json.dumps([table.paths, table.start_s.tolist(), table.end_s.tolist()])
        self.videos = {"count": len(table), "hash": hashlib.sha256(videos.encode()).hexdigest()[:12]}
        self.state = state  # {"network": …, "bank": …}, of what has a state_dict
        self.metrics = self.out / "metrics.jsonl"
        self.not_finite_in_a_row = 0
        if place.rank == 0:
            with checkpoint.writing(self.metrics):
                self.out.mkdir(parents=True, exist_ok=True)
                self.metrics.touch()

    def resume(self):
        """Load last.pt, or the one before where it is damaged; returns the number of steps done. Ends the program where the run
        is one of other settings or of other videos."""
        saved, remark = checkpoint.newest(self.out / "last.pt", owner=self.place.rank == 0)
        if saved is None:
            self.save_settings()  # they mark the folder as this run's
            self.cut_log(0)
            return 0
        if remark:
            distributed.say(self.place, remark)
        if lacking := [name for name in ("config", "videos", "step", "metrics_bytes", *self.state) if name not in saved]:
            config.stop(
                f"{self.out / 'last.pt'} is no checkpoint of train.py, it lacks {', '.join(lacking)}; choose another --out"
            )
        before, now = (config.flat(c) for c in (saved["config"], dataclasses.asdict(self.cfg)))
        changed = {k: f"{k} was {before.get(k)} and is {now[k]}" for k in now if before.get(k) != now[k]}
        if fixed := [text for k, text in changed.items() if not k.startswith(MAY_CHANGE)]:
            config.stop(f"{self.out} holds a run with other settings ({', '.join(fixed)}); choose another --out")
        for text in (text for k, text in changed.items() if k.startswith("optim.")):
            distributed.say(self.place, f"from here on {text}")
        if saved["videos"] != self.videos:
            counts = saved["videos"]["count"], self.videos["count"]
            differ = (
                f"{counts[0]} videos, there are now {counts[1]}" if counts[0] != counts[1] else "as many videos under other names"
            )
            config.stop(f"{self.out} holds a run on {differ}; bring back data.root as it was, or choose another --out")
        for name, part in self.state.items():
            part.load_state_dict(saved[name])
        self.cut_log(saved["metrics_bytes"])
        distributed.say(self.place, f"resuming {self.out} after step {saved['step']}")
        return saved["step"]

    def save(self, step):
        state = {name: part.state_dict() for name, part in self.state.items()}  # by all ranks: each may hold a part
        if self.place.rank == 0:
            with checkpoint.writing(self.metrics), open(self.metrics, "ab") as file:
                os.fsync(file.fileno())  # a checkpoint never knows of lines that a crash of the machine could take
                state |= {"metrics_bytes": file.tell()}
            state |= {"step": step, "videos": self.videos, "config": dataclasses.asdict(self.cfg)}
            checkpoint.save(self.out / "last.pt", state)
            self.save_settings()

    def save_settings(self):
        if self.place.rank == 0:
            with checkpoint.writing(self.out / "config.yaml"):
                config.save(self.cfg, self.out / "config.yaml")

    def cut_log(self, size):
        """Leave the first `size` bytes of metrics.jsonl: what was logged after the checkpoint comes again."""
        if self.place.rank == 0:
            with checkpoint.writing(self.metrics), open(self.metrics, "rb+") as file:
                kept = file.read(size)
                kept = kept[: kept.rfind(b"\n") + 1]  # whole lines
                file.truncate(len(kept))
            if len(kept) < size:
                tqdm.write(
                    f"warning: {self.metrics} has lost lines that the checkpoint knows of; weights and bank have lost nothing"
                )

    def log(self, step, epoch, **values):
        if self.place.rank == 0 and values:
            with checkpoint.writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "epoch": round(epoch, 4), **values}) + "\n")

    def not_finite(self, step, epoch, values, files):
        """Log a step that was left out; FloatingPointError where there were too many in a row, last.pt is from before them."""
        what = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
        self.log(step, epoch, not_finite=what, files=files)
        distributed.say(self.place, f"step {step} was left out, it is not finite: {what}; its files stand in {self.metrics}")
        self.not_finite_in_a_row += 1
        if self.not_finite_in_a_row == self.cfg.optim.max_bad_steps:
            raise FloatingPointError(
                f"{self.not_finite_in_a_row} steps in a row, up to step {step}, were not finite ({what}); the weights did not move "
                "since; the same command goes on with a lower optim.lr, an optim.clip_grad or optim.amp=none"
            )

    def draw_curves(self):
        """Curves can be drawn again at any time: where they cannot be written, training goes on."""
        if self.place.rank == 0:
            try:
                figures.curves(self.metrics, self.out / "curves.png")
            except OSError as error:
                tqdm.write(f"warning: cannot write {self.out / 'curves.png'}: {error.strerror}; training goes on")
