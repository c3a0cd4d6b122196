"""What runs attention where a policy names it: torch's kernels one by one, FlashAttention 3 through torch, xformers.

A provider that is named runs or raises: nothing takes its place. `probe` finds out by calling it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardcomp.errors import KernelError
from shardcomp.kernels.dropout import Stream

PROVIDERS = ("sdpa", "sdpa:cudnn", "flash3", "xformers", "eager")
"""The names. `sdpa` is torch's own choice among its kernels, `eager` the scores written out, with a softmax in float32."""
_SCORES = frozenset({"softcap", "sinks"})
_MASKS = frozenset({"q_position", "k_position", "q_segment", "k_segment", "key_mask", "bias", "window"})
_LACKS: dict[str, frozenset[str]] = {
    "sdpa:cudnn": _SCORES,
    "flash3": _SCORES | _MASKS | {"dropout"},
    "xformers": _SCORES,
}
"""The arguments of attention that a provider cannot honour."""


def check(provider: str, settings: Mapping[str, Any]) -> None:
    """Raise KernelError where a provider has no such attention, whatever the machine. settings: those that are asked for."""
    lacking = sorted(_LACKS.get(provider, frozenset()) & {name for name, held in settings.items() if held})
    if lacking:
        raise KernelError(f"attention = {provider} cannot take {', '.join(lacking)}: use attention = {_taking(lacking)}")


def _taking(names: Iterable[str]) -> str:
    return ", ".join(name for name in PROVIDERS if not _LACKS.get(name, frozenset()) & set(names))


def kernel_of(provider: str, device: torch.device) -> AbstractContextManager[Any]:
    """Within, torch's `scaled_dot_product_attention` runs on this kernel or raises. Raises KernelError where it is not here."""
    if provider not in ("sdpa:cudnn", "flash3"):
        return nullcontext()
    if device.type != "cuda":
        raise KernelError(f"attention = {provider} runs on a GPU only, and this is {device}: use attention = sdpa or eager")
    if provider == "sdpa:cudnn":
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    _activate_flash3()
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


@functools.cache
def _activate_flash3() -> None:
    try:
        torch_attention.activate_flash_attention_impl("FA3")
    except Exception as problem:  # whatever the package of kernels says
        raise KernelError(
            f"attention = flash3: torch cannot activate FlashAttention 3: {problem}. Install its package "
            "(flash_attn_interface), or use attention = sdpa"
        ) from problem


def xformers_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Callable[[], tuple[Tensor, Tensor]],
    *,
    segments: Tensor | None,
    masked: bool,
    bias: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout: float,
    random: Stream | None,
) -> Tensor:
    """xformers' `memory_efficient_attention`, from and to [b, n, s, d].

    Causal, windowed and packed attention takes no mask of s × s; what is `masked` in another way takes that of `seen()`: the
    keys that each query sees, and the queries that see any. Key heads are repeated: its backward takes no groups.
    """
    ops: Any = _xformers()
    b, n, s = q.shape[:3]
    k, v = (held.repeat_interleave(n // held.shape[1], 1) for held in (k, v))
    visible, mask = None, None
    flat = False
    if masked or bias is not None or k.shape[2] != s:
        keys, visible = seen()
        mask = _additive(keys | ~visible, bias, q, k.shape[2])
    elif segments is not None or window is not None:
        lengths = [s] * b if segments is None else _runs(segments)
        blocks = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=q.device)
        mask, flat = blocks.make_causal() if causal else blocks, True
        mask = mask.make_local_attention(window) if window is not None else mask
    elif causal:
        mask = ops.LowerTriangularMask()
    rows = [held.transpose(1, 2) for held in (q, k, v)]
    if flat:
        rows = [held.flatten(0, 1).unsqueeze(0) for held in rows]
    with random.lent() if random is not None and dropout else nullcontext():
        try:
            out: Tensor = ops.memory_efficient_attention(*rows, attn_bias=mask, p=dropout, scale=scale)
        except NotImplementedError as problem:
            raise KernelError(f"attention = xformers: {problem}\nUse attention = sdpa") from problem
    out = (out.squeeze(0).unflatten(0, (b, s)) if flat else out).transpose(1, 2)
    return out if visible is None else out.masked_fill(~visible, 0)


def _xformers() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("xformers.ops")
    except ImportError as problem:
        wanted = "pip install shardcomp[xformers]"
        raise KernelError(f"attention = xformers: {problem}: {wanted}, or use attention = sdpa") from problem


def _additive(seen: Tensor, bias: Tensor | None, q: Tensor, keys: int) -> Tensor:
    """What is added to the scores, [b, n, q, k] in the dtype of q, in memory in rows of a multiple of 8, as xformers needs."""
    added = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias.to(q.dtype)
    shape = (*q.shape[:3], keys)
    made = torch.where(seen, added, float("-inf")).expand(shape)
    return torch.nn.functional.pad(made, (0, -keys % 8))[..., :keys]


def _runs(segments: Tensor) -> list[int]:
    """The lengths of the runs of equal numbers, row by row. Waits for the device. Raises KernelError where a segment of a row
    is in several runs."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    ordered = segments.sort(-1).values
    kinds = torch.ones_like(starts)
    kinds[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    if int(starts.sum()) != int(kinds.sum()):
        raise KernelError("attention = xformers: a segment lies in several pieces, and it takes one: use attention = sdpa")
    at = starts.flatten().nonzero().flatten().tolist()
    return [end - start for start, end in zip(at, [*at[1:], segments.numel()], strict=True)]


def probe(calls: Iterable[Callable[[], Tensor]]) -> None:
    """Call attention forward and backward. Raises KernelError with what stands in its way, in the provider's own words."""
    for call in calls:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                call().sum().backward()
            except KernelError:
                raise
            except Exception as problem:
                why = [str(each.message).partition(" (Triggered")[0] for each in said]
                reasons = "; ".join(dict.fromkeys([*why, str(problem)]))
                raise KernelError(
                    f"the attention that the policy names does not run: {reasons}. Use attention = sdpa"
                ) from problem
