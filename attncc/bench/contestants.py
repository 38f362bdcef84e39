"""Who can compute a Problem: attncc, and what else is installed here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attncc.bench import form
from attncc.bench.problem import BLOCK, Inputs, Mod, Problem
from attncc.ir.expr import Score, TensorParam
from attncc.ir.program import Normalize

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

MOST_BYTES = 1 << 32
"""Of SDPA's mask, a byte a pair."""


TUNED = "tuned"
"""attncc with its schedules tuned."""


class LeftOut(Exception):
    """Why a contestant takes no part: it is not installed, or cannot express the program."""


@dataclass(frozen=True)
class Contestant:
    """A call on leaves in the layout that it likes; `back` gives [B, H, N, D] of a tensor of it."""

    call: Call
    inputs: Inputs
    dout: Tensor
    back: Callable[[Tensor], Tensor] = lambda x: x
    plan: Callable[[], object] | None = None
    """Plans for new captured tensors, and may call too."""
    plan_less: Callable[[], object] | None = None
    """What `plan` does besides."""

    def forward(self) -> Tensor:
        return self.call(*self.inputs)

    def backward(self, out: Tensor) -> Inputs:
        """Gradients of q, k and v; `out` can be asked again."""
        q, k, v = torch.autograd.grad(out, self.inputs, self.dout, retain_graph=True)
        return q, k, v


Maker = Callable[[Problem], Contestant]
"""Compiles what it can before the first call; raises LeftOut."""


def makers(tuned: float | None = None) -> dict[str, Maker]:
    """By name; with `tuned`, attncc again, last, its schedules tuned for about so many seconds."""
    found: dict[str, Maker] = {
        "attncc": own,
        "flex": flex,
        "flex_flash": flex_flash,
        "cudnn": partial(fused, "CUDNN_ATTENTION"),
        "flash": partial(fused, "FLASH_ATTENTION"),
        "sdpa": sdpa,
        "varlen": varlen,
        "fa4": fa4,
    }
    return found if tuned is None else {**found, TUNED: partial(own, tune=tuned)}


# -- attncc


def own(problem: Problem, tune: float | None = None) -> Contestant:
    """attncc, planned before it is called."""
    import attncc
    from attncc.api import TILE
    from attncc.binding import bind
    from attncc.bounds import check_bounds
    from attncc.tiles import BoundPlan

    attention = attncc.compile(problem.program)
    leaves = _leaves(problem)
    q, k, v = problem.inputs
    given: dict[str, Any] = dict(problem.arguments)
    if tune is not None:
        attention.tune(q, k, v, time_budget=tune, **given)
    plan = attention.plan(q, k, v, **given)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, plan=plan)

    def planned_anew() -> Tensor:
        new = {n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()}
        binding = bind(problem.program, q, k, v, new)
        check_bounds(attention.static, binding)
        return attention(q, k, v, plan=BoundPlan(attention.static, binding, TILE))

    return Contestant(call, *leaves, plan=planned_anew, plan_less=lambda: call(q, k, v))


# -- FlexAttention


def flex(problem: Problem, options: Any = None) -> Contestant:
    """Compiled FlexAttention; on the CPU, where it has no backward, its forward."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if problem.program.normalize is not Normalize.SOFTMAX or problem.program.sink is not None:
        raise LeftOut("has no sinks, and no normalization but softmax")
    if problem.program.output is not None:
        raise LeftOut("has no output clause")
    torch._functorch.config.donated_buffer = False  # so that a backward can be run twice
    (mask, score), n, scale = problem.mods, problem.lengths, problem.scale
    blocks = None if mask is None else block_mask(problem, mask)
    attend = torch.compile(flex_attention, dynamic=False)
    on_gpu = problem.device.type == "cuda"

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not on_gpu:
            q, k, v = q.detach(), k.detach(), v.detach()
        out = attend(
            q,
            k,
            v,
            score_mod=score,
            block_mask=blocks,
            scale=scale,
            enable_gqa=n.heads != n.kv_heads,
            kernel_options=options,
        )
        assert isinstance(out, Tensor)
        return out

    if mask is None:
        return Contestant(call, *_leaves(problem))
    make = torch.compile(create_block_mask)
    batch, heads = (None if copies == 1 else copies for copies in problem.copies)
    plan = partial(make, mask, batch, heads, n.q_len, n.kv_len, device=str(problem.device))
    return Contestant(call, *_leaves(problem), plan=plan)


def flex_flash(problem: Problem) -> Contestant:
    """FlexAttention with flash-attn-4's kernels."""
    _needs(problem, "flash_attn.cute", "flash-attn-4")
    return flex(problem, {"BACKEND": "FLASH"})


def block_mask(problem: Problem, mask: Mod) -> Any:
    """FlexAttention's own structure, from counts that take less memory than its own way."""
    from torch.nn.attention.flex_attention import BlockMask

    tiles, n = problem.tiles, problem.lengths
    assert tiles is not None
    full = tiles == BLOCK * BLOCK
    count, index = _lists((tiles > 0) & ~full)
    full_count, full_index = _lists(full)
    return BlockMask.from_kv_blocks(
        count,
        index,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask,
        seq_lengths=(n.q_len, n.kv_len),
    )


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles of a query tile are chosen, and which, those first."""
    flags = chosen.to(torch.int32)
    order = flags.argsort(dim=-1, descending=True, stable=True)
    return flags.sum(-1, dtype=torch.int32), order.to(torch.int32)


# -- kernels with fixed masks


def fused(backend: str, problem: Problem) -> Contestant:
    """One backend of torch's scaled_dot_product_attention, full or causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _needs(problem)
    found = form.form(problem)
    if found not in (form.Form(), form.Form(causal=True)):
        raise LeftOut("has no mask but causal, and no score")
    gqa, scale = problem.group > 1, problem.scale

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=found.causal, scale=scale, enable_gqa=gqa
            )

    return Contestant(call, *_leaves(problem))


def sdpa(problem: Problem) -> Contestant:
    """torch's scaled_dot_product_attention under the whole mask, whatever backend takes it."""
    program, n = problem.program, problem.lengths
    if program.normalize is not Normalize.SOFTMAX or program.sink is not None:
        raise LeftOut("has no sinks, and no normalization but softmax")
    if problem.program.output is not None:
        raise LeftOut("has no output clause")
    if program.score != Score():
        raise LeftOut("has no score modification")
    if math.prod(problem.copies) * n.q_len * n.kv_len > MOST_BYTES:
        raise LeftOut("would take more than 4 GiB for its mask")
    mask, scale = _whole(problem), problem.scale

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=n.heads != n.kv_heads
        )

    return Contestant(call, *_leaves(problem))


def _whole(problem: Problem) -> Tensor | None:
    """bool [*copies, Q, KV]."""
    mask, n = problem.mods[0], problem.lengths
    if mask is None:
        return None
    shape = *problem.copies, n.q_len, n.kv_len
    axes = [torch.arange(size, device=problem.device) for size in shape]
    at = [x.view([-1 if own == d else 1 for own in range(4)]) for d, x in enumerate(axes)]
    return mask(*at).expand(shape)


def varlen(problem: Problem) -> Contestant:
    """torch's varlen_attn: packed documents in one call, causal or not, in a window or not."""
    _needs(problem)
    found = form.form(problem)
    if found is None or found.documents is None:
        raise LeftOut("takes packed documents alone, causal, in a window, or whole")
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    starts, longest = _documents(problem, found.documents)
    group = problem.group
    options: dict[str, Any] = {"window_size": _window(found)}
    if problem.program.scale is not None:
        options["scale"] = problem.scale
    if group > 1 and grouped:
        options["enable_gqa"] = True

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1 and not grouped:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        out = varlen_attn(q, k, v, starts, starts, longest, longest, **options)
        assert isinstance(out, Tensor)
        return out

    return Contestant(call, *_leaves(problem, _packed), back=partial(_unpacked, problem))


def fa4(problem: Problem) -> Contestant:
    """flash-attn-4's own functions: full, causal, window, and packed documents."""
    _needs(problem, "flash_attn.cute", "flash-attn-4")
    found = form.form(problem)
    if found is None:
        raise LeftOut("takes full, causal, a window and packed documents alone")
    cute = import_module("flash_attn.cute")
    options = {
        "softmax_scale": problem.scale,
        "causal": found.causal,
        "window_size": (None, None) if found.window is None else _window(found),
    }
    if found.documents is None:
        attend = partial(cute.flash_attn_func, **options)
        layout, back = _rows_first, _rows_first
    else:
        starts, longest = _documents(problem, found.documents)
        lengths: dict[str, Any] = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        lengths |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        attend = partial(cute.flash_attn_varlen_func, **lengths, **options)
        layout, back = _packed, partial(_unpacked, problem)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v)
        made: Tensor = out[0] if isinstance(out, tuple) else out
        return made

    return Contestant(call, *_leaves(problem, layout), back=back)


def _needs(problem: Problem, module: str = "", package: str = "") -> None:
    """Refuses where a kernel for GPUs and half types cannot run, or `package` is not installed."""
    if module and (find_spec(module.split(".")[0]) is None or find_spec(module) is None):
        raise LeftOut(f"is not here: {package} is not installed")
    if problem.device.type != "cuda":
        raise LeftOut("needs a GPU")
    if problem.dtype not in (torch.bfloat16, torch.float16):
        raise LeftOut("has no kernels but for bf16 and fp16")


def _window(found: form.Form) -> tuple[int, int]:
    """(keys before a query, keys after it), -1 for all."""
    return -1 if found.window is None else found.window - 1, 0 if found.causal else -1


def _documents(problem: Problem, documents: TensorParam) -> tuple[Tensor, int]:
    """Where they begin in the packed batch, and how long the longest is."""
    ends = form.ends(problem, documents)
    return ends, int(ends.diff().max())


# -- layouts


def _leaves(
    problem: Problem, layout: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Inputs, Tensor]:
    """q, k and v as a contestant likes them, wanting gradients; and the output's gradient."""
    q, k, v = (layout(x).detach().requires_grad_() for x in problem.inputs)
    return (q, k, v), layout(problem.dout)


def _rows_first(x: Tensor) -> Tensor:
    """[B, N, H, D] of [B, H, N, D], and back."""
    return x.transpose(1, 2).contiguous()


def _packed(x: Tensor) -> Tensor:
    """[B N, H, D] of [B, H, N, D]."""
    return _rows_first(x).flatten(0, 1)


def _unpacked(problem: Problem, x: Tensor) -> Tensor:
    return x.view(problem.lengths.batch, -1, *x.shape[1:]).transpose(1, 2)
