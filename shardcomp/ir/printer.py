"""A Program as Python that people read and that runs: one line per value, alike units written once.

The annotation of a line is the local shape, written as global size / axis; Python never evaluates annotations inside a
function. What is executed holds plain integers and the names b and s, which each unit takes from its own inputs.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from shardcomp.errors import InternalError
from shardcomp.ir.collectives import EXCHANGES
from shardcomp.ir.layout import Size, divides
from shardcomp.ir.nodes import path_of, recompute_mark, role_of, source_of, tensor_arguments
from shardcomp.ir.operators import OPERATORS, facts_of, is_aten, is_item, operator_of
from shardcomp.ir.program import INPUT, PRELUDE, Body, Program, Unit, Value, stage_program

aten = torch.ops.aten
INDENT = "        "
_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}
_INFIX = {target.Tensor: row.prints for target, row in OPERATORS.items() if row.prints in set("+-*/")}
_FUNCTIONAL = {target: target.__name__ for target, row in OPERATORS.items() if row.prints == "function"}
_SUFFIXES = {"all_gather": "gathered", "reduce_scatter": "scattered", "all_reduce": "summed", "all_to_all": "moved"}
# Names that the listing uses itself, and so no value may have.
RESERVED = frozenset({"self", "w", "b", "s", "torch", "aten", "unit", *keyword.kwlist, *_FUNCTIONAL.values()})


def source(program: Program) -> str:
    """The Program as one Python file that imports only `shardcomp.runtime`."""
    used: set[str] = set()
    # Classes first: writing them fills `used`, the names to import.
    classes = [_unit_class(body, program, used) for body in program.bodies()]
    top = _top_class(program, used)
    imports = _imports(used | {"Stage", "Unit", "local"})
    stage = f", stage {program.stage.index} of 0 … {program.stage.count - 1}" if program.stage else ""
    header = f'"""{program.name} {program.signature}{stage}, for {_mesh_text(program)}. Written by shardcomp."""'
    return "\n".join([header, "", *imports, "", "", "\n\n\n".join([*classes, top])]) + "\n"


def sources(program: Program) -> list[str]:
    """The Python of each stage, a file each."""
    if program.stages == 1:
        return [source(program)]
    return [source(stage_program(program, stage)) for stage in range(program.stages)]


def unit_source(body: Body, program: Program) -> str:
    """The class of one body as a Python file of its own."""
    used: set[str] = set()
    text = _unit_class(body, program, used)
    return "\n".join([*_imports(used | {"Unit", "local"}), "", "", text]) + "\n"


def _imports(used: set[str]) -> list[str]:
    lines = ["import torch"]
    functional = sorted(used & set(_FUNCTIONAL.values()) - {"linear"})  # the runtime has one of its own
    if functional:
        lines.append(f"from torch.nn.functional import {', '.join(functional)}")
    runtime = sorted(used - set(functional) - {"aten"}, key=lambda n: (n.lower(), n))
    lines += ["", *_import_lines("shardcomp.runtime", runtime)]
    return [*lines, "", "aten = torch.ops.aten"] if "aten" in used else lines


def _import_lines(module: str, names: list[str]) -> list[str]:
    line = f"from {module} import {', '.join(names)}"
    return [line] if len(line) <= 128 else [f"from {module} import (", *(f"    {name}," for name in names), ")"]


def _mesh_text(program: Program) -> str:
    return " · ".join(f"{axis} {size}" for axis, size in program.mesh.as_dict().items())


def _unit_class(body: Body, program: Program, used: set[str]) -> str:
    users = [unit for unit in program.units if unit.body is body]
    lines = [f"class {body.name}(Unit):  # {unit_paths(users)}"]
    # Alike units share the code, so the names of the first serve for all.
    writer = Writer(body, users[0], program, used)
    lines += ["    def forward(" + ", ".join(["self", *writer.input_names()]) + "):", *writer.lines()]
    return "\n".join(lines)


def unit_paths(units: list[Unit]) -> str:
    """The paths of alike units, from the first to the last: `model.layers.0 … 31, alike`."""
    if len(units) == 1:
        return units[0].path
    first, last = units[0].path, units[-1].path
    tail = next((b for a, b in zip(first.split("."), last.split("."), strict=False) if a != b), last)
    return f"{first} … {tail}, alike"


class Writer:
    """Writes the body of one unit class, line by line."""

    def __init__(self, body: Body, unit: Unit, program: Program, used: set[str]) -> None:
        self.body, self.unit, self.program, self.used = body, unit, program, used
        self.sizes = program.mesh.as_dict()
        self.names: dict[fx.Node, str] = {}
        self.taken: set[str] = {
            *RESERVED,
            # A value with the name of a function that the body calls would hide the function.
            *(n.target.__name__ for n in body.calls() if not is_aten(n)),
            *(mark for call in body.calls() if (mark := recompute_mark(call))),
        }
        for node, name in zip(body.placeholders(INPUT), unit.inputs, strict=True):
            # The input of layer 3 is hidden_3 in the program, but the code of all layers calls it `hidden`.
            self.names[node] = self._unique(re.sub(r"_\d+$", "", name))
        for node in body.graph.nodes:
            if node.op == "placeholder" and role_of(node) != INPUT:
                # A module in a list has a number for a name: `w.experts.3.weight` is no Python, `w.experts[3].weight` is.
                self.names[node] = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"w.{node.meta['path']}")

    def input_names(self) -> list[str]:
        return [self.names[node] for node in self.body.placeholders(INPUT)]

    def lines(self) -> Iterator[str]:
        if any(node.op == "placeholder" and role_of(node) != INPUT for node in self.body.graph.nodes):
            yield f"{INDENT}w = local(self)"
        # Written before the size lines above them: only then is it known whether b and s are needed.
        statements = [(node, *self._statement(node)) for node in self.body.calls()]
        yield from self._size_lines([symbols for *_, symbols in statements])
        for node in self.body.placeholders(INPUT):
            yield from self._fan_out(node)
        place = ""
        for node, text, _ in statements:
            now = source_of(node) or place
            # A note only where the source line changes, since several calls often come from one line.
            yield text if now == place else f"{text}  # {now}"
            place = now
            yield from self._fan_out(node)
        results = ", ".join(self.names[node] for node in self.body.results)
        yield f"{INDENT}return {results}"

    def _fan_out(self, node: fx.Node) -> Iterator[str]:
        """What several matrices are multiplied with is said to be so, for the sake of its gradient."""
        # For q, k and v the runtime adds three gradients into one tensor (see `runtime.linear.fan_out`).
        readers = [u for u in node.users if operator_of(u) is aten.linear and u.args[0] is node]
        if len(readers) > 1 and node.meta["value"].requires_grad:
            yield f"{INDENT}{self.names[node]} = self.fan_out({self.names[node]})"

    def _size_lines(self, used: list[set[sympy.Symbol]]) -> Iterator[str]:
        """b and s, where an executed expression needs them, from the first input that has such a dimension."""
        for symbol in sorted(set().union(*used), key=str):
            yield f"{INDENT}{symbol} = {self._size_from_inputs(symbol)}"

    def _size_from_inputs(self, symbol: sympy.Symbol) -> str:
        for node in self.body.placeholders(INPUT):
            tensor = node.meta["value"]
            for dim, size in enumerate(tensor.shape):
                if size == symbol:
                    # b and s are global sizes, but an input is local: its size counts once for each rank that it is split over.
                    times = "".join(f" * {self.sizes[axis]}" for axis in tensor.layout.split_axes(dim) if self.sizes[axis] > 1)
                    return f"{self.names[node]}.size({dim}){times}"
        raise InternalError(f"listing: {self.unit.path} uses {symbol}, which none of its inputs has as a dimension")

    def _statement(self, node: fx.Node) -> tuple[str, set[sympy.Symbol]]:
        symbols: set[sympy.Symbol] = set()
        expression = self._expression(node, symbols)
        if mark := recompute_mark(node):
            # Only products, attention and reductions have marks, and these print as function(arguments).
            function, _, arguments = expression.partition("(")
            expression = f"{mark}({function}, {arguments}"
            self.used.add(mark)
        self.names[node] = name = self._unique(self._base_name(node))
        known = node.meta["value"]
        note = f": {annotation(known, self.sizes)}" if isinstance(known, Value) else ""
        return f"{INDENT}{name}{note} = {expression}", symbols

    def _base_name(self, node: fx.Node) -> str:
        path = path_of(node)
        if node.target in EXCHANGES:
            exchange = EXCHANGES[node.target]
            base = self.names[node.args[0]].rpartition(".")[2]  # type: ignore[index]
            # Without a message in the forward, a call with a dimension keeps a shard, and one without only shares a gradient.
            return f"{base}_{_SUFFIXES[exchange.forward] if exchange.forward else 'cut' if node.args[1:-1] else 'shared'}"
        if _leaves(node) and (path != self.unit.path or self.unit.kind == PRELUDE):
            # A module's one result has the module's name. Several have the names of their operators, such as cos and sin.
            several = sum(path_of(other) == path and _leaves(other) for other in self.body.calls()) > 1
            return made_by(node) if several else re.sub(r"\W", "_", path.rpartition(".")[2])
        packet = operator_of(node)
        return f"{packet.__name__.lstrip('_')}_1"

    def _unique(self, base: str) -> str:
        stem = re.sub(r"_\d+$", "", base)
        name, count = base, 1
        # A module in a list is named by its number.
        if name[0].isdigit():
            name = stem = f"_{base}"
        while name in self.taken:
            count += 1
            name = f"{stem}_{count}"
        self.taken.add(name)
        return name

    def _expression(self, node: fx.Node, symbols: set[sympy.Symbol]) -> str:
        target, args = node.target, node.args
        packet, prints = operator_of(node), facts_of(node).prints

        def text(argument: Any) -> str:
            return self._text(argument, symbols)

        # x + alpha · y has a keyword argument, and no sign says that.
        if target in _INFIX and not node.kwargs and len(args) == 2:
            return f"{text(args[0])} {_INFIX[target]} {text(args[1])}"
        if prints == "minus":
            return f"-{text(args[0])}"
        # The graph has global sizes, but the code runs on local tensors.
        if prints == "sizes":
            sizes = ", ".join(local_sizes(node.meta["value"], self.sizes, symbols))
            return f"{text(args[0])}.{packet.__name__}({sizes})"
        if is_item(node):
            return f"{text(args[0])}[{text(args[1])}]"
        if not is_aten(node):
            self.used.add(target.__name__)  # type: ignore[union-attr]
            return f"{target.__name__}({', '.join(self._named_arguments(node, text))})"  # type: ignore[union-attr]
        arguments = [text(a) for a in args] + [f"{key}={text(a)}" for key, a in node.kwargs.items()]
        if packet in _FUNCTIONAL:
            self.used.add(_FUNCTIONAL[packet])
            return f"{_FUNCTIONAL[packet]}({', '.join(arguments)})"
        if prints == "method" and args and isinstance(args[0], fx.Node):
            return f"{arguments[0]}.{packet.__name__}({', '.join(arguments[1:])})"
        # A tensor made of sizes alone has no operand to take its device from.
        if not tensor_arguments(node) and any(a.name == "device" for a in target._schema.arguments):  # type: ignore[union-attr]
            arguments.append("device=self.device")
        self.used.add("aten")
        return f"aten.{packet.__name__}({', '.join(arguments)})"

    def _named_arguments(self, node: fx.Node, text: Any) -> list[str]:
        """Arguments of our own operators: tensors by position, the rest by name, an axis as the unit's own."""
        # The signature tells which argument is the axis or the random stream: in the graph both are strings.
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
        arguments: list[str] = []
        for name, argument in [*zip(names, node.args, strict=False), *node.kwargs.items()]:
            if name == "axis":
                arguments.append(f"axis=self.{argument}")
            elif name == "random":
                arguments.append(f"random=self.random.{argument}")
            elif name in node.kwargs or not isinstance(argument, fx.Node):
                arguments.append(f"{name}={text(argument)}")
            else:
                arguments.append(text(argument))
        return arguments

    def _text(self, argument: Any, symbols: set[sympy.Symbol]) -> str:
        if isinstance(argument, fx.Node):
            return self.names[argument]
        if isinstance(argument, sympy.Expr):
            return _size(argument, symbols)
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(self._text(a, symbols) for a in argument)}]"
        if isinstance(argument, float) and argument in (float("inf"), float("-inf")):
            # repr gives `inf`, which is no name in Python.
            return f'float("{argument}")'
        return repr(argument)


def _leaves(node: fx.Node) -> bool:
    """Whether a result of a module is used only outside of it."""
    path = path_of(node)
    return bool(path) and all(not (path_of(user) + ".").startswith(path + ".") for user in node.users)


def made_by(node: fx.Node) -> str:
    """The operator that makes one of several results of a module, such as cos: a cast or a scaling says nothing."""
    origin: Any = node
    while isinstance(origin, fx.Node) and operator_of(origin) in (aten.to, aten.mul, aten.clone) and origin.args:
        # cos · scaling is still called cos, but a product of two tensors is a product.
        if operator_of(origin) is aten.mul and isinstance(origin.args[1], fx.Node):
            break
        origin = origin.args[0]
    named = origin if isinstance(origin, fx.Node) and origin.op == "call_function" else node
    return str(operator_of(named).__name__).lstrip("_")


def local_sizes(tensor: Value, sizes: dict[str, int], symbols: set[sympy.Symbol]) -> Iterator[str]:
    """What a rank holds of each dimension, as an expression in b and s, which `symbols` then has; -1 where it is uneven."""
    for dim, size in enumerate(tensor.shape):
        parts = 1
        for axis in tensor.layout.split_axes(dim):
            parts *= sizes[axis] // tensor.layout.on(axis).copies
        # Each rank has another size. A reshape works it out from -1.
        if parts > 1 and not divides(size, parts):
            yield "-1"
        else:
            yield _size(sympy.sympify(size) / parts, symbols)


def _size(size: Size, symbols: set[sympy.Symbol]) -> str:
    expr = sympy.sympify(size)
    symbols |= expr.free_symbols
    # With `//`, because `/` makes a float and no size.
    numerator, denominator = sympy.fraction(sympy.together(expr))
    return (
        str(numerator)
        if denominator == 1
        else f"({numerator}) // {denominator}"
        if numerator.args
        else f"{numerator} // {denominator}"
    )


def annotation(tensor: Value, sizes: dict[str, int]) -> str:
    """`bf16[b, s/tp, 4096]`, with `@ partial("tp")` for a result that is still to be summed."""
    dims = []
    for dim, size in enumerate(tensor.shape):
        axes = [axis for axis in tensor.layout.split_axes(dim) if sizes[axis] > 1]
        # Ranks along tp_rep have the same shard, so the split is over tp_kv alone.
        split_over = [axis if tensor.layout.on(axis).copies == 1 else f"{axis}_kv" for axis in axes]
        text = str(size)
        # (s + 1)/tp needs its parentheses.
        dims.append("/".join([f"({text})" if split_over and re.search(r"[ +-]", text) else text, *split_over]))
    base = (
        f"{_DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix('torch.'))}[{', '.join(dims)}]"
        if dims
        else (f"{_DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix('torch.'))}[()]")
    )
    partial = tensor.layout.partial_axes()
    return f"{base} @ partial({', '.join(repr(axis).replace(chr(39), chr(34)) for axis in partial)})" if partial else base


def _top_class(program: Program, used: set[str]) -> str:
    """The stage: its units, and a forward that calls them in order."""
    lines = ["class Model(Stage):", "    unit_classes = ("]
    # A comment tells the stages apart where one listing shows all of them.
    several = program.stage is None and program.stages > 1
    stage = None
    for run in _runs(program.units):
        if several and run[0].plan.stage != stage:
            stage = run[0].plan.stage
            lines.append(f"        # stage {stage}")
        first, body = run[0].path, run[0].body.name
        numbered = _numbered(run)
        if len(run) > 1 and numbered:
            head, start, stop, tail = numbered
            lines.append(f'        *((f"{head}{{i}}{tail}", {body}) for i in range({start}, {stop})),')
        else:
            lines += (
                [f'        ("{unit.path}", {unit.body.name}),' for unit in run]
                if len(run) > 1
                else [f'        ("{first}", {body}),']
            )
    received = program.stage.received if program.stage else ()
    inputs = [_final(name) if name in received else name for name in program.inputs]
    lines += ["    )", "", "    def forward(" + ", ".join(["self", *inputs]) + "):"]
    lines += [INDENT + line for line in _calls(program)]
    if program.stage:
        lines += _boundary_lines("received", program.stage.received, program)
        lines += _boundary_lines("sent", program.stage.sent, program)
    if program.tokens is not None:
        writer = Writer(program.tokens.body, program.tokens, program, used)
        lines += ["", "    def tokens(" + ", ".join(["self", *writer.input_names()]) + "):", *writer.lines()]
    return "\n".join(lines)


def _boundary_lines(name: str, crossing: tuple[str, ...], program: Program) -> Iterator[str]:
    """A method with the shape, the dtype and the requires_grad of each value that crosses a stage boundary."""
    sizes = program.mesh.as_dict()
    yield from ("", f"    def {name}(self, b, s):")
    if not crossing:
        yield f"{INDENT}return []"
        return
    yield f"{INDENT}return ["
    for value_name in crossing:
        tensor = program.values[value_name]
        shape = list(local_sizes(tensor, sizes, set()))
        if "-1" in shape:
            raise InternalError(f"listing: {value_name} is split unevenly where one stage sends it to the next")
        text = f"({', '.join(shape)}{',' if len(shape) == 1 else ''})"
        yield f"{INDENT}    ({text}, {tensor.dtype}, {tensor.requires_grad}),  # {value_name}"
    yield f"{INDENT}]"


def _runs(units: list[Unit]) -> list[list[Unit]]:
    """Consecutive units of one stage that share a body."""
    runs: list[list[Unit]] = []
    for unit in units:
        if runs and runs[-1][0].body is unit.body and runs[-1][0].plan.stage == unit.plan.stage:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return runs


def _numbered(run: list[Unit]) -> tuple[str, int, int, str] | None:
    """(head, start, stop, tail) where the paths of a run are head + number + tail, counting up."""
    match = re.fullmatch(r"(.*?)(\d+)(\D*)", run[0].path)
    if match is None:
        return None
    head, start, tail = match[1], int(match[2]), match[3]
    expected = [f"{head}{start + i}{tail}" for i in range(len(run))]
    return (head, start, start + len(run), tail) if [unit.path for unit in run] == expected else None


def _calls(program: Program) -> Iterator[str]:
    """The stage's forward: one call per unit, chains of alike units as a loop. Results keep the name that a loop carries."""
    renamed: dict[str, str] = {}

    def names(values: tuple[str, ...]) -> list[str]:
        return [_final(renamed.get(value, value)) for value in values]

    index = 0
    for run in _runs(program.units):
        # A loop over two units would be no shorter than two calls.
        if len(run) > 2 and _chained(run, program):
            inputs = names(run[0].inputs)
            carried = [inputs[position] for position in _carried(run)]
            yield f"for unit in self.units[{index}:{index + len(run)}]:"
            yield f"    {', '.join(carried)} = unit({', '.join(inputs)})"
            # After the loop, its variables hold what the last unit gives.
            renamed.update(zip(run[-1].outputs, carried, strict=True))
        else:
            for offset, unit in enumerate(run):
                call = f"self.units[{index + offset}]({', '.join(names(unit.inputs))})"
                yield f"{', '.join(names(unit.outputs))} = {call}"
        index += len(run)
    if program.stage and not program.stage.is_last:
        sent = names(program.stage.sent)
        yield f"return ({', '.join(sent)}{',' if len(sent) == 1 else ''})"
        return
    pairs = ", ".join(f'"{key}": {names((name,))[0]}' for key, name in program.outputs.items())
    yield f"return {{{pairs}}}"


def _carried(run: list[Unit]) -> list[int]:
    """For each result of a unit in a chained run, the position of the next unit's input that it becomes."""
    return [run[1].inputs.index(name) for name in run[0].outputs]


def _chained(run: list[Unit], program: Program) -> bool:
    """Whether each unit of a run differs from the one before only in reading that one's results, which nothing else reads."""
    if any(name not in run[1].inputs for name in run[0].outputs):
        return False
    positions = _carried(run)
    # A loop keeps one value at a time, so what it overwrites must have no other reader.
    readers: dict[str, int] = {}
    for unit in program.units:
        for name in unit.inputs:
            readers[name] = readers.get(name, 0) + 1
    for before, after in zip(run, run[1:], strict=False):
        expected = list(before.inputs)
        for result, position in zip(before.outputs, positions, strict=True):
            expected[position] = result
            if readers.get(result, 0) != 1 or result in program.outputs.values():
                return False
        if list(after.inputs) != expected:
            return False
    first_inputs = [run[0].inputs[p] for p in positions]
    return all(readers.get(name, 0) == 1 and name not in program.outputs.values() for name in first_inputs)


def _final(name: str) -> str:
    return f"{name}_" if name in RESERVED else name
