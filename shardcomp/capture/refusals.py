"""What a model may have that leaves no trace in its graph, and so would be dropped without a word: it is refused."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from shardcomp.errors import CaptureError, raise_all
from shardcomp.ir.nodes import value
from shardcomp.ir.operators import facts_of
from shardcomp.ir.program import Body
from shardcomp.torch_private import storage_id

_REGISTER = "register it in the module that uses it, or patch that module's method with types.MethodType(function, module)"


def refuse_backward_hooks(model: nn.Module) -> None:
    """Raise CaptureError for hooks on the backward of modules: a graph has operators, and no modules whose backward begins."""
    violations = [
        f"{path or type(model).__name__} has a full backward {'pre-' * pre}hook"
        for path, module in model.named_modules()
        for pre, hooks in ((False, module._backward_hooks), (True, module._backward_pre_hooks))
        if hooks
    ]
    for name, hooks in (("", torch_module._global_backward_hooks), ("pre-", torch_module._global_backward_pre_hooks)):
        violations += [f"a full backward {name}hook is registered for all modules"] if hooks else []
    advice = (
        "a sharded model would not call it. Remove it, and use a hook on a parameter (Tensor.register_hook), or a loss of your "
        "own that is computed from the model's outputs"
    )
    raise_all(CaptureError, type(model).__name__, (f"{violation}; {advice}" for violation in violations))


def refuse_sparse_gradients(name: str, body: Body) -> None:
    """Raise CaptureError for embeddings whose gradients would be sparse tensors, which are neither reduced nor sharded."""
    violations = []
    for node in body.calls():
        at = facts_of(node).sparse
        sparse = at is not None and (node.args[at] if len(node.args) > at else node.kwargs.get("sparse"))
        if sparse and value(node.args[0]).requires_grad:  # type: ignore[arg-type]
            violations.append(
                f"{node.meta['path'] or 'the model'} has an embedding with sparse = True, and sparse gradients are neither "
                "reduced nor sharded (FSDP takes none): set sparse = False, or freeze the weight"
            )
    raise_all(CaptureError, name, violations)


class RealTensors(TorchFunctionMode):
    """Notes the parameters of the original that a call of its copy computes with, and whatever else requires a gradient.

    original: the memory of the original's parameters. met: memory -> tensor.
    """

    def __init__(self, original: Container[int]) -> None:
        super().__init__()
        self.original = original
        self.met: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`."""
        for argument in (*args, *(kwargs or {}).values()):
            for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                # The copy's own tensors are fake, and none of those that stand for them in a trace requires a gradient.
                if type(tensor) in (Tensor, nn.Parameter) and (tensor.requires_grad or memory(tensor) in self.original):
                    self.met[memory(tensor)] = tensor
        return func(*args, **(kwargs or {}))


def foreign_parameters(constants: Iterable[tuple[Tensor, Sequence[str]]], owned: Mapping[int, str]) -> Iterator[str]:
    """What is wrong with tensors that would be constants of a graph: those that are parameters would never train.

    constants: (tensor, paths of the modules that use it) each. owned: the memory of the model's parameters -> their names.
    """
    # By memory, so that several views of one parameter are one violation.
    grouped: dict[int, tuple[Tensor, dict[str, None]]] = {}
    for tensor, users in constants:
        grouped.setdefault(memory(tensor), (tensor, {}))[1].update(dict.fromkeys(users))
    for key, (tensor, modules) in grouped.items():
        where = f", used in {', '.join(path or 'the model itself' for path in modules)}," if modules else ""
        if key in owned:
            yield (
                f"the parameter {owned[key]}{where} is reached past its module (by a global variable, a class, a view of it, "
                f"or an object that cannot be copied), so it would be a constant that never trains: {_REGISTER}"
            )
        elif tensor.requires_grad:
            yield (
                f"a tensor of shape {tuple(tensor.shape)}{where} requires a gradient and is not a parameter of the model, so "
                f"it would be a constant that never trains: {_REGISTER}, or set requires_grad = False"
            )


def memory(tensor: Tensor) -> int:
    """A number that a tensor and its views share; the tensor's own number where its layout has no single memory."""
    try:
        return storage_id(tensor)
    except (NotImplementedError, RuntimeError):  # sparse tensors, and some that wrap others
        return id(tensor)
