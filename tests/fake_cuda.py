"""Runs a GPU's training step without a GPU: train.main on tensors that have a CUDA device, dtype, shape and
strides, but no data.

    python tests/fake_cuda.py [--world 8] [--instances 232067] CFG key=value …   what a step asks for
    python tests/fake_cuda.py --cases FILE.json                                  many, a line of JSON each

In: settings and the number of processes (this one is rank 0; nothing is sent to the others). Out: a Step. A
mismatch of devices or dtypes raises as it does on a GPU. Speed and values cannot be tested this way.
"""

import argparse
import collections
import contextlib
import dataclasses
import heapq
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import step as benchmark
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from avid import config, data, distributed, run

DEVICE, MODE = torch.device("cuda", 0), FakeTensorMode()
# operations, besides views, that take no work on the device
FREE = (
    "aten.empty",
    "aten.new_empty",
    "aten.empty_like",
    "aten._unsafe_view",
    "aten.lift_fresh",
    "prim.",
    "c10d.",
)


# operations whose inputs must have one dtype; torch computes their shapes without checking it
ONE_DTYPE = {f"aten.{name}" for name in "mm bmm addmm baddbmm mv dot convolution index_put_ lerp_".split()}


@dataclasses.dataclass
class Step:
    """What the last step asked of the device."""

    waits: list = dataclasses.field(default_factory=list)  # where the host would wait for it, and why
    # name → count
    operations: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    # name → count, of tensors on the device
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    ddp: dict = dataclasses.field(default_factory=dict)  # arguments of DistributedDataParallel
    output: dict = dataclasses.field(default_factory=dict)  # name → dtype of a network's output


class Watch(TorchDispatchMode):
    """Counts operations on the device while `counting`, and notes where the host would wait."""

    def __init__(self):
        super().__init__()
        self.step, self.counting, self.pinned = Step(), False, set()  # ids of tensors in pinned memory

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options, name = options or {}, str(function)
        given = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
        kinds = {x.dtype for x in given if x.is_floating_point()}
        if len(kinds) > 1 and name.rpartition(".")[0] in ONE_DTYPE:
            raise RuntimeError(f"{name} of {kinds}")
        try:
            results = WITHOUT_META.get(name.rpartition(".")[0], function)(*arguments, **options)
        except Exception as error:
            if "DataDependent" in type(error).__name__ or "DynamicOutput" in type(error).__name__:
                self.step.waits.append(f"{name} at {project_line()}")
            raise
        made = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        if not self.counting or not any(x.is_cuda for x in given + made):
            return results
        if name.startswith("c10d."):
            self.step.collectives[name] += 1
        elif not function.is_view and not name.startswith(FREE):
            self.step.operations[name] += 1
        if name.startswith("aten.batch_norm_gather_stats."):  # its kernel copies the count to the device
            self.step.waits.append(f"a count of batch_norm_gather_stats at {project_line()}")
        if name.startswith(("aten._to_copy", "aten.copy_")):
            source = given[1] if name.startswith("aten.copy_") else given[0]
            target = made[0]
            asynchronous = options.get("non_blocking") or arguments[2:3] == (True,)
            if not source.is_cuda and target.is_cuda and source.dim() and id(source) not in self.pinned:
                self.step.waits.append(
                    f"copy of {tuple(source.shape)} from pageable memory at {project_line()}"
                )
            elif source.is_cuda != target.is_cuda and not asynchronous:
                self.step.waits.append(f"copy of {tuple(source.shape)} at {project_line()}")
        return results


def project_line():
    """The innermost line of the project on the call stack."""
    for frame in reversed(traceback.extract_stack(limit=80)):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path != Path(__file__):
            return f"{path.name}:{frame.lineno}"
    return "torch"


def channels(x, *_):
    return torch.empty(2, x.shape[1], device=x.device).unbind()


def same_device(*tensors):
    assert len({x.device for x in tensors if x is not None}) == 1, [x.device for x in tensors]


def backward_reduce(dy, x, mean, invstd, weight, *wanted):
    same_device(dy, x, mean, invstd, weight)
    assert dy.dtype == x.dtype and dy.shape == x.shape and mean.dtype == torch.float32
    return torch.empty(4, x.shape[1], device=x.device).unbind()


def backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    same_device(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts)
    assert counts.dtype == torch.int32 and (weight is None or weight.dtype == mean.dtype == sum_dy.dtype)
    return torch.empty_like(x)


def gather_stats(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    same_device(x, means, invstds, running_mean, running_var, counts)
    assert means.dtype == running_mean.dtype == counts.dtype and len(means) == len(invstds) == len(counts)
    return channels(x)


def elemt(x, weight, bias, mean, invstd, eps):
    same_device(x, weight, bias, mean, invstd)
    assert weight is None or weight.dtype == bias.dtype == mean.dtype
    return torch.empty_like(x)


WITHOUT_META = {  # CUDA kernels whose output shapes torch does not know
    "aten.batch_norm_stats": channels,
    "aten.batch_norm_gather_stats": channels,
    "aten.batch_norm_gather_stats_with_counts": gather_stats,
    "aten.batch_norm_elemt": elemt,
    "aten.batch_norm_backward_reduce": backward_reduce,
    "aten.batch_norm_backward_elemt": backward_elemt,
}


@torch.no_grad()
def backward(loss, *_, **__):
    """In place of loss.backward(): autograd's engine needs a CUDA context, so its nodes are called here."""
    assert loss.dtype == torch.float32 and loss.device == DEVICE and not loss.dim(), loss
    needed, known, todo = collections.Counter(), {loss.grad_fn}, [loss.grad_fn]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                needed[node] += 1
                if node not in known:
                    known.add(node)
                    todo.append(node)
    gradients = collections.defaultdict(dict, {loss.grad_fn: {0: torch.ones_like(loss)}})
    ready = [(-loss.grad_fn._sequence_nr(), 0, loss.grad_fn)]
    with mock.patch.object(
        torch._C, "_current_graph_task_id", lambda: 1
    ):  # torch.utils.checkpoint asks which backward it is
        while ready:
            node = heapq.heappop(ready)[2]
            given = gradients.pop(node, {})
            if hasattr(node, "variable"):  # a leaf
                (gradient,) = given.values()
                assert gradient.dtype == node.variable.dtype and gradient.device == node.variable.device
                # with the parameter's strides, as autograd gives it
                node.variable.grad = torch.empty_like(node.variable)
                continue
            given = [given.get(i) for i in range(len(node._input_metadata))]
            targets = node.next_functions
            if all(x is None for x in given):
                results = [None] * len(targets)
            elif isinstance(node, torch.autograd.function.BackwardCFunction):
                results = node.apply(*given)
                results = results if isinstance(results, tuple) else (results,)
                results = [x for x in results if x is not None]  # None for arguments that are no tensors
                targets = [target for target in targets if target[0] is not None]
            else:
                results = node(*given)
            results = results if isinstance(results, (tuple, list)) else (results,)
            for (following, i), gradient in zip(targets, results, strict=True):
                if following is None:
                    continue
                if gradient is not None:
                    like = following._input_metadata[i]  # broadcast dimensions are summed
                    gradient = gradient if gradient.shape == like.shape else gradient.sum_to_size(like.shape)
                    gradient = gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)
                    before = gradients[following].get(i)
                    gradients[following][i] = gradient if before is None else before + gradient
                needed[following] -= 1
                if not needed[following] and following in gradients:
                    heapq.heappush(ready, (-following._sequence_nr(), len(ready) + id(following), following))


@torch.no_grad()
def apply_to_copies(module, move, recurse=True):
    """In place of Module._apply, which cannot move fake parameters: makes new parameters."""
    for child in module.children():
        apply_to_copies(child, move)
    for name, x in module._parameters.items():
        module._parameters[name] = x if x is None else torch.nn.Parameter(move(x), x.requires_grad)
    for name, x in module._buffers.items():
        module._buffers[name] = x if x is None else move(x)
    return module


@contextlib.contextmanager
def fake_gpu(watch, world):
    """A context in which the project and torch's Python code find a GPU and `world` processes."""
    generator, from_numpy, exponential = torch.Generator, torch.from_numpy, torch.Tensor.exponential_

    def pin_memory(x):
        pinned = x.clone()
        watch.pinned.add(id(pinned))
        watch.kept.append(pinned)  # an id is unique only while its tensor exists
        return pinned

    def ddp(module, devices, **given):
        watch.step.ddp = {"devices": devices, **given}
        return module

    watch.kept = []
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    patches = [
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        mock.patch.object(torch.cuda, "get_device_name", lambda *_: "a GPU that is not there"),
        mock.patch.object(torch.cuda, "Event", lambda: event),
        mock.patch.object(torch, "Generator", lambda device="cpu": generator()),
        mock.patch.object(torch, "from_numpy", lambda x: MODE.from_tensor(from_numpy(x.copy()))),
        mock.patch.object(torch.Tensor, "exponential_", lambda x, *a, generator=None: exponential(x, *a)),
        mock.patch.object(torch.Tensor, "pin_memory", pin_memory),
        mock.patch.object(torch.Tensor, "backward", backward),
        mock.patch.object(torch.nn.Module, "_apply", apply_to_copies),
        mock.patch(
            "torch.utils._foreach_utils._foreach_supported_types",
            [torch.Tensor, torch.nn.Parameter, FakeTensor],
        ),
        mock.patch.object(distributed, "start", lambda: distributed.World(0, world, DEVICE)),
        mock.patch.object(distributed, "any_rank", lambda *flags: [bool(flag) for flag in flags]),  # by Gloo
        mock.patch.object(distributed, "DistributedDataParallel", ddp),
        # logged numbers and checkpoints would need data
        mock.patch.object(run.LaggedNumbers, "due", lambda lagged, everything=False: ()),
        mock.patch.multiple(
            run.Folder,
            resume=lambda *_, **__: 0,
            begin_from=lambda *_: None,
            save=lambda *_: None,
            log=lambda *_, **__: None,
        ),
    ]
    if world > 1:
        dist.init_process_group("fake", rank=0, world_size=world, store=dist.HashStore())
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            yield
        finally:
            if world > 1:
                dist.destroy_process_group()


def run_step(cfg, world=1, instances=400, steps=2, within=None):
    """Run `steps` steps of train.main and return the Step of the last one. The first step of a process makes
    constants, for which the host waits.

    within(watch, output): called in the middle of the last step.
    """
    watch = Watch()
    table = type("Table", (), {"__len__": lambda self: instances, "paths": range(instances)})()
    batches = list(benchmark.batches(cfg, cfg.optim.batch_size // world, steps, instances, pin=False))
    optimizers, plain_adam, objective = [], torch.optim.Adam, train.Objective.__call__

    def fake_loader(*_, **__):
        for number, batch in enumerate(batches):
            batch = {k: MODE.from_tensor(x) if torch.is_tensor(x) else x for k, x in batch.items()}
            watch.kept.append(batch)
            watch.pinned |= {id(x) for x in batch.values()}
            watch.counting = number == steps - 1
            yield batch
            watch.counting = False

    def adam(parameters, **given):
        optimizers.append(plain_adam(parameters, **given))
        return optimizers[0]

    def record_dtypes(self, output, batch, index, step):
        named = {**output._asdict(), **output.temporal}
        watch.step.output = {name: str(x.dtype) for name, x in named.items() if torch.is_tensor(x)}
        if within and step == steps - 1:
            within(watch, output)
        return objective(self, output, batch, index, step)

    cfg = dataclasses.replace(cfg, log=dataclasses.replace(cfg.log, check_epochs=0))
    with (
        fake_gpu(watch, world),
        mock.patch.object(run, "videos", lambda *_: (table, None)),
        mock.patch.object(data, "loader", fake_loader),
        mock.patch.object(torch.optim, "Adam", adam),
        mock.patch.object(train.Objective, "__call__", record_dtypes),
        contextlib.suppress(StopIteration),  # there are no more batches
        MODE,
        watch,
    ):
        train.main(cfg)
    parameters = [x for group in optimizers[0].param_groups for x in group["params"]]
    for x in parameters:
        state = optimizers[0].state[x]
        for y in (x.grad, state["exp_avg"], state["exp_avg_sq"]):
            assert (y.dtype, y.device) == (x.dtype, x.device) == (torch.float32, DEVICE)
            strides = zip(x.shape, x.stride(), y.stride(), strict=True)
            assert all(n == 1 or a == b for n, a, b in strides), (x.shape, x.stride(), y.stride())
        assert state["step"].device == DEVICE
    return watch.step


def to_json(step):
    """A Step as a dict for JSON."""
    return {
        "waits": step.waits,
        "operations": sum(step.operations.values()),
        "collectives": sum(step.collectives.values()),
        "broadcast_buffers": step.ddp.get("broadcast_buffers"),
        "output": step.output,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--instances", type=int, default=232_067)
    parser.add_argument("--cases", metavar="FILE", help="a list of [configuration, processes, settings]")
    parser.add_argument("cfg", nargs="?")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    if not arguments.cases:
        step = run_step(config.load(arguments.cfg, arguments.overrides), arguments.world, arguments.instances)
        print(json.dumps(to_json(step), indent=2))
        print(step.operations.most_common(25), dict(step.collectives), step.ddp)
        return
    for number, (name, world, overrides) in enumerate(json.loads(Path(arguments.cases).read_text())):
        try:
            result = to_json(run_step(config.load(name, overrides), world, steps=1 if number else 2))
        except Exception:
            result = {"error": traceback.format_exc()}
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
