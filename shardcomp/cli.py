"""The command line: `shardcomp inspect`, `verify`, `resume-check`, `convert`, `env`. What is heavy is imported by the command
that needs it."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shardcomp import __version__
from shardcomp.errors import InternalError, PlanError, ShardError
from shardcomp.policy.options import add_option_flags, joined, options_from

if TYPE_CHECKING:
    from shardcomp.policy import Policy

GOOD, NO, BAD_INPUT, FAULT = 0, 1, 2, 3
_EPILOG = "exit status: 0 good, 1 the answer is no, 2 bad input, 3 a fault of shardcomp"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Raises SystemExit(2) where the command line itself is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(joined(words))
    try:
        # Whatever a library prints goes to stderr: stdout is the answer's alone.
        with contextlib.redirect_stdout(sys.stderr):
            status, answer = args.run(args)
        sys.stdout.write(answer)
        sys.stdout.flush()
        return int(status)
    except BrokenPipeError:  # the reader, `head` perhaps, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GOOD
    except InternalError as error:
        print(f"shardcomp: {error}\nThe command was: {shlex.join(['shardcomp', *words])}", file=sys.stderr)
        return FAULT
    except ShardError as error:
        print(f"shardcomp: {error}", file=sys.stderr)
        return BAD_INPUT
    except Exception:
        traceback.print_exc()
        print(f"shardcomp: this is a fault of shardcomp. The command was: {shlex.join(['shardcomp', *words])}", file=sys.stderr)
        return FAULT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardcomp", description="Compile HuggingFace models for clusters.", epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    inspect = _command(
        commands, "inspect", "what one rank runs, holds and sends; needs no GPU, no weights and no other rank", _inspect
    )
    _add_plan(inspect)
    inspect.add_argument("--seq", type=_count, default=2048, metavar="N", help="tokens in a sequence (default 2048)")
    inspect.add_argument(
        "--global-batch", type=_count, metavar="N", help="samples of one optimizer step (default: data × micro-batch)"
    )
    inspect.add_argument("--rank", type=int, default=0, metavar="R", help="the rank to report on (default 0)")
    inspect.add_argument("--listing", action="store_true", help="print the transformed model as Python instead of the report")
    inspect.add_argument("--after", metavar="PASS", help="with --listing: as it was after this pass, such as tensor_parallel")
    inspect.add_argument("--diff", metavar="PASS", help="print what this pass changed instead of the report")

    verify = _command(
        commands, "verify", "run a small model of the same structure against the dense model, gradients included", _verify
    )
    _add_plan(verify)
    verify.add_argument(
        "--shrink",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a size of the small model, such as num_hidden_layers=2; repeatable. 'none': run the model as it is",
    )
    verify.add_argument(
        "--mutate", action="store_true", help="plant every possible fault in turn, and demand that each is noticed"
    )

    verify.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where: cuda runs a plan of one rank on the GPU (default cpu)"
    )

    check = _command(
        commands,
        "resume-check",
        "train a small model, kill it, let it go on, and demand the same bits; and on another plan",
        _resume,
    )
    _add_plan(check)
    check.add_argument("--shrink", action="append", default=[], metavar="KEY=VALUE", help="as for verify")
    check.add_argument("--steps", type=_count, default=8, metavar="N", help="optimizer steps of a run (default 8)")
    check.add_argument("--onto", metavar="FLAGS", help="a plan that goes on as well, such as '--tensor 1 --data 2 --zero 3'")

    convert = _command(commands, "convert", "write a checkpoint of a run as a HuggingFace directory", _convert)
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's directory for its newest")
    convert.add_argument("directory", metavar="HF_DIR", help="what to write")
    convert.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32", "fp64"), help="of the weights (default: as they were trained)"
    )
    convert.add_argument(
        "--max-shard-size", type=_count, default=5 * 10**9, metavar="BYTES", help="of a file (default %(default)s)"
    )

    _command(commands, "env", "versions, devices, and what runs each operator here", _env)
    return parser


def _command(commands: Any, name: str, meaning: str, run: Any) -> argparse.ArgumentParser:
    found: argparse.ArgumentParser = commands.add_parser(
        name, help=meaning, description=meaning[0].upper() + meaning[1:] + ".", epilog=_EPILOG, allow_abbrev=False
    )
    found.add_argument("--json", action="store_true", help="print one JSON object")
    found.set_defaults(run=run, parser=found)
    return found


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """What every command that lowers a model needs to know."""
    parser.add_argument("model", metavar="MODEL", help="a preset such as tiny, a directory, a config.json, or a hub name")
    parser.add_argument("--world", type=_count, metavar="N", help="number of ranks (default: tensor × data, with data 1)")
    parser.add_argument("--policy", metavar="NAME", help=_POLICY)
    add_option_flags(parser)


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return number


_POLICY = "a shipped policy, a file, or auto, which the model itself says (default: the one for the model's type, else auto)"


def _policy(args: argparse.Namespace) -> Policy:
    from shardcomp import presets
    from shardcomp.policy import Policy

    options = options_from(args)
    if args.policy is not None:
        return Policy.load(args.policy, **options)
    return Policy.for_model(presets.config_of(args.model).model_type, **options)


def _inspect(args: argparse.Namespace) -> tuple[int, str]:
    if args.after is not None and not args.listing:
        args.parser.error("--after says which listing: give it with --listing")
    if args.diff is not None and args.listing:
        args.parser.error("--listing and --diff each print something else: give one of them")
    policy = _policy(args)
    world = policy.mesh(args.world or policy.options.ranks).world_size
    if not 0 <= args.rank < world:
        raise PlanError(f"rank {args.rank}: the world has the ranks 0 to {world - 1}")
    from shardcomp.inspect.report import render
    from shardcomp.lowering import lower

    lowered = lower(
        args.model,
        policy,
        world_size=world,
        seq=args.seq,
        micro_batch=policy.options.micro_batch or 1,
        global_batch=args.global_batch,
    )
    texts = {}
    if args.listing:
        texts["listing"] = lowered.listing(after=args.after, rank=args.rank)
    if args.diff is not None:
        texts["diff"] = lowered.diff(args.diff)
    if args.json:
        return GOOD, _json({**lowered.report(rank=args.rank), **texts})
    if texts:
        [text] = texts.values()
        return GOOD, text
    return GOOD, render(lowered.report(rank=args.rank))


def _verify(args: argparse.Namespace) -> tuple[int, str]:
    shrink = _shrink(args)
    policy = _policy(args)
    from shardcomp.verification.verifier import verify

    found = verify(
        args.model,
        policy,
        world_size=args.world,
        shrink=shrink,
        mutate=args.mutate,
        device=args.device,
        progress=lambda text: print(f"shardcomp: {text}", file=sys.stderr, flush=True),
    )
    status = GOOD if found.ok else NO
    if args.json:
        keys = ["ok", "precision", "deviation", "worst", "reproduce", "batches"]
        keys += ["mutants"] * args.mutate + ["dropout"] * bool(found.dropout)
        return status, _json({key: getattr(found, key) for key in keys})
    return status, _verdict(found)


def _resume(args: argparse.Namespace) -> tuple[int, str]:
    shrink, policy, onto, world = _shrink(args), _policy(args), None, None
    if args.onto is not None:
        other = argparse.ArgumentParser(prog="--onto", allow_abbrev=False)
        other.add_argument("--world", type=_count)
        other.add_argument("--policy", default=args.policy)
        add_option_flags(other)
        asked = other.parse_args(joined(shlex.split(args.onto)))
        onto, world = _policy(argparse.Namespace(**{**vars(asked), "model": args.model})), asked.world
        if asked.precision is None:
            onto = onto.replace(precision=policy.options.precision)
    from shardcomp.verification.resumption import resume_check

    found = resume_check(
        args.model,
        policy,
        args.world,
        onto=onto,
        onto_world=world,
        steps=args.steps,
        shrink=shrink,
        progress=lambda text: print(f"shardcomp: {text}", file=sys.stderr, flush=True),
    )
    status = GOOD if found.ok else NO
    if args.json:
        return status, _json(found.as_dict())
    moment = "within a save" if found.within_save else "between saves"
    lines = [
        f"killed after step {found.killed_after} of {found.steps}, {moment}; went on from step {found.resumed_from}",
        f"losses, norms and batches: {'the same bits' if found.losses_equal else 'NOT the same'} as undisturbed",
        f"weights, optimizer, generators at the end: {'the same bits' if found.files_equal else 'NOT the same'}",
    ]
    if found.onto:
        agrees = "agrees" if found.onto["ok"] else "does NOT agree"
        parts = ["losses", *(["weights"] if "weights" in found.onto else [])]
        numbers = ", ".join(f"{part} {found.onto[part]:.2e}" for part in parts)
        same = "the same batches" if found.onto["batches_equal"] else "OTHER batches"
        lines.append(f"onto {args.onto}, from step {found.onto['from_step']}: {agrees}: {same},")
        lines.append(f"  {numbers}; tolerance {found.onto['tolerance']:.0e}")
    lines.append(f"reproduce with: {found.reproduce}")
    return status, "\n".join(lines) + "\n"


def _convert(args: argparse.Namespace) -> tuple[int, str]:
    from shardcomp.checkpoint.convert import convert
    from shardcomp.ir.precision import COMPUTE

    dtype = COMPUTE[args.dtype] if args.dtype else None
    found = convert(args.checkpoint, args.directory, dtype, args.max_shard_size)
    if args.json:
        return GOOD, _json({"checkpoint": str(found), "directory": args.directory})
    return GOOD, f"{found} -> {args.directory}\n"


def _shrink(args: argparse.Namespace) -> dict[str, Any]:
    """`--shrink` as a mapping: numbers and switches as such, the rest as text."""
    if "none" in args.shrink:
        if len(args.shrink) > 1:
            args.parser.error("--shrink none keeps the model as it is: give it alone")
        return {"none": True}
    found: dict[str, Any] = {}
    for word in args.shrink:
        key, equals, text = word.partition("=")
        if not key or not equals:
            args.parser.error(f"--shrink {word}: write KEY=VALUE, such as num_hidden_layers=2, or none")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def _verdict(found: Any) -> str:
    answer = "agrees with" if found.ok else "does NOT agree with"
    lines = [f"in {found.precision}, the plan {answer} the dense model"]
    lines.append(f"largest deviations, {', '.join(found.batches)} batches:")
    lines += [f"  {quantity:<10} {value:.2e}" for quantity, value in found.deviation.items()]
    if found.worst:
        worst = found.worst
        where = f" of {worst['parameter']}" if worst["parameter"] else ""
        lines.append(f"nearest to its tolerance: {worst['quantity']}{where}, {worst['value']:.2e} of {worst['tolerance']:.2e}")
    if found.dropout:
        off = ", ".join(f"{key} = {p}" for key, p in found.dropout.items())
        lines.append(f"without dropout, which no two runs share: {off} set to 0")
    if found.mutants:
        lines.append(f"planted faults noticed: {found.mutants['killed']} of {found.mutants['total']}")
        lines += [f"  not noticed: {survivor}" for survivor in found.mutants["survivors"]]
    lines.append(f"reproduce with: {found.reproduce}")
    return "\n".join(lines) + "\n"


def _env(args: argparse.Namespace) -> tuple[int, str]:
    from shardcomp.inspect.environment import environment

    found = environment()
    if args.json:
        return GOOD, _json(found)
    lines = [f"{name:<20} {version}" for name, version in found["versions"].items()]
    held = found["library"]
    path = f" {held['path']}" if held["path"] else ""
    lines.append(f"{'library':<20} {held['kind']}{path} ({held['why']})")
    lines += [f"{device['device']:<20} {device['name']}" for device in found["devices"]]
    for kernel in found["kernels"]:
        state = "" if kernel["ok"] else "cannot run "
        lines.append(f"{kernel['name']:<20} {kernel['device']}: {state}{kernel['runs']} ({kernel['why']})")
    return GOOD, "\n".join(lines) + "\n"


def _json(found: dict[str, Any]) -> str:
    return json.dumps(_plain(found), indent=1, allow_nan=False) + "\n"


def _plain(found: Any) -> Any:
    """Numbers that JSON cannot write become the words inf and nan."""
    if isinstance(found, dict):
        return {str(key): _plain(held) for key, held in found.items()}
    if isinstance(found, (list, tuple)):
        return [_plain(held) for held in found]
    return str(found) if isinstance(found, float) and not math.isfinite(found) else found


if __name__ == "__main__":
    sys.exit(main())
