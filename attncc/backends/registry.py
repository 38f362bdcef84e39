"""The backends by name: which one runs a call, and how it is called."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attncc.backends import epilogue
from attncc.backends.triton.versions import installed
from attncc.errors import ArgumentError, UnsupportedError, suggest
from attncc.numeric import index_bits
from attncc.settings import settings
from attncc.tiles import BoundPlan

if TYPE_CHECKING:
    from attncc.backends.triton.launch import Run
    from attncc.tuning.search import Tuned

Result = tuple[Tensor, Tensor | None]
"""out [B, Hq, Q, Dv], and lse [B, Hq, Q] where the program normalizes by softmax."""

Ready = Callable[[Tensor, Tensor, Tensor], Result]
"""q, k and v to the result."""

Backend = Callable[[BoundPlan, Tensor, Tensor, bool], Ready]
"""(bound plan, q, v, deterministic) to what runs calls of such inputs, again and again.

UnsupportedError where it cannot, now or when it is called.
"""

WIDEST_HEAD = 256
"""Of the Triton kernels: a head of a tile of rows must fit shared memory."""


def choose(name: str | None, device: torch.device) -> Backend:
    """The backend asked for by name, here or by ATTNCC_BACKEND, else the device's own.

    Raises ArgumentError for an unknown name; a choice never falls back to another backend.
    """
    name = name or settings().backend
    if name == "auto":
        if device.type == "cuda":
            return _gpu
        name = "cpu"
        if device.type != "cpu":
            raise UnsupportedError(
                f"no backend is made for {device.type} tensors",
                hint="ask for backend='dense', which runs wherever torch does",
            )
    if name not in BACKENDS:
        hint = suggest(name, BACKENDS) or f"there is {', '.join(sorted(BACKENDS))}"
        raise ArgumentError(f"there is no backend {name!r}", hint=hint)
    return BACKENDS[name]


def _dense(bound: BoundPlan, q: Tensor, v: Tensor, deterministic: bool) -> Ready:
    from attncc.backends import dense

    return partial(dense.attention, bound.plan.program, bound.binding)


def _cpu(bound: BoundPlan, q: Tensor, v: Tensor, deterministic: bool) -> Ready:
    from attncc.backends import cpu

    if q.device.type != "cpu":
        raise UnsupportedError(f"the cpu backend got {q.device} tensors", hint="move them: q.cpu()")
    run = partial(cpu.attention, cpu.retiled(bound))  # sums in one order, always
    return epilogue.finished(bound, run)


def _gpu(bound: BoundPlan, q: Tensor, v: Tensor, deterministic: bool) -> Ready:
    """Warp-specialised kernels where there are some, else Triton's."""
    return _by_kernels(bound, q, v, deterministic, specialised=True)


def _gluon(bound: BoundPlan, q: Tensor, v: Tensor, deterministic: bool) -> Ready:
    _check_triton(q, v)
    from attncc.backends.gluon import launch, launch_backward
    from attncc.backends.triton import autograd
    from attncc.backends.triton.launch import differentiable

    _check_gluon(launch.unsupported(q, v))
    run = _by_kernels(bound, q, v, deterministic, specialised=True)
    reason = launch_backward.unsupported(bound.plan, q, v, deterministic)
    if not reason:
        return run

    def forward_alone(q: Tensor, k: Tensor, v: Tensor) -> Result:
        if autograd.wants_gradients(differentiable(bound), q, k, v):
            _check_gluon(reason)
        return run(q, k, v)

    return forward_alone


def _check_gluon(reason: str) -> None:
    if reason:
        raise UnsupportedError(
            f"the gluon backend cannot run this call: {reason}",
            hint="leave the backend to be chosen",
        )


def _triton(bound: BoundPlan, q: Tensor, v: Tensor, deterministic: bool) -> Ready:
    return _by_kernels(bound, q, v, deterministic, specialised=False)


def _by_kernels(
    bound: BoundPlan, q: Tensor, v: Tensor, deterministic: bool, *, specialised: bool
) -> Ready:
    """specialised: take Gluon's kernels where they serve the call."""
    _check_triton(q, v)
    from attncc.backends.triton.autograd import attention
    from attncc.backends.triton.launch import Run

    key = "run", specialised, deterministic, q.dtype, v.shape[-1]
    run = bound.kept.get(key)
    if not isinstance(run, Run):
        run = bound.kept[key] = _run(bound, q, v, deterministic, specialised)
    return epilogue.finished(bound, partial(attention, run))


def _run(bound: BoundPlan, q: Tensor, v: Tensor, deterministic: bool, specialised: bool) -> Run:
    from attncc.backends.gluon import launch, launch_backward
    from attncc.backends.triton.launch import Run, scale_of

    plan, binding = bound.plan, bound.binding
    forward = backward = None
    if specialised and not launch.unsupported(q, v):
        forward = launch.forward
    if specialised and not launch_backward.unsupported(plan, q, v, deterministic):
        backward = launch_backward.backward
    return Run(
        bound,
        scale_of(plan, binding),
        wide=index_bits(plan, binding) == 64,
        deterministic=deterministic,
        forward=forward,
        backward=backward,
    )


def kernels(bound: BoundPlan, q: Tensor, v: Tensor) -> tuple[str, ...]:
    """Names of the kernels that a call and its gradients run, as `tune` takes them."""
    own = _unspecialised(bound, q, v)
    given = settings().backend == "triton"
    forward = "forward" if given or own["gluon_forward"] else "gluon_forward"
    if given or own["gluon_backward"]:
        return forward, "backward_kv", "backward_q"
    return forward, "gluon_backward"


def _unspecialised(bound: BoundPlan, q: Tensor, v: Tensor) -> dict[str, str]:
    """Why each warp-specialised kernel does not serve a call; empty where it does."""
    from attncc.backends.gluon import launch, launch_backward

    deterministic = torch.are_deterministic_algorithms_enabled()
    backward = launch_backward.unsupported(bound.plan, q, v, deterministic)
    return {"gluon_forward": launch.unsupported(q, v), "gluon_backward": backward}


def tune(
    bound: BoundPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asked: Sequence[str] | None,
    time_budget: float,
) -> Tuned:
    """The quickest schedules of a call's kernels; UnsupportedError where there are none to time."""
    if not (q.is_cuda or interpreted()):
        here = torch.cuda.is_available()
        raise UnsupportedError(
            f"tune times GPU kernels, and q, k and v are on {q.device}",
            hint="move them to the GPU" if here else "torch finds no GPU; `attncc doctor` says why",
        )
    _check_triton(q, v)
    from attncc.tuning import search

    chosen = kernels(bound, q, v) if asked is None else asked
    for name, reason in _unspecialised(bound, q, v).items():
        if name in chosen and reason:
            raise UnsupportedError(
                f"{name} does not serve this call: {reason}",
                hint=f"leave kernels out, or ask for {', '.join(kernels(bound, q, v))}",
            )
    return search.tune(bound, q, k, v, kernels=chosen, time_budget=time_budget)


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _check_triton(q: Tensor, v: Tensor) -> None:
    if q.device.type != "cuda" and not interpreted():
        raise UnsupportedError(
            f"the triton backend got {q.device} tensors",
            hint="move them to a GPU, or set TRITON_INTERPRET=1 to run its kernels slowly here",
        )
    if q.dtype is torch.float64:
        raise UnsupportedError(
            "the triton backend has no float64 kernels", hint="ask for backend='dense', or float32"
        )
    installed()  # or an UnsupportedError
    widest = max(q.shape[-1], v.shape[-1])
    if widest > WIDEST_HEAD:
        raise UnsupportedError(
            f"the triton backend has no kernel for head dim {widest}, at most {WIDEST_HEAD}",
            hint="ask for backend='dense', which materialises all pairs",
        )


BACKENDS: dict[str, Backend] = {"dense": _dense, "cpu": _cpu, "triton": _triton, "gluon": _gluon}
