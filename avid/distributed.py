"""One process or many: torchrun's set-up, gathering over ranks, who talks, and when all of them leave.

In: the environment variables that torchrun sets; without them there is one process.
Out: `start()` tells rank, world size and device; the rest works alike for one and many.
"""

import contextlib
import faulthandler
import os
import pickle
import re
import signal
import sys
import time
import traceback
import warnings
import zlib
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .files import ConfigError


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device


def start():
    """Join the ranks that torchrun started: NCCL on GPUs, Gloo on CPUs. Without torchrun: one process.

    On a GPU this process computes on the one of its rank, which is "cuda" from here on. ConfigError where
    there is none for it.
    """
    # has Python's signal handlers run on a stack of their own: matrix products of oneDNN point the stack's
    # register at the heap, where a handler would overwrite numbers (oneDNN's issue 4845; torch 2.11 has it)
    if not faulthandler.is_enabled():
        faulthandler.enable()
    cuda, number = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", number) if cuda else torch.device("cpu")
    if cuda:
        if number >= (count := torch.cuda.device_count()):
            raise ConfigError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', number + 1)} processes on this machine need a GPU "
                f"each, and it has {count}; start fewer: torchrun --nproc-per-node {count}"
            )
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, own_rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
        # not on several machines: each counts for itself how often torchrun has started it
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # else what torchrun starts again finds the addresses of those that are gone, and waits for ever
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(
            backend, store=store, rank=own_rank, world_size=world, timeout=timedelta(minutes=30)
        )
    return World(rank(), world_size(), device)


# what Gloo says of a rank that has gone
LOST = re.compile(r"Connection (closed|reset|refused)|[Tt]imed out|[Bb]roken pipe|peer")


@contextlib.contextmanager
def clean_end():
    """Within, an error or a signal ends the program, and nothing is waited for.

    The end of another rank ends this one, with one line and exit code 1; torchrun, or the same command, may
    start them again.
    """
    try:
        yield
    except BaseException as error:
        # its frames hold the decoding processes, for which the interpreter would wait
        traceback.clear_frames(error.__traceback__)
        lost = isinstance(error, dist.DistError) or LOST.search(str(error))
        if world_size() == 1 or not (isinstance(error, RuntimeError) and lost):
            raise
        print(
            f"error: rank {rank()} ends, as another one has gone ({' '.join(str(error).split())[:120]}); "
            "what that one said is the cause; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def end():
    """Leave the other ranks."""
    if dist.is_initialized():
        # Gloo's thread needs the interpreter to let go of the last message, and torch joins that thread
        # without giving way
        time.sleep(0.5)
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x):
    """The tensors of all ranks, in the order of ranks: b×… on every rank → world·b×… (no gradient)."""
    x = x.detach()
    if world_size() == 1:
        return x
    gathered = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous())
    return gathered


def gather_live(x):
    """As `gather`, with gradient: what all ranks' losses say of x, summed. Every rank must use the result."""
    return x if world_size() == 1 else GatherLive.apply(x)


class GatherLive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return gather(x)

    @staticmethod
    def backward(ctx, dy):
        return total(dy).chunk(world_size())[rank()]


def total(x):
    """The sum of a tensor over the ranks (no gradient)."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def any_rank(*flags):
    """For each flag, whether it is true on at least one rank; goes by the CPU, so that no GPU has to wait."""
    votes = torch.tensor([bool(flag) for flag in flags], dtype=torch.int32)
    if world_size() > 1:
        dist.all_reduce(votes)
    return [vote > 0 for vote in votes.tolist()]


def gather_objects(x):
    """What all ranks hold, anything that can be pickled, as a list in the order of ranks."""
    if world_size() == 1:
        return [x]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, x)
    return gathered


def wait():
    """Until all ranks are here."""
    any_rank(False)


# ------------------------------------------------------------- tensors whose rows are spread over the ranks
# torch.distributed.checkpoint writes them, each rank its rows, and reads any rows again, whatever number of
# ranks wrote them.


def save_rows(folder, local, count):
    """Write tensors of `count` rows, of which this rank holds ⌈count/R⌉ or what is left, into a new folder.

    local: {name: this rank's rows}. Every rank calls. → {file: its CRC-32}, on every rank the same. OSError.
    """
    from torch.distributed import checkpoint

    with _plain_failures():
        writer = checkpoint.FileSystemWriter(folder)
        checkpoint.save(_spread(local, count), storage_writer=writer, no_dist=world_size() == 1)
    names = sorted(path.name for path in Path(folder).iterdir())[rank() :: world_size()]
    checks = gather_objects({name: file_crc32(Path(folder) / name) for name in names})
    return {name: check for part in checks for name, check in part.items()}


def load_rows(folder, local, count):
    """Read into tensors what `save_rows` of any number of ranks wrote: arguments as there. Every rank calls.

    OSError, also where the index of the folder asks for more than plain data.
    """
    from torch.distributed import checkpoint

    with open(Path(folder) / ".metadata", "rb") as file:
        try:
            index = PlainIndex(file).load()
        except pickle.UnpicklingError as error:
            raise OSError(f"cannot read {folder}: {error}") from None

    class Reader(checkpoint.FileSystemReader):
        def read_metadata(self, *_, **__):
            return index

    with _plain_failures():
        reader = Reader(folder)
        checkpoint.load(_spread(local, count), storage_reader=reader, no_dist=world_size() == 1)


INDEX_NAMES = {
    "torch": {"Size", "float16", "bfloat16", "float32"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}  # fmt: skip


class PlainIndex(pickle.Unpickler):
    """Reads the index of torch.distributed.checkpoint, which is a pickle: one that asks for another name than
    INDEX_NAMES is refused, so that no code is run from a file."""

    def find_class(self, module, name):
        if name not in INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and no code is run from a file")
        return super().find_class(module, name)


@contextlib.contextmanager
def _plain_failures():
    """What one rank could not do, every rank hears, as an OSError."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            yield
    except CheckpointException as error:
        number, (fault, _) = next(iter(error.failures.items()))
        text = f"rank {number}: {getattr(fault, 'strerror', None) or fault}"
        raise OSError(getattr(fault, "errno", None), text) from error


def _spread(local, count):
    """Each rank's rows as parts of tensors of `count` rows; a rank that holds all gives them as they are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    if all(len(x) == count for x in local.values()):
        return dict(local)
    mesh = init_device_mesh(next(iter(local.values())).device.type, (world_size(),))
    return {
        name: DTensor.from_local(
            x, mesh, [Shard(0)], run_check=False, shape=torch.Size((count, *x.shape[1:])), stride=x.stride()
        )
        for name, x in local.items()
    }


def file_crc32(path):
    """The CRC-32 of a file's bytes."""
    check = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            check = zlib.crc32(block, check)
    return check


def to_device(x, device):
    """A tensor that the host has just made, on the device, for which the host does not wait."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def say(world, text):
    """A line from rank 0, above the progress bar."""
    if world.rank == 0:
        tqdm.write(text)


def data_parallel(model, world, sync_bn, unused=False):
    """The model with its gradients averaged over the ranks (DDP); of one process, the model itself.

    sync_bn: the ranks' statistics of batch norm are equal, so that none need be sent; unused: parameters may
    get no gradient.
    """
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    given = {"find_unused_parameters": unused, "broadcast_buffers": not sync_bn}
    return DistributedDataParallel(model, devices, **given)


class StopSignal:
    """Remembers SIGTERM or Ctrl-C until the step is done. Another one ends the program at once, if it comes
    GRACE_S later.

    One that comes sooner is the same wish once more: torchrun passes on a signal that Slurm sends to every
    process.
    """

    GRACE_S = 2.0

    def __init__(self):
        self.asked, self.exit_code, self.saved = "", 128 + signal.SIGTERM, False
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self.remember) for number in numbers}

    def remember(self, number, _):
        if not self.asked:
            self.asked, self.exit_code, self.asked_at = (
                signal.Signals(number).name,
                128 + number,
                time.monotonic(),
            )
            if self.saved:
                raise SystemExit(self.exit_code)
        elif time.monotonic() - self.asked_at > self.GRACE_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextlib.contextmanager
    def at_once(self):
        """Within, all that counts is saved: a signal does not wait for the end of a check, which may take
        minutes."""
        self.saved = True
        try:
            if self.asked:
                raise SystemExit(self.exit_code)
            yield
        finally:
            self.saved = False

    def release(self):
        """From here on signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------- batch norm over ranks


def sync_batch_norm(model):
    """Have every batch norm take the statistics of the global batch; parameters, buffers and names stay. →
    the model"""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm
    return model


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the mean and variance of all ranks' batches, which are of one size: one gather, and no
    waiting.

    torch.nn.SyncBatchNorm works on GPUs alone, and there looks for empty batches: the host waits for the
    device three times a layer, and torch.compile cuts its graph.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):  # B×C×…
        if not self.training:
            return super().forward(x)
        x, kernels = _dense(x), _kernels(x)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            local = torch.stack(kernels.batch_norm_stats(x, self.eps))  # 2×C
            means, invstds = gather(local[None]).unbind(1)  # R×C each
            running = self.running_mean, self.running_var, self.momentum
            # made on the device: batch_norm_gather_stats copies a number there, for which the host waits
            counts = means.new_full((len(means),), x.numel() // x.shape[1])  # R
            # C each
            mean, invstd = kernels.batch_norm_gather_stats_with_counts(
                x, means, invstds, *running, self.eps, counts
            )
        return Normalise.apply(x, self.weight, self.bias, mean, invstd, self.eps)


class Normalise(torch.autograd.Function):
    """y = w·(x − μ)/σ + b. Its gradient knows that μ and σ come from x, that of all ranks."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, eps):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, invstd)
        return _kernels(x).batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:  # no loss of any rank reaches y: zeros would let the weight decay move the weights
            return (None,) * 6
        x, weight, mean, invstd = ctx.saved_tensors
        dy, kernels, affine = _dense(dy), _kernels(x), weight is not None
        # C each, of this rank
        sum_dy, sum_dy_xmu, dweight, dbias = kernels.batch_norm_backward_reduce(
            dy, x, mean, invstd, weight, True, affine, affine
        )
        sums = torch.stack([sum_dy, sum_dy_xmu])
        if world_size() > 1:
            dist.all_reduce(sums)
        counts = torch.full((world_size(),), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
        dx = kernels.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, counts)
        return dx, *((dweight, dbias) if affine else (None, None)), None, None, None


def _dense(x):
    """x as the kernels take it: channels last, or contiguous."""
    layouts = torch.channels_last, torch.channels_last_3d
    return x if any(x.is_contiguous(memory_format=layout) for layout in layouts) else x.contiguous()


def _kernels(x):
    """torch's CUDA kernels of batch norm over ranks; on CPUs, and for torch.compile, which fuses them, the
    same in torch."""
    return torch if x.is_cuda and not torch.compiler.is_compiling() else Kernels


class Kernels:
    """What torch calls batch_norm_stats and so on, in float32 or better. x, dy B×C×…; μ, 1/σ, w, b C; counts:
    R, B·… of each rank."""

    def wide(x):
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def like(x, y):
        """y in the dtype of x; compiled, y.to of its own dtype would lose the gradient (torch 2.11)."""
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def dims(x):
        return [d for d in range(x.dim()) if d != 1]

    def each(channels, x):  # C → 1×C×1…
        return channels.view(1, -1, *[1] * (x.dim() - 2))

    def batch_norm_stats(x, eps):
        var, mean = torch.var_mean(Kernels.wide(x), Kernels.dims(x), correction=0)
        return mean, (var + eps).rsqrt()

    def batch_norm_gather_stats_with_counts(
        x, means, invstds, running_mean, running_var, momentum, eps, counts
    ):
        n, mean = x.numel() // x.shape[1] * len(means), means.mean(0)  # all counts are equal
        # the variance within ranks, and that between them: no difference of large sums
        var = (invstds.pow(-2) - eps).mean(0) + means.var(0, correction=0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (n / (n - 1)), momentum)
        return mean, (var + eps).rsqrt()

    def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
        y = (Kernels.wide(x) - Kernels.each(mean, x)) * Kernels.each(invstd, x)
        y = y if weight is None else y * Kernels.each(weight, x) + Kernels.each(bias, x)
        return Kernels.like(x, y)

    def batch_norm_backward_reduce(dy, x, mean, invstd, weight, *_):
        """Σ dy, Σ dy·(x − μ), and the gradients of w and b: C each."""
        dy, x_mu = Kernels.wide(dy), Kernels.wide(x) - Kernels.each(mean, x)
        sum_dy, sum_dy_xmu = dy.sum(Kernels.dims(x)), (dy * x_mu).sum(Kernels.dims(x))
        return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy

    def batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
        """w/σ · (dy − Σ dy / n − (x − μ)/σ² · Σ dy·(x − μ) / n)."""
        n, x_mu = counts.sum(), Kernels.wide(x) - Kernels.each(mean, x)
        shift, slope = Kernels.each(sum_dy / n, x), Kernels.each(sum_dy_xmu / n * invstd.square(), x)
        scale = Kernels.each(invstd if weight is None else invstd * weight, x)
        return Kernels.like(x, (Kernels.wide(dy) - shift - x_mu * slope) * scale)
