"""The providers of attention that a policy can name: torch's kernels one by one, FlashAttention 3 through torch, xformers.

A named provider runs or raises; there is no silent fallback. `probe` calls it to find out which.
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
"""The names. `sdpa` is torch's own choice among its kernels; `eager` writes the scores out, with a softmax in float32."""
_SCORES = frozenset({"softcap", "sinks"})
_MASKS = frozenset({"q_position", "k_position", "q_segment", "k_segment", "key_mask", "bias", "window"})
_LACKS: dict[str, frozenset[str]] = {
    "sdpa:cudnn": _SCORES,
    "flash3": _SCORES | _MASKS | {"dropout"},
    "xformers": _SCORES,
}
"""Provider -> the arguments of attention that it does not support."""


def check(provider: str, settings: Mapping[str, Any]) -> None:
    """Raise KernelError if a provider lacks an option on every machine. settings: option -> whether, or how, it is used."""
    lacking = sorted(_LACKS.get(provider, frozenset()) & {name for name, setting in settings.items() if setting})
    if lacking:
        raise KernelError(f"attention = {provider} cannot take {', '.join(lacking)}: use attention = {_taking(lacking)}")


def _taking(names: Iterable[str]) -> str:
    return ", ".join(name for name in PROVIDERS if not _LACKS.get(name, frozenset()) & set(names))


def kernel_of(provider: str, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which torch's `scaled_dot_product_attention` runs on this kernel or raises.

    Raises:
        KernelError: the kernel is not available on this device.
    """
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
    except Exception as problem:  # the package of kernels may raise anything
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

    Causal, windowed and packed attention needs no mask of s × s. Attention that is `masked` in another way uses `seen()`: the
    keys that each query sees, and the queries that see any. Key heads are repeated, because its backward does not support
    groups.
    """
    ops: Any = _xformers()
    b, n, s = q.shape[:3]
    k, v = (heads.repeat_interleave(n // heads.shape[1], 1) for heads in (k, v))
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
        # A mask object costs no memory: the kernel skips the upper triangle.
        mask = ops.LowerTriangularMask()
    rows = [heads.transpose(1, 2) for heads in (q, k, v)]
    if flat:
        rows = [heads.flatten(0, 1).unsqueeze(0) for heads in rows]
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
        raise KernelError(
            f"attention = xformers: {problem}: pip install shardcomp[xformers], or use attention = sdpa"
        ) from problem


def _additive(seen: Tensor, bias: Tensor | None, q: Tensor, keys: int) -> Tensor:
    """The mask as an addition to the scores, [b, n, q, k] in the dtype of q. xformers needs padded rows of a multiple of 8."""
    added = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias.to(q.dtype)
    shape = (*q.shape[:3], keys)
    mask = torch.where(seen, added, float("-inf")).expand(shape)
    return torch.nn.functional.pad(mask, (0, -keys % 8))[..., :keys]


def _runs(segments: Tensor) -> list[int]:
    """The lengths of the runs of equal numbers, row by row. The host waits for the device.

    Raises:
        KernelError: a row has a segment in several runs.
    """
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    # Runs and distinct numbers are equal in number exactly if each segment is one run.
    ordered = segments.sort(-1).values
    kinds = torch.ones_like(starts)
    kinds[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    if int(starts.sum()) != int(kinds.sum()):
        raise KernelError("attention = xformers: a segment lies in several runs, and it takes one: use attention = sdpa")
    at = starts.flatten().nonzero().flatten().tolist()
    return [end - start for start, end in zip(at, [*at[1:], segments.numel()], strict=True)]


def probe(calls: Iterable[Callable[[], Tensor]]) -> None:
    """Call attention forward and backward.

    Raises:
        KernelError: a call failed; the text has the provider's own words.
    """
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                call().sum().backward()
            except KernelError:
                raise
            except Exception as problem:
                why = [str(warning.message).partition(" (Triggered")[0] for warning in caught]
                reasons = "; ".join(dict.fromkeys([*why, str(problem)]))
                raise KernelError(
                    f"the attention that the policy names does not run: {reasons}. Use attention = sdpa"
                ) from problem
