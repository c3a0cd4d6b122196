"""Copies of a model that keep nothing of the original: functions that hold its modules are copied with it.

`copy.deepcopy` takes a function for a constant. A layer that was patched by a closure, such as
`mlp.forward = (lambda old: lambda x: old(x) * 0.5)(mlp.forward)`, would so call the original layer from within the copy.
"""

from __future__ import annotations

import copyreg
import gc
import types
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_BOUND = (types.BuiltinMethodType, types.MethodWrapperType)
_CLOSED = (type, types.ModuleType, types.CodeType, types.FrameType, types.GeneratorType, types.TracebackType)
"""What is never looked into: a class or a module of Python leads to everything, and the others cannot be copied."""


def copy_model(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """Deep-copy a model together with the functions that lead to its modules, parameters or buffers.

    Closures, default arguments, attributes such as `__wrapped__`, bound methods, `functools.partial` and weak references are
    followed. A function that does not lead to the model stays the same object, and so does what it holds.

    Args:
        model: The model, which is left as it is.
        memo: What replaces an object of the original in the copy, by its id; it is added to, as `copy.deepcopy` does.

    Returns:
        The copy.
    """
    return _Copier(model, {} if memo is None else memo).copy(model)


class _Copier:
    """One copy of one model. `copy` is `copy.deepcopy` but for functions and what is bound to them."""

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self._memo = memo
        # An object that is gone would give its id to another one. copy.deepcopy keeps its objects at the same place.
        self._alive: list[Any] = memo.setdefault(id(memo), [])
        self._own = {id(content) for content in (*model.modules(), *model.parameters(), *model.buffers())}
        self._leads: dict[int, bool] = {}

    def copy(self, x: Any) -> Any:
        """The copy of any object, made at most once."""
        if id(x) in self._memo:
            return self._memo[id(x)]
        result = self._copy(x)
        if result is not x:
            self._remember(x, result)
        return result

    def _remember(self, x: Any, result: Any) -> None:
        self._memo[id(x)] = result
        self._alive.append(x)

    def _copy(self, x: Any) -> Any:
        kind = type(x)
        if kind is types.FunctionType:
            return self._function(x) if self._leads_to_model(x) else x
        if kind is types.MethodType:
            return types.MethodType(self.copy(x.__func__), self.copy(x.__self__))
        if kind is types.CellType:
            return types.CellType()  # filled once the functions that share it are there
        if kind in _BOUND:
            return getattr(self.copy(x.__self__), x.__name__) if self._leads_to_model(x) else x
        if kind is weakref.ref:
            return weakref.ref(self.copy(x())) if id(x()) in self._own else x
        if kind is dict:
            copied: dict[Any, Any] = {}
            self._remember(x, copied)
            copied.update((self.copy(key), self.copy(content)) for key, content in x.items())
            return copied
        if kind is list:
            several: list[Any] = []
            self._remember(x, several)
            several.extend(self.copy(content) for content in x)
            return several
        if kind is tuple:
            entries = tuple(self.copy(content) for content in x)
            same = all(a is b for a, b in zip(entries, x, strict=True))
            return x if same else self._memo.get(id(x), entries)  # a tuple may be met again within itself
        return self._other(x)

    def _other(self, x: Any) -> Any:
        """An object of any other class, by the protocol of `copy`."""
        if type(x) in _ATOMS or isinstance(x, type):
            return x
        if hasattr(x, "__deepcopy__"):
            return x.__deepcopy__(self._memo)
        reduce = copyreg.dispatch_table.get(type(x))
        how = reduce(x) if reduce is not None else x.__reduce_ex__(4)
        # A string names a global, which is not copied.
        return x if isinstance(how, str) else self._rebuild(x, *how)

    def _rebuild(
        self,
        x: Any,
        make: Any,
        args: tuple[Any, ...],
        state: Any = None,
        entries: Iterable[Any] | None = None,
        items: Iterable[tuple[Any, Any]] | None = None,
        *_: Any,
    ) -> Any:
        """What `__reduce_ex__` describes, made of copies. The object is known before its state is copied, which may hold it."""
        result = make(*(self.copy(argument) for argument in args))
        self._remember(x, result)
        if state is not None:
            state = self.copy(state)
            if hasattr(result, "__setstate__"):
                result.__setstate__(state)
            else:
                # A class with __slots__ gives (attributes, slots).
                attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                vars(result).update(attributes or {})
                for name, content in (slots or {}).items():
                    setattr(result, name, content)
        for entry in entries or ():
            result.append(self.copy(entry))
        for key, content in items or ():
            result[self.copy(key)] = self.copy(content)
        return result

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """The same code over copies of what it holds."""
        cells = function.__closure__
        closure = None if cells is None else tuple(self.copy(c) if self._leads_to_model(c) else c for c in cells)
        copied = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        self._remember(function, copied)  # before anything that may lead back here is copied
        copied.__defaults__ = self._part(function.__defaults__)
        copied.__kwdefaults__ = self._part(function.__kwdefaults__)
        copied.__annotations__ = function.__annotations__
        copied.__qualname__, copied.__module__, copied.__doc__ = function.__qualname__, function.__module__, function.__doc__
        vars(copied).update((name, self._part(content)) for name, content in vars(function).items())
        if cells is not None:
            for cell in cells:
                self._fill(cell)
        return copied

    def _fill(self, cell: types.CellType) -> None:
        copied = self._memo.get(id(cell))
        if copied is not None and not _contents(copied):
            for content in _contents(cell):
                copied.cell_contents = self._part(content)

    def _part(self, content: Any) -> Any:
        """The copy of something that a function holds; itself where it does not lead to the model, or cannot be copied.

        A hook may hold a whole trainer with its files and threads. A parameter that it reaches by way of one is then the
        caller's own, which a capture does not take for a constant but refuses.
        """
        if not self._leads_to_model(content):
            return content
        before = set(self._memo)
        try:
            return self.copy(content)
        except Exception:
            # What was copied before the failure may refer to copies that were never finished.
            for key in self._memo.keys() - before:
                del self._memo[key]
            return content

    def _leads_to_model(self, x: Any) -> bool:
        """Whether one of the model's modules, parameters or buffers can be reached from an object."""
        if id(x) not in self._leads:
            self._alive.append(x)
            # Breadth first, since a module is usually near and the objects behind it are many.
            seen, reached = {id(x): x}, [x]
            while reached and not self._own & seen.keys():
                reached = [content for item in reached for content in _held_by(item) if id(content) not in seen]
                seen.update((id(content), content) for content in reached)
            self._leads[id(x)] = bool(self._own & seen.keys())
        return self._leads[id(x)]


_ATOMS = {
    *(type(None), bool, int, float, complex, str, bytes, type, range, property, type(Ellipsis), type(NotImplemented)),
    *(types.CodeType, types.ModuleType),
}


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    """What is in a cell: nothing, or one object."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _held_by(x: Any) -> Iterable[Any]:
    """The objects that an object refers to, and would be copied with it."""
    if isinstance(x, types.FunctionType):
        return (*(x.__closure__ or ()), x.__defaults__, x.__kwdefaults__, vars(x))
    if isinstance(x, types.CellType):
        return _contents(x)
    if isinstance(x, weakref.ref):
        return (x(),)
    if isinstance(x, (*_CLOSED, Tensor)):
        return ()
    return gc.get_referents(x)
