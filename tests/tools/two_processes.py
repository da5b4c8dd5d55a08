"""Two processes for tests of the optimizers; and their cases under DDP, FSDP2 and ZeroRedundancyOptimizer.

test_with_torch.py starts the cases once. Every case compares, in each process, with one unsharded model that trains on
the whole batch.
"""

import copy
import traceback
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo  # DistributedDataParallel imports it
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from largebatch.optim import CLARS, LAMB, LARS, MERIT, TVLARS, SampleNorms

PROCESSES = 2
KINDS = {
    "lars": (LARS, {"lr": 0.5, "weight_decay": 1e-2, "trust_coefficient": 0.02, "momentum": 0.8}),
    "tvlars": (TVLARS, {"lr": 0.5, "weight_decay": 1e-2, "trust_coefficient": 0.02, "lmbda": 0.5, "delay": 3}),
    "clars": (CLARS, {"lr": 0.5, "weight_decay": 1e-2, "trust_coefficient": 0.02}),
    "lamb": (LAMB, {"lr": 0.01}),
    "merit": (MERIT, {"lr": 0.01}),
}
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def small_model(seed=0):
    """Return a model of odd sizes. Its last weight is one row, so sharding by rows leaves a process without it."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Tanh(), torch.nn.Linear(5, 3), torch.nn.Linear(3, 1)
    )


def batch(step, samples=16):
    """Return a batch that depends on the step number only."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(samples, 7, generator=generator), torch.randn(samples, 1, generator=generator)


def loss_of(model, inputs, targets):
    return torch.nn.functional.mse_loss(model(inputs), targets)


class Run:
    """A model in training, its optimizer, and for CLARS its sample norms."""

    def __init__(self, kind, model, **options):
        optimizer, defaults = KINDS[kind]
        self.model = model
        self.optimizer = optimizer(model.named_parameters(), **{**defaults, **options})
        self.watch()

    def watch(self):
        is_clars = isinstance(self.optimizer, CLARS)
        self.norms = SampleNorms(self.model, parameters=self.optimizer.layers) if is_clars else None

    def backward(self, step):
        self.optimizer.zero_grad()
        loss = loss_of(self.model, *batch(step))
        loss.backward()
        return loss

    def give_norms(self, scale=1.0):
        if self.norms is not None:
            self.optimizer.set_sample_norms(self.norms.means(scale))

    def step(self):
        self.give_norms()
        self.optimizer.step()

    def train(self, steps):
        for step in steps:
            self.backward(step)
            self.step()


def same_weights(one, other):
    close(whole(one.parameters()), whole(other.parameters()))


def whole(tensors):
    return [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach() for tensor in tensors]


def my_half(tensors):
    return [tensor.chunk(PROCESSES)[dist.get_rank()] for tensor in tensors]


# -- cases


def ddp(kind, bucket_view):
    """Accumulate two micro-batches a process, without communication before the last."""
    alone, run = Run(kind, small_model()), Run(kind, small_model())
    replica = DistributedDataParallel(run.model, gradient_as_bucket_view=bucket_view)
    for step in range(5):
        alone.train([step])
        replica.zero_grad()
        micro_batches = list(zip(*(half.chunk(2) for half in my_half(batch(step))), strict=True))
        for place, (inputs, targets) in enumerate(micro_batches):
            with nullcontext() if place == 1 else replica.no_sync():
                (loss_of(replica, inputs, targets) / 2).backward()
        run.step()
    same_weights(run.model, alone.model)
    close(run.optimizer.layer_stats(), alone.optimizer.layer_stats())


def sharded_run(kind, mesh_shape=(PROCESSES,), seed=0, **options):
    names = ("replicate", "shard")[-len(mesh_shape) :]
    model = small_model(seed)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Run(kind, model, **options)


def train_sharded(run, steps):
    for step in steps:
        run.optimizer.zero_grad()
        loss_of(run.model, *my_half(batch(step))).backward()
        run.step()


def fsdp2(kind, mesh_shape, **options):
    alone, run = Run(kind, small_model(), **options), sharded_run(kind, mesh_shape, **options)
    for step in range(5):
        alone.train([step])
        train_sharded(run, [step])
        stats = run.optimizer.layer_stats()
        theirs = [None] * PROCESSES
        dist.all_gather_object(theirs, stats)
        same_weights(run.model, alone.model)
        close(stats, alone.optimizer.layer_stats())
        torch.testing.assert_close(theirs[0], theirs[1], rtol=0, atol=0)
    assert run.optimizer.layer_names == ["0.weight", "3.weight", "4.weight"]
    rows = [parameter.to_local().shape[0] for parameter in run.optimizer.layers]
    if mesh_shape == (PROCESSES,):
        assert rows == ([3, 2, 1] if dist.get_rank() == 0 else [2, 1, 0])


def fsdp2_resume(kind, full, capturable):
    """Resume through ``torch.distributed.checkpoint``'s state_dict, as shards or as a whole."""
    options = StateDictOptions(full_state_dict=full, cpu_offload=full, broadcast_from_rank0=full)
    first = sharded_run(kind, capturable=capturable)
    train_sharded(first, range(3))
    state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer, options=options))
    second = sharded_run(kind, seed=1, capturable=capturable)
    with torch.no_grad():
        for mine, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
            mine.copy_(theirs)
    set_optimizer_state_dict(second.model, second.optimizer, state, options=options)
    train_sharded(first, range(3, 6))
    train_sharded(second, range(3, 6))
    alone = Run(kind, small_model())
    alone.train(range(6))
    same_weights(first.model, alone.model)
    same_weights(second.model, alone.model)


def sharded_merit_is_refused():
    run = sharded_run("merit")
    before = [weight.clone() for weight in whole(run.model.parameters())]
    with pytest.raises(RuntimeError, match=r"MERIT requires whole parameters, and 0\.weight is sharded"):
        train_sharded(run, [0])
    torch.testing.assert_close(whole(run.model.parameters()), before, rtol=0, atol=0)


def zero_redundancy(kind):
    optimizer_class, options = KINDS[kind]

    def build(model):
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=optimizer_class, **options)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, *batch(step)).backward()
            optimizer.step()

    alone, model = Run(kind, small_model()), small_model()
    optimizer = build(model)
    alone.train(range(3))
    train(model, optimizer, range(3))
    same_weights(model, alone.model)
    optimizer.consolidate_state_dict(to=0)
    sent = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent)
    (state,) = sent
    close(state["state"], alone.optimizer.state_dict()["state"])
    assert all(group.get("step") == (3 if kind == "tvlars" else None) for group in state["param_groups"])

    twin = copy.deepcopy(model)
    resumed = build(twin)
    resumed.load_state_dict(copy.deepcopy(state))
    alone.train(range(3, 6))
    train(model, optimizer, range(3, 6))
    train(twin, resumed, range(3, 6))
    same_weights(model, alone.model)
    same_weights(twin, alone.model)


CASES = {
    **{f"ddp-{kind}-{view}": partial(ddp, kind, view == "view") for kind in KINDS for view in ("view", "copy")},
    **{f"fsdp2-{kind}": partial(fsdp2, kind, (PROCESSES,)) for kind in ("lars", "tvlars", "lamb")},
    **{f"fsdp2-{kind}-maximize": partial(fsdp2, kind, (PROCESSES,), maximize=True) for kind in ("lars", "lamb")},
    "fsdp2-lars-foreach": partial(fsdp2, "lars", (PROCESSES,), foreach=True, denominator="sum_of_norms"),
    "fsdp2-lars-no_decay": partial(fsdp2, "lars", (PROCESSES,), weight_decay=0.0, momentum=0.0, norm_clip=0.5),
    "fsdp2-tvlars-replicated": partial(fsdp2, "tvlars", (PROCESSES, 1)),
    "fsdp2-lamb-replicated": partial(fsdp2, "lamb", (1, PROCESSES)),
    **{
        f"fsdp2-{kind}-resume-{form}": partial(fsdp2_resume, kind, form == "whole", capturable)
        for kind in ("lars", "tvlars", "lamb")
        for form, capturable in (("shards", False), ("whole", False), ("shards-capturable", True))
    },
    "fsdp2-merit-refused": sharded_merit_is_refused,
    **{f"zero-{kind}": partial(zero_redundancy, kind) for kind in ("lars", "tvlars", "lamb", "merit")},
}


def in_two_processes(function, folder):
    """Call ``function`` with the rank and the folder in two processes. Forks need no imports, but can't use CUDA."""
    way = "spawn" if torch.cuda.is_available() else "fork"
    mp.start_processes(function, (str(folder),), nprocs=PROCESSES, start_method=way)


def run_cases(rank, folder):
    """Run all cases in one process up to the first failure; write an empty file or the traceback for each."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=30))
    for name, case in CASES.items():
        try:
            case()
            outcome = ""
        except Exception:
            outcome = traceback.format_exc()
        (Path(folder) / f"{name}-{rank}").write_text(outcome)
        if outcome:
            break  # the other process may still be waiting for the part of the case that this process skipped
    dist.destroy_process_group()
