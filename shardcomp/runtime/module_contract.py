"""What training code does to a plain module, and a sharded model cannot honour: refused here, with what to do instead.

`docs/module_contract.md` lists every promise of a plain module, and which of them hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from shardcomp.errors import PlanError

_BEFORE = "do it to the model before shardcomp.shard(...), which captures what the model does then"


def refuse(what: str, instead: str) -> NoReturn:
    """Raise the PlanError for something that a plain module allows and a sharded one cannot honour."""
    raise PlanError(f"{what}: {instead}")


class Namespace(nn.Module):
    """A module inside a sharded model, such as `sharded.model.layers`: it has parameters, under HuggingFace's names.

    Raises PlanError for whatever would be without effect: calling it, hooks, a mode of its own, a conversion.
    """

    _settle: Callable[[], Callable[[], None] | None] | None = None
    """Once the model is built, a weak reference to the function that reshards its parameters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        refuse("a module inside a sharded model was called", "it holds parameters only; call the sharded model itself")

    def __getattr__(self, name: str) -> Any:
        settle = self._settle and name in self.__dict__["_parameters"] and self._settle()
        if settle:
            settle()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._settle is not None:
            check_attribute(self, name, value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch has it, until the model is built."""
        if self._settle is not None:
            check_attribute(self, name, param)
        super().register_parameter(name, param)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As torch has it, until the model is built."""
        if self._settle is not None:
            check_attribute(self, name, module)
        super().add_module(name, module)

    register_module = add_module

    def train(self, mode: bool = True) -> Namespace:
        """Refused: see `set_mode`."""
        refuse(
            "the mode of a module inside a sharded model was set",
            "train() and eval() are of the whole model; for modules in different modes, set them before shardcomp.shard(...)",
        )

    def seal(self, settle: Callable[[], None]) -> None:
        """From now on refuse what would be without effect, here and in every module inside. settle: reshards parameters."""
        for module in self.modules():
            object.__setattr__(module, "_settle", weakref.WeakMethod(settle))

    def set_mode(self, mode: bool) -> None:
        """Set the mode of the whole model in every module inside it."""
        for module in self.modules():
            module.training = mode

    def _apply(self, fn: Any, recurse: bool = True) -> Namespace:
        refuse(
            "a module inside a sharded model was converted or moved",
            "the policy says precision and device: precision = bf16, fp32, fp16 or fp64",
        )

    def apply(self, fn: Any) -> Namespace:
        """Refused: `fn` would look for the model's own classes."""
        refuse("apply(...) on a module inside a sharded model", f"its modules are not the model's own classes; {_BEFORE}")

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch has it. Numbers are copied also where `assign`: optimizers keep their parameters."""
        return super().load_state_dict(state_dict, strict=strict, assign=False)

    def _hooked(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        refuse(
            "a hook was registered on a module inside a sharded model, which is never called",
            f"{_BEFORE}, hooks included; hooks on parameters, and on the sharded model itself, work",
        )

    register_forward_hook = register_forward_pre_hook = _hooked  # type: ignore[assignment]
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _hooked  # type: ignore[assignment]


def check_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Raise PlanError for a parameter or module that the code of a sharded model would not use."""
    if not isinstance(value, (nn.Parameter, nn.Module)):
        return
    if name in module.__dict__["_parameters"]:
        refuse(
            f"the parameter {name} of a sharded model was replaced, and its code would go on using the old one",
            "copy numbers into it, under torch.no_grad(): parameter.copy_(...), or load_state_dict(...)",
        )
    if name in module.__dict__["_modules"]:
        refuse(f"the module {name} of a sharded model was replaced", f"its code is emitted already; {_BEFORE}")
    refuse(
        f"{name} was added to a sharded model, whose code does not use it",
        "add it to the model before shardcomp.shard(...), or keep it outside and give the parameters of both to the optimizer",
    )


_INSTEAD = {
    "generate": "save_pretrained(path), then AutoModelForCausalLM.from_pretrained(path).generate(...)",
    "gradient_checkpointing_enable": 'recompute = "full" or "selective" in the policy',
    "gradient_checkpointing_disable": 'recompute = "none" in the policy',
    "enable_input_require_grads": "nothing: it serves gradient checkpointing, which the policy's recompute does",
    "resize_token_embeddings": "model.resize_token_embeddings(...) before shardcomp.shard(...)",
    "push_to_hub": "save_pretrained(path), then huggingface_hub.upload_folder",
    "merge_and_unload": "save_pretrained(path, strict=False), and merge in the dense model",
    "disable_adapter": "a second sharded model, of the base model without adapters, as the reference",
    "set_attn_implementation": "attention = ... in the policy",
    "no_sync": "micro_batch in the policy: train_step reduces once for all micro-batches",
    "set_requires_gradient_sync": "micro_batch in the policy: train_step reduces once for all micro-batches",
}
"""Methods that training code looks for on a model -> what does it here."""


class SealedModule(nn.Module):
    """A module whose code is emitted: what its caller does to it later either works or raises PlanError."""

    _sealed = False
    """Whether it is built."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _INSTEAD:
                raise AttributeError(f"a sharded model has no {name}: use {_INSTEAD[name]}") from None
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if self._sealed:
            check_attribute(self, name, value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch has it, until the model is built."""
        if self._sealed:
            check_attribute(self, name, param)
        super().register_parameter(name, param)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As torch has it, until the model is built."""
        if self._sealed:
            check_attribute(self, name, module)
        super().add_module(name, module)

    register_module = add_module

    def register_forward_pre_hook(self, hook: Any, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As torch has it, for `sharded(...)`; FSDP's own hook is refused."""
        if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed."):
            refuse(
                "a sharded model was given to fully_shard or replicate",
                "it is data-parallel already; data, zero and replicate in the policy say how ranks share it",
            )
        return super().register_forward_pre_hook(hook, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> SealedModule:
        """`to`, `half`, `cuda` and the like: nothing where they ask for what is, else refused."""
        kinds = {(t.dtype, t.device) for t in (*self.parameters(), *self.buffers())}
        for dtype, device in sorted(kinds, key=str):
            probe = fn(torch.empty(0, dtype=dtype, device=device))
            if (probe.dtype, probe.device) != (dtype, device):
                refuse(
                    f"a sharded model of {dtype} on {device} was asked to be {probe.dtype} on {probe.device}",
                    "precision in the policy says what it computes in: bf16, fp32, fp16 or fp64; every rank has one device",
                )
        return self

    def share_memory(self) -> SealedModule:
        """Refused."""
        refuse("share_memory() of a sharded model", "every rank is a process with a part of its own")

    def to_empty(self, *, device: Any, recurse: bool = True) -> SealedModule:
        """Refused."""
        refuse("to_empty() of a sharded model", "it has memory; a model on meta is given to shardcomp.shard(...) as it is")

    def apply(self, fn: Any) -> SealedModule:
        """Refused: `fn` would look for the model's own classes, such as nn.Linear or nn.Dropout, and find none."""
        refuse("apply(...) on a sharded model", f"its modules are not the model's own classes; {_BEFORE}")

    def __deepcopy__(self, memo: Any) -> SealedModule:
        refuse(
            "a sharded model was copied",
            "for an average of weights keep {name: p.detach().clone() for name, p in sharded.named_parameters()}; for a second "
            "model, such as a reference, shard the dense one again",
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse("a sharded model was pickled", "use shardcomp.checkpoint.save, torch.distributed.checkpoint or save_pretrained")

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Refused: transformers' Trainer asks for it."""
        refuse(
            "a sharded model was given to transformers' Trainer",
            "it wraps the model and steps by itself; write the loop with train_step, clip_grad_norm_ and optimizer_step, or "
            "use the pretraining driver among the examples",
        )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        refuse(
            "a sharded model was given to DistributedDataParallel",
            "it is data-parallel already: data in the policy says how far, and gradients are summed over its ranks",
        )
