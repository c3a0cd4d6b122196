"""shardcomp.AdamW beside torch's own: the same numbers, checkpoints that go both ways, clipping and skipping within a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint.legs import adamw as torch_adamw
from checkpoint.legs import close, lowered_for, train
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import shardcomp
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.model import ShardedModel
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny

SHAPES = [(5, 7), (1,), (0, 3), (131,), ()]
OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.9, 0.97), "weight_decay": 0.1}
NAMES = ("model", "optimizer")
Made = tuple[list[nn.Parameter], torch.optim.Optimizer]


def draw(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for shape in SHAPES]


def made(kind: Callable[..., torch.optim.Optimizer], dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    """An optimizer of two groups, the second without decay."""
    parameters = [nn.Parameter(each) for each in draw(0, dtype)]
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.0, "lr": options.get("lr", 0.01)}]
    return parameters, kind(groups, **{**OPTIONS, **options})


def steps(pair: Made, seeds: range, **options: Any) -> list[Tensor]:
    """Make a step for each seed; returns the weights."""
    parameters, optimizer = pair
    for seed in seeds:
        for p, gradient in zip(parameters, draw(100 + seed, parameters[0].dtype), strict=True):
            p.grad = gradient
        optimizer.step(**options)
    return [p.detach().clone() for p in parameters]


def ulps(found: list[Tensor], wanted: list[Tensor], before: list[Tensor]) -> float:
    """The largest difference, in units of the last place of a weight before or after the step, whichever is larger."""
    each = [
        (a - b).abs() / (torch.maximum(b.abs(), c.abs()) * torch.finfo(b.dtype).eps)
        for a, b, c in zip(found, wanted, before, strict=True)
    ]
    return max(float(e.max()) for e in each if e.numel())


@pytest.mark.parametrize(
    "options", [{}, {"maximize": True}, {"lr": torch.tensor(0.02, dtype=torch.float64)}, {"betas": (0.3, 0.5)}, {"eps": 0.1}]
)
def test_the_weights_are_those_of_torch(options: dict[str, Any]) -> None:
    mine, theirs = made(shardcomp.AdamW, **options), made(torch.optim.AdamW, foreach=False, **options)
    assert ulps(steps(mine, range(1)), steps(theirs, range(1)), draw(0)) <= 2
    found, wanted = steps(mine, range(1, 30)), steps(theirs, range(1, 30))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
    exact = [made(kind, torch.float64, **options) for kind in (shardcomp.AdamW, torch.optim.AdamW)]
    for a, b in zip(*(steps(pair, range(30)) for pair in exact), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_parameter_is_the_rounding_of_what_is_trained_in_float32(dtype: torch.dtype) -> None:
    mine = made(shardcomp.AdamW, dtype)
    wide = made(shardcomp.AdamW)
    for p, narrow in zip(wide[0], mine[0], strict=True):
        p.data.copy_(narrow)
    for step in range(20):
        steps(mine, range(step, step + 1))
        for p, narrow in zip(wide[0], mine[0], strict=True):
            p.grad = narrow.grad.float()  # type: ignore[union-attr]
        wide[1].step()
    for p, narrow in zip(wide[0], mine[0], strict=True):
        state = mine[1].state[narrow]
        assert torch.equal(state["master"], p) and torch.equal(narrow, p.to(dtype))
        assert {name: held.dtype for name, held in state.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq", "master"), torch.float32
        )


def test_a_norm_clips_within_the_step_and_leaves_the_gradients() -> None:
    for max_norm in (0.5, 1e9, math.inf):
        mine, theirs = made(shardcomp.AdamW, torch.float64), made(torch.optim.AdamW, torch.float64)
        for seed in range(5):
            gradients = draw(seed, torch.float64)
            for (parameters, _), own in ((mine, False), (theirs, True)):
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.grad = gradient.clone() if own else gradient
            norm = nn.utils.clip_grad_norm_(theirs[0], max_norm)
            theirs[1].step()
            mine[1].step(norm=norm, max_norm=max_norm)  # type: ignore[call-arg]
            assert all(torch.equal(p.grad, g) for p, g in zip(mine[0], draw(seed, torch.float64), strict=True))  # type: ignore[arg-type]
        for a, b in zip(mine[0], theirs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_skips_the_step(bad: float) -> None:
    mine = made(shardcomp.AdamW)
    before = steps(mine, range(2))
    after = steps(mine, range(2, 3), norm=torch.tensor(bad), max_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = steps(mine, range(3, 4), norm=torch.tensor(3.0))
    assert all((a != b).all() for a, b in zip(before, again, strict=True))
    assert all(float(mine[1].state[p]["step"]) == 3 for p in mine[0])


def test_a_scaler_of_gradients_is_followed() -> None:
    mine, theirs = made(shardcomp.AdamW), made(torch.optim.AdamW, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for seed in range(4):
        for p, gradient in zip(mine[0], draw(seed), strict=True):
            p.grad = gradient * 1024
        if seed == 2:
            mine[0][3].grad[5] = math.inf  # type: ignore[index]
        scaler.scale(torch.zeros(()))
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in mine[0]]))  # type: ignore[union-attr]
        scaler.step(mine[1], norm=norm, max_norm=2.0)
        scaler.update(1024.0)
        if seed != 2:
            for p, gradient in zip(theirs[0], draw(seed), strict=True):
                p.grad = gradient
            nn.utils.clip_grad_norm_(theirs[0], 2.0)
            theirs[1].step()
    for a, b in zip(mine[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_schedule_a_closure_and_parameters_without_gradients_are_as_in_torch() -> None:
    pairs = [made(shardcomp.AdamW, torch.float64), made(torch.optim.AdamW, torch.float64)]
    losses: list[float] = []
    for parameters, optimizer in pairs:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

        def closure(parameters: list[nn.Parameter] = parameters, optimizer: torch.optim.Optimizer = optimizer) -> Any:
            optimizer.zero_grad()
            loss = (parameters[0].square().sum() + parameters[3].sum()) * 0.5
            loss.backward()
            return loss

        for _ in range(4):
            losses.append(optimizer.step(closure).item())
            schedule.step()
        assert [p in optimizer.state for p in parameters] == [True, False, False, True, False]
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-13)
    (mine, _), (theirs, _) = pairs
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_torch_saved_goes_on_here_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """By `state_dict`, through a file: torch's two steps, two here, two of torch's again."""

    def handed_on(giver: Made, kind: Callable[..., torch.optim.Optimizer]) -> Made:
        torch.save(giver[1].state_dict(), tmp_path / "state")
        taker = made(kind, dtype, lr=1.0)
        for p, given in zip(taker[0], giver[0], strict=True):
            p.data.copy_(given)
        taker[1].load_state_dict(torch.load(tmp_path / "state"))
        assert [group["lr"] for group in taker[1].param_groups] == [0.03, 0.01]
        return taker

    whole_run = steps(made(torch.optim.AdamW, dtype), range(6))
    pair = made(torch.optim.AdamW, dtype)
    steps(pair, range(2))
    pair = handed_on(pair, shardcomp.AdamW)
    steps(pair, range(2, 3))
    pair = handed_on(pair, shardcomp.AdamW)
    if dtype == torch.bfloat16:
        assert all(pair[1].state[p][name].dtype == torch.float32 for p in pair[0] for name in ("exp_avg", "master"))
    steps(pair, range(3, 4))
    pair = handed_on(pair, torch.optim.AdamW)
    found = steps(pair, range(4, 6))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(found, whole_run, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_master_that_torch_carried_along_is_made_anew_from_its_parameter() -> None:
    mine = made(shardcomp.AdamW, torch.bfloat16)
    steps(mine, range(2))
    theirs = made(torch.optim.AdamW, torch.bfloat16)
    theirs[1].load_state_dict(mine[1].state_dict())
    trained = steps(theirs, range(2, 8))
    again = made(shardcomp.AdamW, torch.bfloat16, lr=0.0)
    for p, given in zip(again[0], trained, strict=True):
        p.data.copy_(given)
    again[1].load_state_dict(theirs[1].state_dict())
    for group in again[1].param_groups:
        group["lr"] = 0.0
    assert all(torch.equal(a, b) for a, b in zip(steps(again, range(1)), trained, strict=True))


def test_states_go_through_torchs_distributed_checkpoint(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).double()

    def go(net: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for seed in range(count):
            x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()

    for giver, taker in ((torch.optim.AdamW, shardcomp.AdamW), (shardcomp.AdamW, torch.optim.AdamW)):
        net, other = model(), model()
        given = giver(net.parameters(), lr=0.01)
        go(net, given, 3)
        taken = taker(other.parameters(), lr=0.01)
        path = tmp_path / giver.__module__
        dcp.save(dict(zip(NAMES, get_state_dict(net, given), strict=True)), checkpoint_id=path, no_dist=True)
        loaded = dict(zip(NAMES, get_state_dict(other, taken), strict=True))
        assert set(loaded["optimizer"]["state"]["0.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
        dcp.load(loaded, checkpoint_id=path, no_dist=True)
        set_state_dict(other, taken, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        go(net, given, 2)
        go(other, taken, 2)
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


PLAN: dict[str, Any] = {"data": 2, "zero": 3, "tensor": 2}
TIED = lowered_for(tiny(tie_word_embeddings=True), **PLAN)


def own_adamw(model: nn.Module) -> torch.optim.Optimizer:
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in torch_adamw(model).param_groups]
    return shardcomp.AdamW(groups, lr=3e-3)


@pytest.mark.long  # contract/test_optimizers.py compares with dense weights
def test_a_sharded_model_is_trained_as_by_clipping_and_torchs_own() -> None:
    """In float64, to 1e-12; each way of asking for it."""
    tokens = torch.randint(0, 97, (6, 4, 8), generator=torch.Generator().manual_seed(0))
    clip = 0.3

    def clipped(sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> float:
        norm = sharded.clip_grad_norm_(clip)
        optimizer.step()
        return float(norm)

    def within(sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> float:
        norm = sharded.grad_norm()
        optimizer.step(norm=norm, max_norm=clip)  # type: ignore[call-arg]
        return float(norm)

    def by_model(sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> float:
        norm = sharded.grad_norm()
        assert sharded.optimizer_step(optimizer, max_norm=clip)
        return float(norm)

    def by_norm(sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> float:
        norm = sharded.grad_norm()
        assert sharded.optimizer_step(optimizer, norm=norm, max_norm=clip)
        return float(norm)

    def run(kind: Callable[[nn.Module], torch.optim.Optimizer], update: Callable[..., float]) -> Any:
        def work(rank: int) -> Any:
            sharded = allocate(TIED, weights_of(TIED))
            optimizer = kind(sharded)
            norms = []
            for batch in tokens:
                mine = batch.chunk(2)[sharded.mesh.get_local_rank("dp")]
                sharded.train_step(input_ids=mine, labels=mine)
                norms.append(update(sharded, optimizer))
                optimizer.zero_grad()
            return norms, {name: full_tensor(p.detach()) for name, p in sharded.named_parameters()}

        found = run_ranks(TIED.mesh.world_size, work)
        for norms, weights in found[1:]:
            assert norms == found[0][0]
            assert all(torch.equal(weights[name], held) for name, held in found[0][1].items())
        return found[0]

    norms, weights = run(torch_adamw, clipped)
    assert min(norms) > clip
    ways = ((own_adamw, clipped), (own_adamw, within), (own_adamw, by_model), (own_adamw, by_norm), (torch_adamw, by_norm))
    for kind, update in ways:
        found, held = run(kind, update)
        assert found == pytest.approx(norms, rel=1e-12)
        for name, exact in weights.items():
            assert float((held[name] - exact).norm()) <= 1e-12 * float(exact.norm()), (kind, update, name)


def test_our_checkpoints_go_from_either_to_the_other(tmp_path: Path) -> None:
    whole_run = train(TIED, 4)
    for giver, taker, name in ((torch_adamw, own_adamw, "a"), (own_adamw, torch_adamw, "b"), (own_adamw, own_adamw, "c")):
        train(TIED, 2, save=tmp_path / name / "step-2", optimizer=giver)
        close(train(TIED, 4, load=tmp_path / name, optimizer=taker), whole_run)


def test_dtensors_are_updated_where_they_are_whatever_their_gradients_layout() -> None:
    def work(rank: int) -> list[Tensor]:
        mesh = init_device_mesh("cpu", (2,))
        found = []
        for kind in (shardcomp.AdamW, torch.optim.AdamW):
            full = torch.arange(15.0, dtype=torch.float64).view(5, 3)
            cut = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))
            copied = nn.Parameter(distribute_tensor(full, mesh, [Replicate()]))
            optimizer = kind([cut, copied], lr=0.1)
            for step in range(3):
                part = torch.full((5, 3), 1.0 + rank + step, dtype=torch.float64)
                copied.grad = DTensor.from_local(part, mesh, [Partial()])
                cut.grad = distribute_tensor(full - step, mesh, [Shard(0)])
                optimizer.step()
            found += [cut.full_tensor(), copied.full_tensor()]
            assert isinstance(optimizer.state[cut]["exp_avg"], DTensor)
        dist.barrier()
        return found

    for mine_cut, mine, theirs_cut, theirs in run_ranks(2, work):
        torch.testing.assert_close(mine_cut, theirs_cut, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14)


def test_what_cannot_be_honoured_is_refused() -> None:
    [p] = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match=r"lr = -1: use 0 or more.*; betas = \(0.9, 1.0\): use two numbers from 0 to below 1"):
        shardcomp.AdamW([p], lr=-1, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"lr = tensor.*a tensor one of one element"):
        shardcomp.AdamW([p], lr=torch.ones(2))
    with pytest.raises(ValueError, match="eps = -1: use 0 or more; weight_decay = -2: use 0 or more"):
        shardcomp.AdamW([p], eps=-1, weight_decay=-2)
    with pytest.raises(ValueError, match=r"parameters of torch.complex64 cannot be trained by AdamW; these can: torch.float32"):
        shardcomp.AdamW([p, nn.Parameter(torch.zeros(1, dtype=torch.complex64))])
    optimizer = shardcomp.AdamW([p])
    with pytest.raises(ValueError, match="max_norm = 1.0 needs norm="):
        optimizer.step(max_norm=1.0)
    other = torch.optim.AdamW([p], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad = True: shardcomp.AdamW has no AMSGrad"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.param_groups[0]["amsgrad"]
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad = True"):
        optimizer.step()
