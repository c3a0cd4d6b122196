"""The command line: `shardcomp inspect`, `verify`, `resume-check`, `convert`, `env`, `completion`.

torch and transformers take seconds to import. So a command imports what it needs, and this module nothing of that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardcomp import __version__
from shardcomp.errors import InternalError, PlanError, ShardError, Violations
from shardcomp.policy.options import add_option_flags, joined, option_violations, options_from
from shardcomp.policy.patterns import nearest

if TYPE_CHECKING:
    from shardcomp.policy import Policy
    from shardcomp.verification.verifier import Verification

GOOD, NO, BAD_INPUT, FAULT = 0, 1, 2, 3
_EPILOG = "exit status: 0 good, 1 the answer is no, 2 bad input, 3 a fault of shardcomp"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Raises SystemExit(2) if the command line itself is wrong.

    Args:
        argv: the words after the name of the program; by default this process's arguments.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--complete"]:  # the shell asks, see SCRIPTS
        sys.stdout.writelines(f"{word}\n" for word in complete(words[1:]))
        return GOOD
    args, unknown = _parser().parse_known_args(joined(words))
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{_did_you_mean(args.parser, unknown)}")
    try:
        # Only the answer goes to stdout. What libraries print goes to stderr.
        with contextlib.redirect_stdout(sys.stderr):
            status, answer = args.run(args)
        sys.stdout.write(answer)
        sys.stdout.flush()
        return int(status)
    except BrokenPipeError:  # the reader, such as `head`, has read enough
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
        commands, "inspect", "show what one rank runs, stores and sends; needs no GPU, no weights and no other rank", _inspect
    )
    _add_plan(inspect)
    inspect.add_argument(
        "--seq", type=_count, metavar="N", help="tokens in a sequence (default: 2048, or what the plan splits)"
    )
    inspect.add_argument(
        "--global-batch", type=_count, metavar="N", help="samples of one optimizer step (default: data × micro-batch)"
    )
    inspect.add_argument("--rank", type=int, default=0, metavar="R", help="the rank to report on (default 0)")
    inspect.add_argument("--listing", action="store_true", help="print the transformed model as Python instead of the report")
    inspect.add_argument("--after", metavar="PASS", help="with --listing: as it was after this pass, such as tensor_parallel")
    inspect.add_argument("--diff", metavar="PASS", help="print what this pass changed instead of the report")

    verify = _command(
        commands, "verify", "compare a small model of the same structure with the dense model, gradients included", _verify
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
        "--mutate",
        action="store_true",
        help="also run every mutant, a program with one error, and demand that each is noticed",
    )
    verify.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda runs a plan of one rank on the GPU (default cpu)",
    )

    check = _command(
        commands,
        "resume-check",
        "train a small model, kill the run, resume it, and demand the same bits; also on another plan",
        _resume,
    )
    _add_plan(check)
    check.add_argument("--shrink", action="append", default=[], metavar="KEY=VALUE", help="as for verify")
    check.add_argument("--steps", type=_count, default=8, metavar="N", help="optimizer steps of a run (default 8)")
    check.add_argument("--onto", metavar="FLAGS", help="another plan that resumes too, such as '--tensor 1 --data 2 --zero 3'")

    convert = _command(commands, "convert", "write the weights of a checkpoint as a HuggingFace directory", _convert)
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's directory for its newest one")
    convert.add_argument("directory", metavar="HF_DIR", help="the directory to write")
    convert.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32", "fp64"), help="dtype of the weights (default: as they were trained)"
    )
    convert.add_argument(
        "--max-shard-size", type=_count, default=5 * 10**9, metavar="BYTES", help="largest size of a file (default %(default)s)"
    )

    _command(commands, "env", "show versions, devices, and what runs each operator here", _env)

    completion = _command(commands, "completion", "print a script that completes these commands in a shell", _completion)
    completion.add_argument("shell", choices=sorted(SCRIPTS), help=_LOAD_SCRIPT)
    return parser


def _did_you_mean(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """The flags that unknown ones are most likely misspellings of."""
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    close = [f"{known} for {flag}" for flag in flags if (known := nearest(flag, _flags(parser)))]
    return f"; did you mean {', '.join(close)}?" if close else ""


def _command(commands: Any, name: str, meaning: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=meaning, description=meaning[0].upper() + meaning[1:] + ".", epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that lowers a model."""
    parser.add_argument("model", metavar="MODEL", help="a preset such as tiny, a directory, a config.json, or a hub name")
    parser.add_argument(
        "--world", type=_count, metavar="N", help="number of ranks (default: what the degrees make, with data 1)"
    )
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


_POLICY = "a shipped policy, a file, or auto: derived from the model (default: the one for the model's type, else auto)"


def _policy(args: argparse.Namespace) -> Policy:
    from shardcomp import presets
    from shardcomp.policy import Policy

    options = options_from(args)
    if args.policy is not None:
        return Policy.load(args.policy, **options)
    return Policy.for_model(presets.config_of(args.model).model_type, **options)


def _inspect(args: argparse.Namespace) -> tuple[int, str]:
    if args.after is not None and not args.listing:
        args.parser.error("--after selects a listing: give it with --listing")
    if args.diff is not None and args.listing:
        args.parser.error("--listing and --diff print different things: give one of them")
    violations = Violations("the command")
    policy = None
    with violations.collected():
        policy = _policy(args)
    if policy is None:  # the legal options may have further violations
        policy = _legal_policy(args)
    world = args.world or (policy.options.ranks if policy else 1)
    with violations.collected():
        _check_rank(args.rank, world)
    for name in (args.after, args.diff):
        with violations.collected():
            _check_pass(name)
    lowered = None
    if policy is not None:
        from shardcomp.lowering import lower

        with violations.collected():
            lowered = lower(
                args.model,
                policy,
                world_size=world,
                seq=args.seq,
                micro_batch=policy.options.micro_batch or 1,
                global_batch=args.global_batch,
            )
    violations.raise_if_any()
    assert lowered is not None
    from shardcomp.inspect.report import render

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


def _legal_policy(args: argparse.Namespace) -> Policy | None:
    """The policy without the options that are not legal, or with only its degrees, to find further violations with."""
    legal = {name: value for name, value in options_from(args).items() if not option_violations({name: value})}
    degrees = {name: value for name, value in legal.items() if name in ("tensor", "data", "pipeline")}
    for options in (legal, degrees):
        with contextlib.suppress(ShardError):
            return _policy(argparse.Namespace(model=args.model, policy=args.policy, **options))
    return None


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise PlanError(f"rank {rank}: the world has the ranks 0 to {world - 1}")


def _check_pass(name: str | None) -> None:
    if name is None or name in pass_names():
        return
    from shardcomp.pass_runner import FORMER_NAMES

    if name not in FORMER_NAMES:
        close = nearest(name, pass_names())
        hint = f"did you mean {close!r}? There are" if close else "there are"
        raise PlanError(f"no pass is named {name!r}: {hint} {', '.join(pass_names())}")


def pass_names() -> list[str]:
    """The names of the capture and of all passes. They are file names, since to import the passes takes seconds."""
    folder = Path(str(resources.files("shardcomp.passes")))
    return ["capture", *sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")]


def _verify(args: argparse.Namespace) -> tuple[int, str]:
    shrink = _shrink(args)
    policy = _policy(args)
    from shardcomp.verification.verifier import verify

    answer = verify(
        args.model,
        policy,
        world_size=args.world,
        shrink=shrink,
        mutate=args.mutate,
        device=args.device,
        progress=lambda text: print(f"shardcomp: {text}", file=sys.stderr, flush=True),
    )
    status = GOOD if answer.ok else NO
    if args.json:
        keys = ["ok", "precision", "deviation", "worst", "reproduce", "batches"]
        keys += ["mutants"] * args.mutate + ["dropout"] * bool(answer.dropout)
        keys += ["disagreements"] * bool(answer.disagreements)
        return status, _json({key: getattr(answer, key) for key in keys})
    return status, _verdict(answer)


def _resume(args: argparse.Namespace) -> tuple[int, str]:
    shrink, policy, onto, onto_world = _shrink(args), _policy(args), None, None
    if args.onto is not None:
        parser = argparse.ArgumentParser(prog="--onto", allow_abbrev=False)
        parser.add_argument("--world", type=_count)
        parser.add_argument("--policy", default=args.policy)
        add_option_flags(parser)
        onto_args = parser.parse_args(joined(shlex.split(args.onto)))
        onto, onto_world = _policy(argparse.Namespace(**{**vars(onto_args), "model": args.model})), onto_args.world
        if onto_args.precision is None:
            onto = onto.replace(precision=policy.options.precision)
    from shardcomp.verification.resumption import resume_check

    answer = resume_check(
        args.model,
        policy,
        args.world,
        onto=onto,
        onto_world=onto_world,
        steps=args.steps,
        shrink=shrink,
        progress=lambda text: print(f"shardcomp: {text}", file=sys.stderr, flush=True),
    )
    status = GOOD if answer.ok else NO
    if args.json:
        return status, _json(answer.as_dict())
    moment = "within a save" if answer.within_save else "between saves"
    lines = [
        f"killed after step {answer.killed_after} of {answer.steps}, {moment}; resumed from step {answer.resumed_from}",
        f"losses, norms and batches: {'the same bits' if answer.losses_equal else 'NOT the same'} as undisturbed",
        f"weights, optimizer, generators at the end: {'the same bits' if answer.files_equal else 'NOT the same'}",
    ]
    if answer.onto:
        agrees = "agrees" if answer.onto["ok"] else "does NOT agree"
        numbers = f"losses {answer.onto['losses']:.2e}"
        if "weights" in answer.onto:
            numbers += f", weights {answer.onto['weights']:.2e}"
        same = "the same batches" if answer.onto["batches_equal"] else "OTHER batches"
        lines.append(f"onto {args.onto}, from step {answer.onto['from_step']}: {agrees}: {same},")
        lines.append(f"  {numbers}; tolerance {answer.onto['tolerance']:.0e}")
    lines.append(f"reproduce with: {answer.reproduce}")
    return status, "\n".join(lines) + "\n"


def _convert(args: argparse.Namespace) -> tuple[int, str]:
    from shardcomp.checkpoint.convert import convert
    from shardcomp.ir.precision import COMPUTE

    dtype = COMPUTE[args.dtype] if args.dtype else None
    checkpoint = convert(args.checkpoint, args.directory, dtype, args.max_shard_size)
    if args.json:
        return GOOD, _json({"checkpoint": str(checkpoint), "directory": args.directory})
    return GOOD, f"{checkpoint} -> {args.directory}\n"


def _shrink(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `--shrink` by key: numbers and switches as such, the rest as text."""
    if "none" in args.shrink:
        if len(args.shrink) > 1:
            args.parser.error("--shrink none keeps the model as it is: give it alone")
        return {"none": True}
    sizes: dict[str, Any] = {}
    for word in args.shrink:
        key, equals, text = word.partition("=")
        if not key or not equals:
            args.parser.error(f"--shrink {word}: write KEY=VALUE, such as num_hidden_layers=2, or none")
        try:
            sizes[key] = json.loads(text)
        except json.JSONDecodeError:
            sizes[key] = text
    return sizes


def _verdict(answer: Verification) -> str:
    """The answer of `verify` as text."""
    agrees = "agrees with" if answer.ok else "does NOT agree with"
    lines = [f"in {answer.precision}, the plan {agrees} the dense model"]
    lines += _disagreements(answer)
    lines.append(f"largest deviations, {', '.join(answer.batches)} batches:")
    lines += [f"  {quantity:<10} {value:.2e}" for quantity, value in answer.deviation.items()]
    if answer.worst:
        worst = answer.worst
        where = f" of {worst['parameter']}" if worst["parameter"] else ""
        if worst["parameter"] in answer.batches:
            where = f" of the {worst['parameter']} batch"
        lines.append(f"nearest to its tolerance: {worst['quantity']}{where}, {worst['value']:.2e} of {worst['tolerance']:.2e}")
    if answer.dropout:
        zeroed = ", ".join(f"{key} = {probability}" for key, probability in answer.dropout.items())
        lines.append(f"without dropout, which no two runs share: {zeroed} set to 0")
    if answer.mutants:
        lines.append(f"mutants noticed: {answer.mutants['killed']} of {answer.mutants['total']}")
        lines += [f"  not noticed: {survivor}" for survivor in answer.mutants["survivors"]]
    lines.append(f"reproduce with: {answer.reproduce}")
    return "\n".join(lines) + "\n"


_SHOWN = 5
"""How many values that ranks disagree about are printed."""


def _disagreements(answer: Verification) -> list[str]:
    """The lines about values that ranks disagree about, if there are any."""
    if not answer.disagreements:
        return []
    count = len(answer.disagreements)
    lines = [f"the ranks disagree with each other about {count} value{'s' * (count > 1)}:"]
    for disagreement in answer.disagreements[:_SHOWN]:
        of = f" of {disagreement['parameter']}" if disagreement["parameter"] else ""
        batch = f", {disagreement['batch']} batch" if disagreement["batch"] else ""
        lines.append(f"  {disagreement['quantity']}{of}{batch}: {disagreement['apart']:.2e} apart")
        for copy in disagreement["copies"]:
            ranks = ", ".join(map(str, copy["ranks"]))
            rank = f"rank{'s' * (len(copy['ranks']) > 1)} {ranks}"
            stage = "" if copy["stage"] is None else f", stage {copy['stage']}"
            lines.append(f"    {rank}{stage}: {copy['deviation']:.2e} from the dense model")
    if count > _SHOWN:
        lines.append(f"  and {count - _SHOWN} more, which --json lists")
    return lines


def _env(args: argparse.Namespace) -> tuple[int, str]:
    from shardcomp.inspect.environment import environment

    here = environment()
    if args.json:
        return GOOD, _json(here)
    lines = [f"{name:<20} {version}" for name, version in here["versions"].items()]
    library = here["library"]
    path = f" {library['path']}" if library["path"] else ""
    lines.append(f"{'library':<20} {library['kind']}{path} ({library['why']})")
    lines += [f"{device['device']:<20} {device['name']}" for device in here["devices"]]
    for kernel in here["kernels"]:
        state = "" if kernel["ok"] else "cannot run "
        lines.append(f"{kernel['name']:<20} {kernel['device']}: {state}{kernel['runs']} ({kernel['why']})")
    return GOOD, "\n".join(lines) + "\n"


def _completion(args: argparse.Namespace) -> tuple[int, str]:
    script = SCRIPTS[args.shell]
    return GOOD, _json({"script": script}) if args.json else script


_LOAD_SCRIPT = (
    "the shell. In bash or zsh, load it with: source <(shardcomp completion bash). In fish: shardcomp completion fish | source"
)
SCRIPTS = {
    "bash": """_shardcomp() {
    local IFS=$'\\n'
    COMPREPLY=($(shardcomp --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${#COMPREPLY[@]} -gt 0 ]] || COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -F _shardcomp shardcomp
""",
    # The last lines are for both ways to load it: sourced, or as a file _shardcomp in fpath, which is then the function's body.
    "zsh": """#compdef shardcomp
_shardcomp() {
    local -a candidates
    candidates=("${(@f)$(shardcomp --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$candidates" ]]; then compadd -- "${candidates[@]}"; else _files; fi
}
if [[ "$funcstack[1]" == _shardcomp ]]; then
    _shardcomp "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
    compdef _shardcomp shardcomp
fi
""",
    "fish": """function __shardcomp
    set -l words (commandline -opc) (commandline -ct)
    set -l candidates (shardcomp --complete $words[2..] 2>/dev/null)
    if set -q candidates[1]
        printf '%s\\n' $candidates
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c shardcomp -f -a '(__shardcomp)'
""",
}
"""Shell -> the script that completes a command line. It calls `shardcomp --complete WORD...`, which imports nothing heavy. If
that prints nothing, the shell completes names of files."""


def complete(words: Sequence[str]) -> list[str]:
    """The words that the last one may become: commands, flags, values of flags, presets. Empty where it may be a file.

    Args:
        words: the command line without the name of the program. The last one is the word at the cursor, and may be empty.

    Example:
        >>> complete(["inspect", "tiny", "--prec"])
        ['--precision']
    """
    *before, start = words or [""]
    if start == "=":  # bash takes --flag=value for three words
        start = ""
    elif before[-1:] == ["="]:
        before.pop()
    parser = _parser()
    [commands] = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    if not before:
        return _starting(start, [*commands.choices, *_flags(parser)])
    chosen = commands.choices.get(before[0])
    if chosen is None:
        return []
    flag, equals, typed = start.partition("=")
    action = next((a for a in chosen._actions if (flag if equals else before[-1]) in a.option_strings and a.nargs != 0), None)
    if action is not None:
        return [f"{flag}={value}" if equals else value for value in _starting(typed if equals else start, _values(action))]
    if start.startswith("-"):
        return _starting(start, _flags(chosen))
    positional = next((a for a in chosen._actions if not a.option_strings), None)
    return _starting(start, _values(positional)) if positional else []


def _starting(start: str, words: Sequence[str]) -> list[str]:
    return [word for word in words if word.startswith(start)]


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def _values(action: argparse.Action) -> list[str]:
    """The values of a flag or of a positional argument that can be listed."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    if action.dest == "model":
        from shardcomp import presets

        return presets.names()
    if action.dest == "policy":
        folder = Path(str(resources.files("shardcomp.policies")))
        return ["auto", *sorted(path.stem for path in folder.glob("*.toml"))]
    if action.dest in ("after", "diff"):
        return pass_names()
    listed = re.fullmatch(r"\{(.*)\}", action.metavar) if isinstance(action.metavar, str) else None
    return [word for word in listed[1].split(",") if not word.isupper() and not word.endswith(("NAME", ":N"))] if listed else []


def _json(answer: Mapping[str, Any]) -> str:
    return json.dumps(_plain(answer), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """A value as JSON has it. Numbers that JSON cannot write become the words inf and nan."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
