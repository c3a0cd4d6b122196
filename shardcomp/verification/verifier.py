"""`verify()`: a plan against the dense model: loss, every gradient, norm, logits, and the weights after optimizer steps."""

from __future__ import annotations

import inspect
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from shardcomp import presets
from shardcomp.capture.copying import copy_model
from shardcomp.errors import VerifyError
from shardcomp.lowered import Lowered
from shardcomp.lowering import lower
from shardcomp.policy import Policy
from shardcomp.sharding.weight_dims import module_of
from shardcomp.verification.compare import FLOOR, TOLERANCE, Disagreement, Worst, compare
from shardcomp.verification.dense_model import KINDS, Batch, Outcome, batches, dense, update_batches, without_dropout
from shardcomp.verification.mutants import mutants
from shardcomp.verification.sharded_model import run_plan
from shardcomp.weights.initialization import initialize

MAX_RANKS = 16
LENGTH = 24
"""Tokens of a row, rounded up to what the tensor-parallel ranks divide."""
DEVICES = ("cpu", "cuda")


class MutantCounts(TypedDict, total=False):
    """What became of the mutants. Empty where none were asked for."""

    total: int
    killed: int
    """How many were noticed by their numbers."""
    survivors: list[str]
    """What is wrong in each of the others."""


@dataclass
class Verification:
    """The answer of `verify`, and what `shardcomp verify --json` prints."""

    ok: bool
    """Whether every deviation is within its tolerance, the ranks agree with each other, and every mutant was noticed."""
    precision: str
    deviation: dict[str, float]
    """The largest relative deviation of each quantity: loss, logits, gradients, norm, weights."""
    worst: Worst
    reproduce: str
    """The command line that runs this comparison again."""
    mutants: MutantCounts = field(default_factory=MutantCounts)
    dropout: dict[str, float] = field(default_factory=dict)
    """The probabilities that were set to zero on both sides, by the configuration's key or the module's name."""
    batches: tuple[str, ...] = ()
    """The kinds of batches that were compared: those that were asked for and whose inputs the model takes."""
    disagreements: list[Disagreement] = field(default_factory=list)
    """The values that ranks should have the same bits of, and do not. The furthest apart comes first."""

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

    A preset or a configuration is first lowered at full size, which checks that the plan is legal. Then it is shrunk to a small
    model of the same structure. A model is taken as it is. Both sides run without dropout, since no two runs drop the same.

    Args:
        model_or_config: a preset, a HuggingFace configuration, its directory, or a model.
        policy: a policy, or what `Policy.load` takes.
        world_size: how many ranks; by default as many as the policy's degrees make.
        shrink: sizes of the small model by configuration key; `{"none": True}` keeps the full size.
        mutate: also run every mutant of the program, a deliberate error each, and require that its numbers give it away.
        progress: called with a few words when a part begins.
        kinds: the batches to compare, as far as the model takes their inputs: causal, padded, packed. Causal always is.
        samples: rows of each data-parallel rank, so that the last micro-batch may be smaller. None: a few whole micro-batches.
        device: "cpu", or "cuda", where both sides run on the GPU. The plan is one rank's there, under a real process group.

    Raises:
        VerifyError: the two could not be compared: too many ranks, a dense model that fails by itself, a rank that fails.
        ShardError: the plan is not legal.

    Example:
        >>> answer = verify("tiny", Policy.load("llama", tensor=2, precision="fp64"), kinds=("causal",))
        >>> answer.ok, answer.worst["tolerance"], answer.deviation["gradients"] < 1e-9
        (True, 1e-09, True)
    """
    if not isinstance(policy, Policy):
        policy = Policy.load(policy)
    options, shrink = policy.options, shrink or {}
    _check_device(device, world_size or options.ranks)
    model, name = _small_model(model_or_config, policy, world_size, shrink, progress)
    model, dropout = without_dropout(model)
    mesh = policy.mesh(world_size or options.ranks)
    if mesh.world_size > MAX_RANKS:
        raise VerifyError(
            f"a world of {mesh.world_size} ranks: verify runs at most {MAX_RANKS}; verify a smaller one of its kind"
        )
    micro_batch = options.micro_batch or 1
    plan = policy.replace(micro_batch=micro_batch)
    if not isinstance(model_or_config, nn.Module) and not shrink.get("none"):
        if options.stage_layers is not None:
            progress("stage_layers are checked at full size; the small model's stages are balanced by cost")
        plan = plan.replace(stage_layers=None)

    # Each rank has two micro-batches. A pipeline needs more of them until it alternates forwards and backwards.
    rows = mesh.dp * (samples or micro_batch * (2 if mesh.pp == 1 else mesh.pp + 1))
    length = -(-LENGTH // mesh.tp) * mesh.tp
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    compared = {
        kind: _to_device(batch, device)
        for kind, batch in batches(vocabulary, rows, length, options.seed).items()
        if kind in ("causal", *kinds) and _takes(model, batch)
    }
    # AdamW divides by the size of each gradient: it turns the rounding of a small one into a step of full size.
    updates = update_batches(vocabulary, rows, length, options.seed) if options.precision == "fp64" else []
    updates = [_to_device(batch, device) for batch in updates]

    progress("dense model")
    reference = model if device == "cpu" else copy_model(model).to(device)
    is_rough = options.precision not in TOLERANCE
    exact = dense(reference, "fp64" if is_rough else options.precision, compared, updates)
    rough = dense(reference, options.precision, compared, updates) if is_rough else None
    # A model of static shapes is captured at the one that runs: mutants are planted in that code, and not in another call's.
    lowered = lower(model, plan, mesh.world_size, seq=length, sample=(micro_batch, length))
    _refuse_dropout(lowered)
    progress(f"{mesh.world_size} ranks")
    deviations = compare(run_plan(lowered, compared, updates), exact, rough, options.precision)
    reproduce = _command(name, policy, mesh.world_size, shrink, device)
    answer = Verification(
        deviations.ok,
        options.precision,
        deviations.largest,
        deviations.worst,
        reproduce,
        dropout=dropout,
        batches=tuple(compared),
        disagreements=deviations.disagreements,
    )
    if mutate:
        answer.mutants = _run_mutants(lowered, {"causal": compared["causal"]}, exact, rough, progress)
        answer.ok = answer.ok and not answer.mutants["survivors"]
    return answer


def _check_device(device: str, world_size: int) -> None:
    """Raise VerifyError for a device that does not exist here, or that this many ranks do not run on."""
    if device not in DEVICES:
        raise VerifyError(f"device = {device}: use {' or '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise VerifyError(f"device = cuda: torch {torch.__version__} finds no GPU here; use device = cpu")
    if device == "cuda" and world_size > 1:
        raise VerifyError(f"device = cuda: one rank runs there, and the plan has {world_size}; use device = cpu for it")


def _to_device(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _small_model(
    model_or_config: Any, policy: Policy, world_size: int | None, shrink: dict[str, Any], progress: Callable[[str], None]
) -> tuple[nn.Module, str]:
    """A dense model with real float32 weights, and its name on the command line."""
    if isinstance(model_or_config, nn.Module):
        if any(param.is_meta for param in model_or_config.parameters()):
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
    """A small configuration of the same structure that all plans can split.

    Args:
        config_or_name: a preset, a HuggingFace configuration, or its directory.
        plans: (policy, number of ranks) of each.
        shrink, progress: as in `verify`.

    Returns:
        The configuration, and its name on the command line.

    Raises:
        ShardError: a plan is not legal at full size.
    """
    config = presets.config_of(config_or_name)
    name = str(config_or_name) if isinstance(config_or_name, (str, Path)) else type(config).__name__
    if not shrink.get("none"):
        progress("full size")
        for policy, world_size in plans:
            lower(config, policy, world_size)
        tensor = math.lcm(*(policy.options.tensor for policy, _ in plans))
        layers = max(policy.options.stages for policy, _ in plans)
        config = presets.shrink(config, dict(shrink), tensor=tensor, layers=layers)
    return config, name


def _takes(model: nn.Module, batch: Batch) -> bool:
    """Whether the model's forward has a parameter for every input of a batch."""
    parameters = inspect.signature(model.forward).parameters
    return batch.keys() <= parameters.keys() or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _refuse_dropout(lowered: Lowered) -> None:
    """Raise VerifyError if a plan still drops, with a probability that `without_dropout` does not know."""
    dropping = [module_of(unit, n) for unit in lowered.program.units for n in unit.body.calls() if "random" in n.kwargs]
    if dropping:
        raise VerifyError(
            f"{dropping[0]} drops, no two runs drop the same, and its probability cannot be set to zero: it is not an "
            "attribute that has 'drop' in its name"
        )


def _run_mutants(
    lowered: Lowered, causal: dict[str, Batch], exact: Outcome, rough: Outcome | None, progress: Callable[[str], None]
) -> MutantCounts:
    """Run every mutant of a program. One survives if the comparison passes all the same.

    Some gradients are zero by the model's own mathematics, such as that of a bias which all keys share. A mutant that falsifies
    nothing else is left out, since no number could give it away.
    """
    total = 0
    survivors: list[str] = []
    floor = FLOOR * float(exact.norm["causal"])
    for mutant in mutants(lowered.program, lowered.blueprint()):
        if mutant.gradient_of is not None and float(_gradient(lowered, mutant.gradient_of, exact).norm()) <= floor:
            continue
        total += 1
        progress(f"mutant {total}: {mutant.what}")
        outcome = run_plan(lowered, causal, [], mutant)
        if compare(outcome, exact, rough, lowered.policy.options.precision).ok:
            survivors.append(mutant.what)
    return {"total": total, "killed": total - len(survivors), "survivors": survivors}


def _gradient(lowered: Lowered, name: str, exact: Outcome) -> Tensor:
    """The dense model's gradient of a parameter, which may be a slice of a packed one."""
    packed, gradients = lowered.program.parameters[name].part, exact.gradients["causal"]
    if packed is None:
        return gradients[name]
    gradient = gradients[packed.of]
    return gradient.index_select(packed.dim, torch.tensor(packed.rows()).to(gradient.device))


def _command(name: str, policy: Policy, world_size: int, shrink: dict[str, Any], device: str) -> str:
    """The command line that runs this comparison again."""
    words = ["shardcomp", "verify", name, "--world", str(world_size), "--policy", policy.name]
    for key, value in asdict(policy.options).items():
        if value is not None and key != "data":
            words += [f"--{key.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)]
    for key, value in shrink.items():
        words += ["--shrink", "none" if key == "none" else f"{key}={value}"]
    words += [] if device == "cpu" else ["--device", device]
    return shlex.join(words)
