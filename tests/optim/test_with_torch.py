"""The optimizers with torch.compile, GradScaler, schedules, copies, CUDA graphs and several processes."""

import copy
import io
import pickle

import pytest
import torch
from torch._dynamo.utils import counters
from two_processes import (
    CASES,
    KINDS,
    PROCESSES,
    Run,
    batch,
    close,
    in_two_processes,
    loss_of,
    run_cases,
    same_weights,
    small_model,
)

from largebatch.optim import LARS, fused_cpu

ALL = pytest.mark.parametrize("kind", KINDS)
EACH_WAY = [(kind, way) for kind in KINDS for way in ("fused", "foreach") if (kind, way) != ("merit", "fused")]


def lr_of(kind):
    return KINDS[kind][1]["lr"]


def equal_weights(one, other):
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def needs_cpp_compiler():
    if reason := fused_cpu.why_not([torch.ones(1)]):
        pytest.skip(reason)


# -- torch.compile


def compare_compiled(eager, traced, steps, backend, before=lambda: None):
    """Compare trajectories and statistics, and count the graphs."""
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(fullgraph=True, backend=backend)
    def compiled_step():
        traced.optimizer.step()

    for step in steps:
        before()
        eager.train([step])
        traced.backward(step)
        traced.give_norms()
        compiled_step()
        close(list(traced.model.parameters()), list(eager.model.parameters()), rtol=1e-6)
        close(traced.optimizer.layer_stats(), eager.optimizer.layer_stats(), rtol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2  # the first creates the state


@ALL
def test_the_compiled_step_is_the_eager_step(kind):
    """The step is one graph, for more steps than torch recompiles; then training continues uncompiled."""
    eager, traced = Run(kind, small_model(), foreach=True), Run(kind, small_model())
    compare_compiled(eager, traced, range(10), "eager")
    if kind == "clars":
        with pytest.raises(RuntimeError, match="no sample norms"):  # the norms were for the compiled step only
            traced.optimizer.step()
    eager.train(range(10, 12))
    traced.train(range(10, 12))
    same_weights(traced.model, eager.model)


@ALL
def test_the_compiled_capturable_step_follows_a_tensor_lr(kind):
    """Changes of lr need no new graph. fused=True is allowed: the compiler fuses."""
    lrs = [torch.tensor(lr_of(kind)), torch.tensor(lr_of(kind))]
    eager = Run(kind, small_model(), lr=lrs[0], foreach=True)
    traced = Run(kind, small_model(), lr=lrs[1], capturable=True, fused=True)
    compare_compiled(eager, traced, range(5), "aot_eager", before=lambda: torch._foreach_mul_(lrs, 0.8))
    assert lrs[1] < 0.5 * lr_of(kind)


def test_inductor():
    needs_cpp_compiler()
    eager, traced = (Run("lars", torch.nn.Linear(7, 1), foreach=foreach) for foreach in (True, None))
    traced.model.load_state_dict(eager.model.state_dict())
    compare_compiled(eager, traced, range(5), "inductor")


# -- loss scaling


@ALL
def test_grad_scaler(kind):
    """A scaled loss gives the same step, and an infinite gradient gives no step."""
    alone, run = Run(kind, small_model()), Run(kind, small_model())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    def scaled_step(step, factor=1.0):
        run.optimizer.zero_grad()
        scaler.scale(loss_of(run.model, *batch(step)) * factor).backward()
        run.give_norms(scaler.get_scale())
        scaler.step(run.optimizer)
        scaler.update()

    for step in range(5):
        alone.train([step])
        scaled_step(step)
        if step == 2:
            state = copy.deepcopy(run.optimizer.state_dict())
            scaled_step(step, factor=float("inf"))
            assert str(run.optimizer.state_dict()) == str(state)
        close(list(run.model.parameters()), list(alone.model.parameters()), rtol=1e-6)
    close(run.optimizer.layer_stats(), alone.optimizer.layer_stats())
    assert scaler.get_scale() == 1024.0 * 2 * 0.5 * 2


# -- schedules, closures, gradients


@ALL
def test_one_cycle_sets_lr_and_momentum(kind):
    """The schedule sets the same values as for torch's own optimizer."""

    def one_cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr_of(kind), total_steps=6, max_momentum=0.9)

    adam = kind in ("lamb", "merit")
    like = {"betas": (0.9, 0.999)} if adam else {"momentum": 0.9}
    torchs = (torch.optim.Adam if adam else torch.optim.SGD)([torch.nn.Parameter(torch.ones(1))], 0.1, **like)
    by_hand, run = Run(kind, small_model()), Run(kind, small_model())
    schedules = one_cycle(run.optimizer), one_cycle(torchs)
    (hers,) = torchs.param_groups
    seen = set()
    for step in range(5):
        now = {name: hers[name] for name in ("lr", *like)}
        seen.add(str(now))
        by_hand.optimizer.param_groups[0].update(now)
        by_hand.train([step])
        run.train([step])
        torchs.step()
        for schedule in schedules:
            schedule.step()
    equal_weights(run.model, by_hand.model)
    assert len(seen) == 5


@ALL
def test_a_schedule_changes_a_tensor_lr(kind):
    runs = [Run(kind, small_model()), Run(kind, small_model(), lr=torch.tensor(lr_of(kind)))]
    schedules = [torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.7**step) for run in runs]
    for step in range(5):
        for run, schedule in zip(runs, schedules, strict=True):
            run.train([step])
            schedule.step()
    close(list(runs[1].model.parameters()), list(runs[0].model.parameters()), rtol=1e-6)


@ALL
def test_a_closure_may_set_gradients_and_sample_norms(kind):
    plain, run = Run(kind, small_model()), Run(kind, small_model())
    for step in range(3):
        before = loss_of(run.model, *batch(step))

        def closure(step=step):
            loss = run.backward(step)
            run.give_norms()
            return loss

        assert run.optimizer.step(closure) == before
    plain.train(range(3))
    equal_weights(run.model, plain.model)


@ALL
def test_gradients_may_be_zeroed_in_place(kind):
    plain, run = Run(kind, small_model()), Run(kind, small_model())
    for step in range(4):
        plain.train([step])
        run.optimizer.zero_grad(set_to_none=False)
        loss_of(run.model, *batch(step)).backward()
        run.step()
    equal_weights(run.model, plain.model)


# -- copies and state


@ALL
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_continues_bit_for_bit(kind, way, capturable):
    run = Run(kind, small_model(), capturable=capturable)
    run.train(range(3))
    if run.norms is not None:
        run.norms.remove()  # its hooks belong to the model, not to the optimizer
    twin = copy.copy(run)
    twin.model, twin.optimizer = way((run.model, run.optimizer))
    for one in (run, twin):
        one.watch()
        one.train(range(3, 6))
    assert twin.model[0].weight is not run.model[0].weight
    equal_weights(run.model, twin.model)


@ALL
def test_capturable_keeps_everything_that_changes_in_tensors(kind):
    plain, run = Run(kind, small_model()), Run(kind, small_model(), capturable=True)
    for step in range(5):
        plain.train([step])
        run.train([step])
        close(list(run.model.parameters()), list(plain.model.parameters()), rtol=1e-6)
        close(run.optimizer.layer_stats(), plain.optimizer.layer_stats(), rtol=1e-6)
    assert all(isinstance(value, torch.Tensor) for state in run.optimizer.state.values() for value in state.values())
    (group,) = run.optimizer.param_groups
    assert {name for name, value in group.items() if isinstance(value, torch.Tensor)} == ({"step"} & group.keys())


@ALL
@pytest.mark.parametrize("capturable", [False, True])
def test_state_goes_from_plain_to_capturable_and_back(kind, capturable):
    """Loading restores the saved groups' options, as in torch's optimizers; then the test sets capturable again."""
    first = Run(kind, small_model(), capturable=not capturable)
    first.train(range(3))
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    second = Run(kind, small_model(seed=1), capturable=capturable)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(torch.load(file))
    assert second.optimizer.param_groups[0]["capturable"] is not capturable
    second.optimizer.param_groups[0]["capturable"] = capturable
    first.train(range(3, 6))
    second.train(range(3, 6))
    same_weights(second.model, first.model)
    clocks = [group["step"] for group in second.optimizer.param_groups if "step" in group]
    counts = [state["step"] for state in second.optimizer.state.values() if "step" in state]
    assert all(isinstance(step, torch.Tensor) is capturable and step == 6 for step in clocks + counts)
    assert (len(clocks), len(counts)) == {"tvlars": (1, 0), "lamb": (0, 8), "merit": (0, 8)}.get(kind, (0, 0))


# -- parameters


@ALL
def test_a_shared_weight_is_updated_once(kind):
    """The update uses the sum of the gradients of both uses."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    alone = torch.nn.Linear(4, 4, bias=False)
    alone.load_state_dict(first.state_dict())
    optimizer, defaults = KINDS[kind]
    tied = optimizer(torch.nn.Sequential(first, second).named_parameters(), **defaults)
    plain = optimizer(alone.named_parameters(), **defaults)
    assert tied.layer_names == ["0.weight"]
    for step in range(3):
        inputs = batch(step)[0][:, :4]
        tied.zero_grad()
        second(first(inputs).tanh()).square().mean().backward()
        outer = torch.autograd.grad(second(first(inputs).tanh().detach()).square().mean(), second.weight)[0]
        assert not torch.allclose(outer, first.weight.grad)
        alone.weight.grad = first.weight.grad.clone()
        for one in (tied, plain):
            if kind == "clars":
                one.set_sample_norms({layer: torch.tensor(2.0) for layer in one.layers})
            one.step()
        assert torch.equal(first.weight, alone.weight)


@ALL
def test_a_frozen_parameter_is_not_changed(kind):
    model = small_model()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    optimizer, defaults = KINDS[kind]
    run = optimizer(model.named_parameters(), **defaults)
    for step in range(3):
        run.zero_grad()
        loss_of(model, *batch(step)).backward()
        if kind == "clars":
            run.set_sample_norms({layer: torch.tensor(2.0) for layer in run.layers[1:]})
        run.step()
    for name, value in model[0].state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(parameter in run.state for parameter in model[0].parameters())
    assert run.layer_names == ["0.weight", "3.weight", "4.weight"]
    for value in run.layer_stats().values():
        assert value.isnan().tolist() == [True, False, False]


@ALL
@pytest.mark.parametrize("foreach", [None, True])
def test_parameter_data_may_be_replaced(kind, foreach):
    """The new memory may have another layout than the state."""
    plain, run = Run(kind, small_model(), foreach=foreach), Run(kind, small_model(), foreach=foreach)
    for step in range(6):
        for parameter in run.model.parameters():
            if step == 2:
                parameter.data = parameter.data.clone()
            if step == 4 and parameter.ndim == 2:
                parameter.data = parameter.data.t().contiguous().t()
        plain.train([step])
        run.train([step])
    assert run.model[0].weight.stride() == (1, 5)
    close(list(run.model.parameters()), list(plain.model.parameters()), rtol=1e-6)


def test_sum_of_norms_with_layers_that_are_not_decayed():
    """Each layer has its own decay: 0 for a bias that is adapted."""
    weight, bias = torch.nn.Parameter(torch.full((2, 2), 3.0)), torch.nn.Parameter(torch.full((4,), 3.0))
    options = {"lr": 1.0, "weight_decay": 0.5, "trust_coefficient": 1.0, "denominator": "sum_of_norms"}
    optimizer = LARS([weight, bias], adapt_1d=True, foreach=True, **options)
    weight.grad, bias.grad = torch.ones(2, 2), torch.ones(4)
    optimizer.step()
    assert optimizer.layer_stats()["trust_ratio"].tolist() == pytest.approx([6 / (2 + 0.5 * 6), 6 / 2])


@pytest.mark.parametrize(("kind", "way"), [("sgd", "foreach"), *EACH_WAY])
@pytest.mark.filterwarnings("error")
def test_backward_through_an_overwritten_weight_raises(kind, way):
    """Autograd detects the update, fused or not, as with torch.optim.SGD."""
    needs_cpp_compiler()
    weight = torch.nn.Parameter(torch.ones(2, 2))
    inputs = torch.ones(2, 2, requires_grad=True)
    optimizer, defaults = KINDS.get(kind, (torch.optim.SGD, {"lr": 0.1}))
    optimizer = optimizer([weight], **{**defaults, way: True})
    loss = (inputs @ weight).square().sum()
    loss.backward(retain_graph=True)
    if kind == "clars":
        optimizer.set_sample_norms({weight: torch.tensor(2.0)})
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- CUDA graphs

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def captured(step):
    """Return a graph of ``step`` after one step for the warm-up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@on_gpu
@pytest.mark.filterwarnings("error:.*fused=True")
@pytest.mark.parametrize("options", [{}, {"adapt_1d": True, "max_ratio": 1.0}], ids=["default", "limited"])
@pytest.mark.parametrize(("kind", "way"), EACH_WAY)
def test_cuda_graph(kind, options, way):
    """A graph is replayed with another lr each time, as an eager step in fp64; statistics are those of the replay."""
    if kind == "lars" and options:
        options = {**options, "denominator": "sum_of_norms", "lr_in_momentum": True}
    lr = torch.tensor(lr_of(kind), device="cuda")
    eager = Run(kind, small_model().double().cuda(), foreach=True, **options)
    run = Run(kind, small_model().cuda(), lr=lr, capturable=True, **{way: True}, **options)
    loss_of(eager.model, *(tensor.double().cuda() for tensor in batch(0))).backward()
    for mine, theirs in zip(run.model.parameters(), eager.model.parameters(), strict=True):
        mine.grad = theirs.grad.float()  # stays the same: this is about the step
    for one in (eager, run):
        one.given = {layer: torch.tensor(2.0, device="cuda") for layer in one.optimizer.layers}

    def step(one):
        if kind == "clars":
            one.optimizer.set_sample_norms(one.given)
        one.optimizer.step()

    graph = captured(lambda: step(run))
    step(eager)
    for factor in (1.0, 0.5, 2.0):
        lr.fill_(lr_of(kind) * factor)
        eager.optimizer.param_groups[0]["lr"] = lr_of(kind) * factor
        graph.replay()
        step(eager)
        for mine, theirs in zip(run.model.parameters(), eager.model.parameters(), strict=True):
            close(mine.double(), theirs)
        close(run.optimizer.layer_stats(), eager.optimizer.layer_stats())


@on_gpu
@ALL
def test_cuda_graph_of_the_whole_training_step(kind):
    """The captured backward pass allocates the gradients; eager steps don't change the graph."""
    eager, run = (Run(kind, small_model().cuda(), foreach=foreach, capturable=True) for foreach in (True, None))
    inputs = [tensor.cuda() for tensor in batch(0)]
    norm = torch.tensor(2.0, device="cuda")

    def step(one):
        one.optimizer.zero_grad(set_to_none=True)
        loss_of(one.model, *inputs).backward()
        if kind == "clars":
            one.optimizer.set_sample_norms(dict.fromkeys(one.optimizer.layers, norm))
        one.optimizer.step()

    if kind == "clars":
        for one in (eager, run):
            one.norms.remove()
    graph = captured(lambda: step(run))
    step(eager)
    for number in range(1, 6):
        for tensor, values in zip(inputs, batch(number), strict=True):
            tensor.copy_(values)
        if number == 3:
            step(run)
        else:
            graph.replay()
        step(eager)
        close(list(run.model.parameters()), list(eager.model.parameters()))


# -- processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    in_two_processes(run_cases, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(outcomes, case):
    for rank in range(PROCESSES):
        outcome = outcomes / f"{case}-{rank}"
        assert outcome.exists(), "an earlier case failed"
        assert outcome.read_text() == ""
