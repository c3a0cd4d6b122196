"""`verify()`: a plan against the dense model: loss, every gradient, norm, logits, and the weights after optimizer steps."""

from __future__ import annotations

import inspect
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardcomp import presets
from shardcomp.capture.copying import copy_model
from shardcomp.errors import VerifyError
from shardcomp.ir.packed import PackedSlice, assemble, group_by_packed
from shardcomp.ir.precision import COMPUTE
from shardcomp.lowering import Lowered, lower
from shardcomp.materialize import allocate, weights_of
from shardcomp.policy import Policy
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.optimizer import AdamW
from shardcomp.sharding.weight_dims import module_of
from shardcomp.verification.dense_model import (
    KINDS,
    OPTIMIZER,
    OWN,
    Batch,
    Outcome,
    batches,
    dense,
    own_loss,
    steps,
    without_dropout,
)
from shardcomp.verification.mutants import Mutant, mutants
from shardcomp.verification.thread_ranks import run_alone, run_ranks
from shardcomp.weights.initialization import initialize

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}
"""Largest relative deviation, by precision. bf16 and fp16 are judged by their distance from float64, see `ROUGH_FACTOR`."""
ROUGH_FACTOR = 1.5
"""How much further from float64 a plan of 16 bits may be than the dense model in the same dtype is."""
FLOOR = 1e-6
"""A gradient is compared with its own norm, or with this share of the norm of all gradients if that is larger."""
MAX_RANKS = 16
DEVICES = ("cpu", "cuda")


class _Disagreement(VerifyError):
    """Two ranks have different numbers for one thing."""


@dataclass
class Verification:
    """The answer: `deviation` holds the largest of each quantity, `worst` the one nearest to (or furthest over) its
    tolerance."""

    ok: bool
    precision: str
    deviation: dict[str, float]
    worst: dict[str, Any]
    reproduce: str
    mutants: dict[str, Any] = field(default_factory=dict)
    dropout: dict[str, float] = field(default_factory=dict)
    """The probabilities that were set to zero on both sides, by the configuration's key or the module's."""
    batches: tuple[str, ...] = ()
    """The kinds of batches that were compared on: those that were asked for and whose inputs the model takes."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    model_or_config: Any,
    policy: Policy | str | Path,
    world_size: int | None = None,
    shrink: dict[str, Any] | None = None,
    mutate: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    kinds: tuple[str, ...] = KINDS,
    samples: int | None = None,
    device: str = "cpu",
) -> Verification:
    """Run a plan on ranks that are threads of this process, and compare it with the unmodified dense model.

    A preset or a configuration is first lowered at full size, which checks that the plan is legal, then shrunk to a small model
    of the same structure (`shrink` sets keys of it; `{"none": True}` keeps its size). A model is taken as it is. Two runs never
    drop the same, so both sides run without dropout.
    kinds: the batches to compare on, as far as the model takes their inputs; causal is always among them. mutate: plant every
    fault that can be enumerated from the program, and require that each is noticed by its numbers. samples: how many each
    data-parallel rank has, so that a last micro-batch may be smaller; None makes a few whole micro-batches. device: cpu, or
    cuda, where both sides run on the GPU, and the plan is one rank's, under the process group that training has.
    """
    if not isinstance(policy, Policy):
        policy = Policy.load(policy)
    options = policy.options
    _check_device(device, world_size or options.ranks)
    model, name = _small_model(model_or_config, policy, world_size, shrink or {}, progress)
    model, dropped = without_dropout(model)
    mesh = policy.mesh(world_size or options.ranks)
    if mesh.world_size > MAX_RANKS:
        raise VerifyError(
            f"a world of {mesh.world_size} ranks: verify runs at most {MAX_RANKS}; verify a smaller one of its kind"
        )
    micro_batch = options.micro_batch or 1
    plan = policy.replace(micro_batch=micro_batch)
    if not isinstance(model_or_config, nn.Module) and not (shrink or {}).get("none"):
        if options.stage_layers is not None:
            progress("stage_layers are checked at full size; the small model's stages are balanced by cost")
        plan = plan.replace(stage_layers=None)
    # On each rank two micro-batches, or as many as make a pipeline forward and backward in turn, and another.
    rows = mesh.dp * (samples or micro_batch * (2 if mesh.pp == 1 else mesh.pp + 1))
    length = -(-24 // mesh.tp) * mesh.tp
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    made = batches(vocabulary, rows, length, options.seed)
    given = {kind: held for kind, held in made.items() if kind in ("causal", *kinds) and _takes(model, held)}
    # AdamW divides by the size of each gradient, so it turns the rounding of a small one into a step of full size.
    updates = steps(vocabulary, rows, length, options.seed) if options.precision == "fp64" else []
    given, updates = {kind: _on(device, batch) for kind, batch in given.items()}, [_on(device, batch) for batch in updates]
    progress("dense model")
    precision = options.precision
    reference = model if device == "cpu" else copy_model(model).to(device)
    exact = dense(reference, precision if precision in TOLERANCE else "fp64", given, updates)
    rough = None if precision in TOLERANCE else dense(reference, precision, given, updates)
    lowered = lower(model, plan, mesh.world_size, seq=length)
    _refuse_dropout(lowered)
    progress(f"{mesh.world_size} ranks")
    outcome = _sharded(lowered, given, updates)
    deviation, worst, ok = _compare(outcome, exact, rough, precision)
    reproduce = _command(name, policy, mesh.world_size, shrink or {}, device)
    found = Verification(ok, precision, deviation, worst, reproduce, dropout=dropped, batches=tuple(given))
    if mutate:
        found.mutants = _mutation(lowered, {"causal": given["causal"]}, exact, rough, precision, progress)
        found.ok = ok and not found.mutants["survivors"]
    return found


def _check_device(device: str, world_size: int) -> None:
    """Raise VerifyError for a device that there is not, or that this many ranks do not run on."""
    if device not in DEVICES:
        raise VerifyError(f"device = {device}: use {' or '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise VerifyError(f"device = cuda: torch {torch.__version__} finds no GPU here; use device = cpu")
    if device == "cuda" and world_size > 1:
        raise VerifyError(f"device = cuda: one rank runs there, and the plan has {world_size}; use device = cpu for it")


def _on(device: str, batch: Batch) -> Batch:
    return {name: held.to(device) for name, held in batch.items()}


def _small_model(
    model_or_config: Any, policy: Policy, world_size: int | None, shrink: dict[str, Any], progress: Callable[[str], None]
) -> tuple[nn.Module, str]:
    """A dense model with real float32 weights, and what to call it on the command line."""
    if isinstance(model_or_config, nn.Module):
        if any(p.is_meta for p in model_or_config.parameters()):
            model_or_config = initialize(model_or_config, policy.options.seed)
        return model_or_config, type(model_or_config).__name__
    config, name = small_config(model_or_config, [(policy, world_size)], shrink, progress)
    return initialize(presets.build(config), policy.options.seed), name


def small_config(
    config_or_name: Any,
    plans: Sequence[tuple[Policy, int | None]],
    shrink: Mapping[str, Any],
    progress: Callable[[str], None],
) -> tuple[Any, str]:
    """A small configuration of the same structure that all plans, (policy, ranks) each, can split, and what to call it on the
    command line. Raises a ShardError where a plan is not legal at full size."""
    config = presets.config_of(config_or_name)
    name = str(config_or_name) if isinstance(config_or_name, (str, Path)) else type(config).__name__
    if not shrink.get("none"):
        progress("full size")
        for policy, world_size in plans:
            lower(config, policy, world_size)
        tensor = math.lcm(*(policy.options.tensor for policy, _ in plans))
        config = presets.shrink(config, dict(shrink), tensor=tensor, layers=max(p.options.stages for p, _ in plans))
    return config, name


def _takes(model: nn.Module, batch: Batch) -> bool:
    """Whether the model has a parameter for every input of a batch."""
    parameters = inspect.signature(model.forward).parameters
    return batch.keys() <= parameters.keys() or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _refuse_dropout(lowered: Lowered) -> None:
    """Raise VerifyError where a plan still drops: with a probability that the model keeps elsewhere."""
    dropping = [module_of(unit, n) for unit in lowered.program.units for n in unit.body.calls() if "random" in n.kwargs]
    if dropping:
        raise VerifyError(
            f"{dropping[0]} drops, no two runs drop the same, and its probability cannot be set to zero: it is no attribute "
            "that has 'drop' in its name"
        )


def _sharded(lowered: Lowered, given: dict[str, Batch], updates: list[Batch], mutant: Mutant | None = None) -> Outcome:
    """What the plan gives on all its ranks; the losses of all ranks must be one number."""
    weights = weights_of(lowered)
    parts = {name: parameter.part for name, parameter in lowered.program.parameters.items()}
    for batch in given.values():  # lowered here, because tracing is not for threads
        lowered.for_call(_call(batch, ("loss",)), (lowered.policy.options.micro_batch or 1, batch["input_ids"].shape[1]))
    if mutant is None:
        causal = given["causal"]
        rows, length = causal["input_ids"].shape[0] // lowered.mesh.dp, causal["input_ids"].shape[1]
        at_once = rows if lowered.mesh.pp == 1 else lowered.policy.options.micro_batch or rows
        lowered.for_call(_call(causal, ("loss", "logits")), (at_once, length))

    def work(rank: int) -> Outcome:
        torch.set_num_threads(1)
        sharded = allocate(lowered, weights, mutant.blueprint if mutant else None)
        if mutant is not None:
            mutant.plant(sharded)
        return _run(sharded, given, updates, parts, with_logits=mutant is None)

    on_cpu = given["causal"]["input_ids"].device.type == "cpu"
    outcomes = (run_ranks if on_cpu else run_alone)(lowered.mesh.world_size, work)
    for kind, loss in outcomes[0].loss.items():
        if any(not torch.equal(other.loss[kind], loss) for other in outcomes):
            raise _Disagreement(
                f"the ranks disagree about the loss of the {kind} batch: {[float(o.loss[kind]) for o in outcomes]}"
            )
    logits = {o.rows: o.logits for o in outcomes if o.logits is not None}  # type: ignore[attr-defined]
    found = outcomes[0]
    found.logits = torch.cat([logits[key] for key in sorted(logits)]) if logits else None
    names = lowered.program.canonical_names()
    for other in outcomes[1:]:  # the stages of other pipeline ranks; a tied weight's second copy has the same gradient
        for kind, gradients in other.gradients.items():
            _add_stages(found.gradients[kind], gradients, names)
        _add_stages(found.weights, other.weights, names)
    return found


def _add_stages(known: dict[str, Tensor], more: dict[str, Tensor], names: Mapping[str, str]) -> None:
    """Add what other pipeline ranks hold. Raises _Disagreement where two ranks hold the same and do not agree."""
    for name, held in more.items():
        first = names.get(name, name)
        if not torch.equal(known.setdefault(first, held), held):
            raise _Disagreement(f"the ranks disagree about {first}: its copies on two ranks differ")
    for alias in names.keys() & known.keys():
        known.setdefault(names[alias], known.pop(alias))


def _call(batch: Batch, outputs: tuple[str, ...]) -> Any:
    return tuple(sorted((name, held.dim()) for name, held in batch.items())), outputs, True


def _run(
    sharded: ShardedModel,
    given: dict[str, Batch],
    updates: list[Batch],
    parts: Mapping[str, PackedSlice | None],
    with_logits: bool,
) -> Outcome:
    rank, size = sharded.mesh.get_local_rank("dp"), sharded.mesh["dp"].size()

    def mine(batch: Batch) -> Batch:
        return {name: held.chunk(size)[rank] for name, held in batch.items()}

    found = Outcome()
    found.rows = rank  # type: ignore[attr-defined]
    for kind, batch in given.items():
        step = sharded.train_step(**mine(batch))
        while step.skipped and sharded.loss_scale.enabled and sharded.loss_scale.scale > 1:  # as a training loop would go on
            sharded.zero_grad()
            sharded.loss_scale.update(skipped=True)
            step = sharded.train_step(**mine(batch))
        found.loss[kind] = step.loss
        found.gradients[kind] = _joined(_held(sharded, lambda p: p.grad), parts)
        found.norm[kind] = sharded.clip_grad_norm_(math.inf)
        sharded.zero_grad()
    if with_logits:
        if sharded.mesh["pp"].size() == 1:
            out = sharded(**mine(given["causal"]), return_logits="whole")
            found.logits = out["logits"].detach()
            if sharded.blueprint.precision in OWN:
                (out["loss"] + own_loss(out["logits"])).backward()
                found.own = _joined(_held(sharded, lambda p: p.grad), parts)
                sharded.zero_grad()
        else:
            found.logits = sharded.eval_step(**mine(given["causal"]), return_logits="whole").logits
    if updates:
        trained = [p for p in sharded.parameters() if p.requires_grad]
        optimizer = AdamW(trained, **OPTIMIZER) if trained else None
        for batch in updates:
            sharded.train_step(**mine(batch))
            if optimizer is not None:  # all of this rank's stages may be frozen
                optimizer.step()
                optimizer.zero_grad()
        found.weights = _joined(_held(sharded, lambda p: p), parts)
    return found


def _held(sharded: ShardedModel, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """Something of every parameter of this rank, whole. Raises _Disagreement where two stages on it hold a tied weight and do
    not agree."""
    mine = dict(sharded.named_parameters())
    found: dict[str, Tensor] = {}
    for name, held in ((name, held) for chunk in sharded._chunks for name, held in chunk.names.items()):
        given = of(mine[held])
        if given is None:
            continue
        full = full_tensor(given.detach()).clone()
        if not torch.equal(found.setdefault(name, full), full):
            raise _Disagreement(f"two stages of one rank disagree about {name}: their copies differ")
    return found


def _joined(held: dict[str, Tensor], parts: Mapping[str, PackedSlice | None]) -> dict[str, Tensor]:
    """The same by the names of the dense model: parts of a packed weight are joined."""
    names = [name for name, pieces in group_by_packed(parts).items() if any(piece in held for piece in pieces)]
    return {name: held[name] if name in held else assemble(name, parts, held) for name in names}


@dataclass
class _Tally:
    """Collects deviations: the largest per quantity, and the one nearest to its tolerance."""

    deviation: dict[str, float] = field(default_factory=dict)
    worst: dict[str, Any] = field(default_factory=dict)
    ok: bool = True

    def add(self, quantity: str, parameter: str, value: float, tolerance: float) -> None:
        value = math.inf if math.isnan(value) else value
        self.deviation[quantity] = max(self.deviation.get(quantity, 0.0), value)
        self.ok = self.ok and value <= tolerance
        if not self.worst or value / tolerance > self.worst["value"] / self.worst["tolerance"]:
            self.worst = {"quantity": quantity, "parameter": parameter, "value": value, "tolerance": tolerance}


def _compare(
    got: Outcome, exact: Outcome, rough: Outcome | None, precision: str
) -> tuple[dict[str, float], dict[str, Any], bool]:
    tally = _Tally()
    if rough is not None:
        _compare_rough(tally, got, exact, rough, COMPUTE[precision])
        return tally.deviation, tally.worst, tally.ok
    limit = TOLERANCE[precision]
    for kind, loss in got.loss.items():
        tally.add("loss", kind, _relative(loss, exact.loss[kind]), limit)
        tally.add("norm", kind, _relative(got.norm[kind], exact.norm[kind]), limit)
        floor = FLOOR * float(exact.norm[kind])
        for name, gradient in exact.gradients[kind].items():
            mine = got.gradients[kind].get(name, torch.zeros_like(gradient))
            tally.add("gradients", name, _relative(mine, gradient, floor), limit)
        extra = set(got.gradients[kind]) - set(exact.gradients[kind])
        if extra:
            raise VerifyError(f"gradients for parameters that have none in the dense model: {', '.join(sorted(extra))}")
    total = math.hypot(*(float(gradient.norm()) for gradient in exact.own.values()))
    for name, gradient in exact.own.items() if got.own else ():
        mine = got.own.get(name, torch.zeros_like(gradient))
        tally.add("gradients", name, _relative(mine, gradient, FLOOR * total), limit)
    if got.logits is not None and exact.logits is not None:
        tally.add("logits", "", _relative(got.logits, exact.logits), limit)
    norm = float(exact.norm["causal"])
    for name, weight in got.weights.items():
        if float(exact.gradients["causal"][name].norm() if name in exact.gradients["causal"] else 0) > FLOOR * norm:
            tally.add("weights", name, _relative(weight, exact.weights[name]), limit)
    return tally.deviation, tally.worst, tally.ok


def _compare_rough(tally: _Tally, got: Outcome, exact: Outcome, rough: Outcome, dtype: torch.dtype) -> None:
    """16 bits: everything may be at most `ROUGH_FACTOR` times as far from float64 as the dense model in the same dtype is."""

    def joined(outcome: Outcome, kind: str) -> Tensor:
        return torch.cat([outcome.gradients[kind][name].flatten().double() for name in exact.gradients[kind]])

    for kind in got.loss:
        mine, dense_one = (_relative(joined(o, kind), joined(exact, kind)) for o in (got, rough))
        tally.add("gradients", kind, mine, ROUGH_FACTOR * dense_one)
    losses = [torch.stack([o.loss[k].double() for k in got.loss]) for o in (got, rough, exact)]
    # One number each: compared with the size of the dtype's own rounding where the dense model is closer by luck.
    rounding = float(torch.finfo(dtype).eps) / 2
    tally.add("loss", "", _relative(losses[0], losses[2]), max(ROUGH_FACTOR * _relative(losses[1], losses[2]), rounding))
    if got.logits is not None and exact.logits is not None and rough.logits is not None:
        tally.add("logits", "", _relative(got.logits, exact.logits), ROUGH_FACTOR * _relative(rough.logits, exact.logits))


def _relative(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """‖a − b‖ / max(‖b‖, floor), in float64."""
    difference = float((a.double() - b.double()).norm())
    return 0.0 if difference == 0.0 else difference / max(float(b.double().norm()), floor, 1e-300)


def _mutation(
    lowered: Lowered,
    given: dict[str, Batch],
    exact: Outcome,
    rough: Outcome | None,
    precision: str,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Plant each fault in turn; a fault survives if the comparison still passes. What falsifies a gradient that is zero, as
    that of a bias is which all keys share, is no fault."""
    total, survivors = 0, []
    floor = FLOOR * float(exact.norm["causal"])
    for mutant in mutants(lowered.program, lowered.blueprint()):
        if mutant.gradient_of is not None and float(_gradient(lowered, mutant.gradient_of, exact).norm()) <= floor:
            continue
        total += 1
        progress(f"mutant {total}: {mutant.what}")
        try:
            outcome = _sharded(lowered, given, [], mutant)
        except _Disagreement:
            continue
        if _compare(outcome, exact, rough, precision)[2]:
            survivors.append(mutant.what)
    return {"total": total, "killed": total - len(survivors), "survivors": survivors}


def _gradient(lowered: Lowered, name: str, exact: Outcome) -> Tensor:
    """The dense model's gradient of a parameter, which may be a part of a packed one."""
    part, gradients = lowered.program.parameters[name].part, exact.gradients["causal"]
    return (
        gradients[part.of].index_select(part.dim, torch.tensor(part.rows()).to(gradients[part.of].device))
        if part
        else gradients[name]
    )


def _command(name: str, policy: Policy, world_size: int, shrink: dict[str, Any], device: str) -> str:
    """The command line that runs this comparison again."""
    words = ["shardcomp", "verify", name, "--world", str(world_size), "--policy", policy.name]
    for key, held in asdict(policy.options).items():
        if held is not None and key != "data":
            words += [f"--{key.replace('_', '-')}", str(held).lower() if isinstance(held, bool) else str(held)]
    for key, held in shrink.items():
        words += ["--shrink", "none" if key == "none" else f"{key}={held}"]
    words += [] if device == "cpu" else ["--device", device]
    return shlex.join(words)
