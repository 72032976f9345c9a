"""A step that is not finite changes nothing and is logged with its files; too many in a row end the run."""

import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_train import TINY

import train
from avid import config, distributed, run


class SpoiltRun:
    """Makes train.main multiply the losses of some steps (counted from 0) by a factor, and keeps the state
    before every step.
    """

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

        def watched(batch, device, audio):
            if "mask" in batch:  # a batch of training, not of a check
                self.states.append(
                    copy.deepcopy({name: part.state_dict() for name, part in self.parts.items()})
                )
            return to_device(batch, device, audio)

        monkeypatch.setattr(train.Objective, "__call__", spoilt)
        monkeypatch.setattr(train.data, "to_device", watched)
        monkeypatch.setattr(train.run.Folder, "resume", remember)

    def changed(self, step):
        """The names of the tensors that a step changed."""
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


def test_a_step_that_is_not_finite_changes_nothing_and_is_logged(tmp_path, monkeypatch):
    spoilt = SpoiltRun(monkeypatch, {2: math.nan, 5: math.inf})
    train.main(settings(tmp_path))
    for step in range(1, 11):
        parts = {name.partition(".")[0] for name in spoilt.changed(step)}
        assert parts == (set() if step in (2, 5) else {"network", "bank", "optimizer"}), step
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    named = {line["step"]: line for line in lines if "not_finite" in line}
    assert named.keys() == {3, 6}
    assert "loss nan" in named[3]["not_finite"]
    assert named[3]["files"]
    assert all(name.endswith(".mp4") for name in named[3]["files"])
    assert {line["step"] for line in lines if "loss" in line} == set(range(1, 13)) - {3, 6}


def test_too_many_in_a_row_end_the_run_and_keep_the_checkpoint_from_before(tmp_path, monkeypatch):
    spoilt = SpoiltRun(monkeypatch, dict.fromkeys([1, 4, 5, 6, 7, 8], math.nan))
    with pytest.raises(
        FloatingPointError, match=r"3 steps in a row, up to step 7, were not finite .*a lower optim.lr"
    ):
        train.main(settings(tmp_path, "optim.max_bad_steps=3"))
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 6  # the epoch's end, with the weights of step 4
    before = dict(flat(spoilt.states[4]["network"]))
    assert all(torch.equal(saved["network"][name], before[name]) for name in before)


# -------------------------------------------------------------------------------------------------- precision


def half_precision_guard():
    """A Guard of an fp16 run, its arithmetic on the CPU, with a network that has batch norm."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    guard = run.Guard(network, optimizer, torch.device("cpu"), "none")
    guard.fp16, guard.scale = True, torch.tensor(run.LOSS_SCALE)
    return network, guard


def take_step(network, guard, factor=1.0):
    """One step with a finite loss whose gradient is multiplied by `factor`; returns whether the step was
    finite.
    """
    with guard.forward():
        y = network(torch.arange(32.0).view(8, 4).sin())
    y.register_hook(lambda gradient: gradient.half().float())  # what fp16 can hold
    loss = y.square().mean()
    steep = (loss - loss.detach()) * factor  # its value is 0: only the gradient counts
    return guard.step(loss.detach() + steep, {"term": loss.detach()}).item()


def test_gradients_that_are_never_finite_lower_the_scale_to_1_and_keep_the_weights():
    """The scale stops at 1; after 144 halvings of 2^16 its reciprocal would be infinite."""
    network, guard = half_precision_guard()
    before = copy.deepcopy(network.state_dict())
    scales = []
    for _ in range(200):
        assert not take_step(network, guard, math.inf)
        scales.append(guard.scale.item())
    assert scales[:17] == [2.0**k for k in range(15, -1, -1)] + [1.0] and set(scales[16:]) == {1.0}
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
    assert take_step(network, guard)
    assert all(
        x.isfinite().all() and not torch.equal(x, before[name]) for name, x in network.state_dict().items()
    )


def test_a_gradient_that_only_its_scale_makes_infinite_lowers_the_scale():
    network, guard = half_precision_guard()
    steps = [take_step(network, guard, 2.0**8) for _ in range(8)]
    assert steps[0] is False and steps[-1] is True and 1 < guard.scale < run.LOSS_SCALE


def test_the_norm_is_that_of_the_gradient_without_the_loss_scale():
    norms = []
    for scale in (1.0, run.LOSS_SCALE):
        network, guard = half_precision_guard()
        guard.scale = torch.tensor(scale)
        assert take_step(network, guard)
        norms.append(guard.norm.item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0


def test_the_scale_doubles_after_a_number_of_finite_steps(monkeypatch):
    monkeypatch.setattr(run, "GROWTH_STEPS", 3)
    network, guard = half_precision_guard()
    scales = []
    for factor in (1, 1, 1, 1, math.inf, 1, 1, 1):
        take_step(network, guard, factor)
        scales.append(guard.scale.item() / run.LOSS_SCALE)
    assert scales == [1, 1, 2, 2, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "saved, scale",
    [
        ({}, run.LOSS_SCALE),  # bf16 → fp16
        # the same, of an earlier version
        ({"scale": 1.0, "growth_factor": 2.0, "_growth_tracker": 7}, run.LOSS_SCALE),
        ({"scale": 512.0, "growth_factor": 2.0, "_growth_tracker": 7}, 512.0),  # fp16, of an earlier version
        ({"scale": 512.0, "finite_steps": 7.0}, 512.0),
        ({"scale": 1.0, "finite_steps": 7.0}, 1.0),
    ],
)
def test_the_scale_is_resumed_from_fp16_to_fp16_alone(saved, scale):
    _, guard = half_precision_guard()
    guard.load_state_dict(saved)
    assert guard.scale == scale and guard.finite_steps == (7 if scale != run.LOSS_SCALE else 0)
    if scale != run.LOSS_SCALE:
        assert guard.state_dict() == {"scale": scale, "finite_steps": 7.0}
    guard.fp16 = False  # fp16 → bf16, float32
    guard.scale = torch.tensor(1.0)
    guard.load_state_dict(saved)
    assert guard.scale == 1 and guard.state_dict() == {}


class FakeFolder:
    """Stands in for a run folder and keeps the logged lines."""

    def __init__(self, cfg):
        self.cfg, self.world, self.lines = cfg, distributed.World(0, 1, torch.device("cpu")), []
        self.out = self.metrics = Path("metrics.jsonl")

    def log(self, step, epoch, **values):
        self.lines.append({"step": step, **values})


@pytest.fixture
def watch(tmp_path):
    """A run.Watch that logs every step and stops after three bad ones in a row."""
    cfg = settings(tmp_path, "optim.max_bad_steps=3")
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    bad_files = SimpleNamespace(table=SimpleNamespace(name_of=["a.mp4", "b.mp4"].__getitem__), reasons={})
    watch = run.Watch(
        FakeFolder(cfg), SimpleNamespace(optimizer=optimizer), bad_files, range(100), 100, 8, "lower lr"
    )
    yield watch
    watch.bar.close()
    watch.stop.release()


def log_steps(watch, steps):
    """Give the watch steps with these (loss, norm of the gradient, loss scale)."""
    for done, (loss, norm, scale) in enumerate(steps, 1):
        numbers = torch.tensor([loss, math.nan, norm, scale])
        watch.lagged.put(
            (done, ["loss", "task %", "grad_norm"], {"clips_per_s": 1.0, "data_wait": 0.0}),
            numbers,
            torch.tensor([1]),
        )
        watch.write_lines(everything=True)


def test_overflows_of_fp16_count_once_the_scale_cannot_fall(watch):
    log_steps(watch, [(1.0, math.inf, scale) for scale in (8.0, 4.0, 2.0)])
    assert watch.kept.lines == []  # lowering the scale is usual: nothing is logged
    with pytest.raises(
        FloatingPointError, match=r"3 steps in a row, up to step 3, were not finite .*; lower lr"
    ):
        log_steps(watch, [(1.0, math.inf, 1.0)] * 3)
    assert all(line["files"] == ["b.mp4"] for line in watch.kept.lines)


def test_a_loss_that_is_not_finite_counts_at_any_scale(watch):
    with pytest.raises(FloatingPointError):
        log_steps(watch, [(math.nan, math.nan, 8.0)] * 3)


def test_a_task_without_known_labels_has_no_accuracy(watch):
    """The step itself counts like any other."""
    log_steps(watch, [(1.0, 2.0, 1.0)])
    (line,) = watch.kept.lines
    assert line["loss"] == 1.0 and "task %" not in line and "not_finite" not in line


def test_unknown_labels_give_no_loss_and_no_accuracy():
    cfg = config.load("toy_temporal")
    objective = train.Objective(cfg, None, distributed.World(0, 1, torch.device("cpu")), 1)
    batch = {"order": torch.full((4,), -1), "speed": torch.tensor([[0, 1], [2, -1], [-1, -1], [3, 3]])}
    logits = {"order_video": torch.randn(4, 3), "speed_video": torch.eye(4)[[0, 1, 2, 0, 0, 0, 3, 0]]}
    terms, accuracies = objective.temporal_tasks(logits, batch)
    assert terms["order_video"] == 0 and accuracies["order_video %"].isnan()
    assert accuracies["speed_video %"] == pytest.approx(100 * 4 / 5)


def test_a_step_that_is_left_out_restores_buffers_of_any_type():
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).double()
    network[0].register_buffer("table", torch.arange(6, dtype=torch.float32).view(2, 3))
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    guard = run.Guard(network, optimizer, torch.device("cpu"), "none")
    for factor in (1.0, math.nan):
        before = copy.deepcopy(dict(network.named_buffers()))
        pointers = [x.data_ptr() for x in network.buffers()]
        with guard.forward():
            loss = network(torch.randn(8, 4, dtype=torch.float64)).sum() * factor
            network[0].table += 1
        finite = guard.step(loss)
        assert finite == math.isfinite(factor)
        for name, x in network.named_buffers():
            assert torch.equal(x, before[name]) != finite, name
        assert pointers == [x.data_ptr() for x in network.buffers()]
