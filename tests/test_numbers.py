"""A step that is not finite: it moves nothing, is named with its files, and too many in a row end the run."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_train import TINY

import train
from avid import config


class Watch:
    """Runs train.main with losses spoilt at some steps (counted from 0), and keeps the whole state before every step."""

    def __init__(self, monkeypatch, spoil):
        self.states, self.parts = [], {}
        objective, to_device, resume = train.Objective.__call__, train.data.to_device, train.run.Folder.resume

        def spoilt(*arguments):
            terms, accuracies = objective(*arguments)
            step = arguments[-1]
            return {name: term * spoil.get(step, 1.0) for name, term in terms.items()}, accuracies

        def remember(folder, table, **state):
            self.parts = {name: state[name] for name in ("network", "bank", "optimizer")}
            return resume(folder, table, **state)

        def watched(batch, device):
            if "mask" in batch:  # of training, not of a check
                self.states.append(
                    copy.deepcopy({name: part.state_dict() for name, part in self.parts.items()})
                )
            return to_device(batch, device)

        monkeypatch.setattr(train.Objective, "__call__", spoilt)
        monkeypatch.setattr(train.data, "to_device", watched)
        monkeypatch.setattr(train.run.Folder, "resume", remember)

    def moved(self, step):
        """Which tensors of the whole state a step changed."""
        before, after = (dict(flat(self.states[at])) for at in (step, step + 1))
        return [name for name in before if not torch.equal(before[name], after[name])]


def flat(state, prefix=""):
    for name, value in state.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif torch.is_tensor(value):
            yield prefix + str(name), value


def settings(tmp_path, *overrides):
    return config.load(
        "toy",
        [
            *TINY,
            f"data.root={tmp_path / 'data'}",
            f"out={tmp_path / 'run'}",
            "log.check_epochs=0",
            *overrides,
        ],
    )


def test_a_step_that_is_not_finite_moves_nothing_and_is_named(tmp_path, monkeypatch):
    watch = Watch(monkeypatch, {2: math.nan, 5: math.inf})
    train.main(settings(tmp_path))
    for step in range(1, 11):
        parts = {name.partition(".")[0] for name in watch.moved(step)}
        assert parts == (set() if step in (2, 5) else {"network", "bank", "optimizer"}), step
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    named = {line["step"]: line for line in lines if "not_finite" in line}
    assert named.keys() == {3, 6}
    assert "loss nan" in named[3]["not_finite"]
    assert named[3]["files"]
    assert all(name.endswith(".mp4") for name in named[3]["files"])
    assert {line["step"] for line in lines if "loss" in line} == set(range(1, 13)) - {3, 6}


def test_too_many_in_a_row_end_the_run_and_keep_the_checkpoint_from_before(tmp_path, monkeypatch):
    watch = Watch(monkeypatch, dict.fromkeys([1, 4, 5, 6, 7, 8], math.nan))
    with pytest.raises(
        FloatingPointError, match=r"3 steps in a row, up to step 7, were not finite .*a lower optim.lr"
    ):
        train.main(settings(tmp_path, "optim.max_bad_steps=3"))
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 6  # the epoch's end, with the weights of step 4
    before = dict(flat(watch.states[4]["network"]))
    assert all(torch.equal(saved["network"][name], before[name]) for name in before)
