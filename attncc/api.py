"""The public API: compile a program, call it, plan it, read its kernel."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attncc import frontend
from attncc.backends import dense, registry
from attncc.backends.triton.versions import installed
from attncc.binding import Binding, bind, bind_lengths, check_inputs
from attncc.bounds import check_bounds
from attncc.capture import capturing
from attncc.errors import ArgumentError, UnsupportedError
from attncc.ir.plan import Plan
from attncc.ir.program import Normalize, Program
from attncc.order import Asked, Orders, order_key
from attncc.order.placed import Placed
from attncc.passes import analyze
from attncc.plans import (
    CallPlan,
    PlanCache,
    Recent,
    call_key,
    lengths,
    mask_arguments,
)
from attncc.settings import Debug, settings, tell
from attncc.tiles import BoundPlan

if TYPE_CHECKING:
    from attncc.backends.registry import Ready
    from attncc.tuning.search import Tuned

TILE = 128, 128
"""Tiles of a plan where none are asked for, those of most kernels."""

RESERVED = frozenset(
    (
        *("q", "k", "v", "return_lse", "plan", "backend", "deterministic", "dtype", "tile"),
        *("order", "ordered"),
        *("kernels", "time_budget", "self"),
    )
)
"""Arguments of `Attention`'s methods, which a parameter must not hide behind."""


def compile(source: str | Path | Program, name: str | None = None) -> Attention:
    """An attention variant from a path, a program's text, or a Program.

    name: which of several programs in one file. Raises AttnccError, with line, column and what to
    write instead, for every mistake in the text.
    """
    return Attention(frontend.load(source, name))


def from_mods(
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    sorted: Sequence[str] = (),
) -> Attention:
    """An attention variant from functions as FlexAttention takes them.

    score_mod: (score, b, h, q_idx, kv_idx) -> score; mask_mod: (b, h, q_idx, kv_idx) -> bool.
    sorted:    captured int tensors that never fall along their last axis, by name: documents then
               become loop bounds in closed form. A false promise is an error.

    The functions run on values that stand for positions. Numbers and tensors they captured become
    parameters: a call takes the numbers, and what the tensors then hold, or arguments of those
    names. Numbers that Python itself needs, to branch or to count, and sizes that it reads, are
    constants. A score of -inf masks its pair. Reads out of range are errors where the mask keeps
    the pair, negative ones too, which do not count from the end; ints do not wrap.

    Raises AttnccError, with the function's own line, for what has no meaning for one pair:
    branches on positions, values of captured tensors, writes in place, random numbers.
    """
    from attncc.frontend.mods import traced_mods

    mods = traced_mods(score_mod, mask_mod, name, sorted)
    return Attention(mods.program, mods.arguments)


def and_masks(*masks: Attention | Callable[..., Any]) -> Attention:
    """Pairs that every mask keeps, of programs or mask_mods; one may bring a score with it."""
    return _joined("and", masks)


def or_masks(*masks: Attention | Callable[..., Any]) -> Attention:
    """Pairs that any of the masks keeps, of programs or mask_mods."""
    return _joined("or", masks)


def _joined(op: Literal["and", "or"], masks: Sequence[Attention | Callable[..., Any]]) -> Attention:
    if not masks:
        raise ArgumentError("there is no mask to join", hint="pass one or more")
    parts = [x if isinstance(x, Attention) else from_mods(mask_mod=x) for x in masks]
    return reduce(lambda first, second: first._join(op, second), parts)


class Attention:
    """One compiled variant; calling it is attention with it."""

    def __init__(
        self, program: Program, held: Callable[[], Mapping[str, object]] | None = None
    ) -> None:
        """held: what parameters are that a call does not pass."""
        for param in program.params:
            if param.name in RESERVED:
                raise ArgumentError(
                    f"a parameter named {param.name!r} could not be passed in a call",
                    hint="rename it",
                    source=program.source,
                    span=param.span,
                )
        self.program = program
        self._held = held
        self._compiled = _compiled(program)
        if held is not None:
            _RECENT.append(self._compiled)

    def __repr__(self) -> str:
        return f"<attncc.Attention {self.program.name}>"

    def __str__(self) -> str:
        """The program in the language."""
        return str(self.program)

    def __and__(self, other: Attention) -> Attention:
        """Keeps pairs that both keep; the score, if one side has one, stays."""
        return self._join("and", other) if isinstance(other, Attention) else NotImplemented

    def __or__(self, other: Attention) -> Attention:
        """Keeps pairs that either keeps; of masks alone."""
        return self._join("or", other) if isinstance(other, Attention) else NotImplemented

    def __invert__(self) -> Attention:
        """Keeps the other pairs; of masks alone."""
        from attncc.frontend.combine import negated

        return Attention(negated(self.program), self._held)

    def _join(self, op: Literal["and", "or"], other: Attention) -> Attention:
        from attncc.frontend.combine import joined

        mine, others = self._captured(), other._captured()
        neither = {p.name for p in self.program.params} - mine.keys() - others.keys()
        same = {name for name in mine.keys() & others.keys() if _same(mine[name], others[name])}
        program, names = joined(op, self.program, other.program, neither | same)

        def held() -> dict[str, object]:
            found = {names[name]: value for name, value in other._captured().items()}
            return {**found, **self._captured()}

        return Attention(program, held if mine or others else None)

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: Literal[False] = False,
        plan: BoundPlan | None = None,
        backend: str | None = None,
        deterministic: bool = False,
        order: Asked = "auto",
        ordered: bool = False,
        **params: object,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: Literal[True],
        plan: BoundPlan | None = None,
        backend: str | None = None,
        deterministic: bool = False,
        order: Asked = "auto",
        ordered: bool = False,
        **params: object,
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: bool = False,
        plan: BoundPlan | None = None,
        backend: str | None = None,
        deterministic: bool = False,
        order: Asked = "auto",
        ordered: bool = False,
        **params: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out [B, Hq, Q, Dv] in q's dtype, and with return_lse also lse [B, Hq, Q].

        q [B, Hq, Q, D], k [B, Hkv, KV, D], v [B, Hkv, KV, Dv] of one floating dtype and device, any
        strides; Hkv divides Hq. Differentiable once in q, k, v and tensors declared `grad`. Under
        autocast they are converted as for scaled_dot_product_attention.

        plan:    made by `plan(...)` for the same lengths and mask arguments; its arguments need not
                 be passed again, and those that the mask does not read may change. In a CUDA graph
                 that is captured, calls plan anew, for replays read what tensors then hold; a plan
                 that was made in the capture is shared.
        backend: "dense", "cpu", "triton" or "gluon"; by default the device's own. Never falls back.
        deterministic: gradients bitwise repeatable; also asked for by torch's own switch.
        order:   of tokens while they are computed: "natural"; "residues", where the mask keeps
                 pairs of one residue of a step; "by(doc)", sorted by an int tensor of the program;
                 tiles of the program's axes, as (8, 16); or the positions in their order, int64
                 [N]. By default the plan's, else the program's own, else what a model of costs
                 finds quickest. Results are the same but for rounding.
        ordered: q, k and v have that order already, and so will the results; nothing is copied.

        Raises ArgumentError, BoundsError, UnsupportedError.
        """
        params = self._given(params, plan)
        call = self._call
        if torch.compiler.is_compiling():  # one graph break: kernels are chosen by values
            call = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
        self._check_lse(return_lse)
        out, lse = call(q, k, v, params, plan, backend, deterministic, order, ordered)
        return (out, lse) if return_lse and lse is not None else out

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        params: Mapping[str, object],
        plan: BoundPlan | None,
        backend: str | None,
        deterministic: bool,
        order: Asked,
        ordered: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if _autocasts(q):
            q, k, v = _autocast(q, k, v)
            with torch.autocast(q.device.type, enabled=False):  # backends choose their own dtypes
                return self._call(q, k, v, params, plan, backend, deterministic, order, ordered)
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        captured = isinstance(q, Tensor) and capturing(q.device)
        own = backend, deterministic, ordered, order_key(order)
        key = None if captured or own[-1] is None else call_key(q, k, v, params, own)
        calls = self._compiled.calls if plan is None else self._calls_of(plan)
        ready = calls.find(key)
        if ready is None:
            bound = self._bound(q, k, v, params, plan)
            ready = self._ready(bound, q, v, backend, deterministic, order, ordered)
            if plan is None or not params:  # which make a plan of their own
                calls.keep(key, ready)
        return ready(q, k, v)

    def _ready(
        self,
        bound: BoundPlan,
        q: Tensor,
        v: Tensor,
        backend: str | None,
        deterministic: bool,
        order: Asked,
        ordered: bool,
    ) -> Ready:
        """What runs a call, with tokens in another order where that was asked for, or pays."""
        orders = self._compiled.orders
        placed = bound.order if isinstance(bound, CallPlan) else None
        if placed is not None and isinstance(order, str) and order == "auto":
            choice = placed.choice
        else:
            choice = orders.choose(bound.binding, order)
        if choice is None:
            orders.check_ordered(ordered)
            return registry.choose(backend, q.device)(bound, q, v, deterministic)

        def start(
            program: Program, q: Tensor, k: Tensor, v: Tensor, given: dict[str, object]
        ) -> Ready:
            own = orders.attention(program)._bound(q, k, v, given, None)
            return registry.choose(backend, q.device)(own, q, v, deterministic)

        return orders.ready(start, choice, bound.binding, ordered)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: bool = False,
        dtype: torch.dtype | None = None,
        **params: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The same by the dense interpreter, which defines it; in `dtype` throughout, if given."""
        self._check_lse(return_lse)
        binding = bind(self.program, q, k, v, self._given(params))
        with torch.autocast(q.device.type, enabled=False) if _autocasts(q) else nullcontext():
            out, lse = dense.attention(self.program, binding, q, k, v, dtype)
        return (out, lse) if return_lse and lse is not None else out

    def plan(
        self,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        tile: tuple[int, int] = TILE,
        order: Asked = "auto",
        **params: object,
    ) -> CallPlan:
        """What a call would compute, of tensors or of lengths.

        Without tensors: q_len=, kv_len=, and batch=1, heads=1, kv_heads=heads, head_dim=64.
        tile: (queries, keys) that `.counts` counts and `print` draws; kernels choose their own.
        order: of tokens, as of a call; calls with this plan have the same. `.order` permutes
               tensors for calls with ordered=True, and has the counts.
        """
        params = self._given(params)
        if q is not None and k is not None and v is not None:
            binding = bind(self.program, q, k, v, params)
        elif q is not None or k is not None or v is not None:
            raise ArgumentError("a plan needs all of q, k and v, or q_len= and kv_len=")
        else:
            binding = self._bind_lengths(params)
        made = self._placed(self._planned(binding, tile), order)
        made.kept[MAKER] = self
        return made

    def source(
        self,
        target: str = "sm_90",
        *,
        dtype: str = "bf16",
        backward: bool = False,
        backend: str | None = None,
        head_dim: int = 128,
        value_dim: int | None = None,
    ) -> str:
        """The generated kernel for a target, one stand-alone file; needs no GPU.

        target: sm_80, sm_90, sm_100, gfx942. dtype of q, k and v: bf16, fp16, fp32.
        backend: "triton" or "gluon"; by default the one whose kernel a call would run. The dims of
        q and k, and of v, decide what of a gluon kernel is printed; the others fit all.

        Raises ArgumentError, and UnsupportedError where the backend has no such kernel.
        """
        installed()  # or an UnsupportedError
        from attncc.backends.gluon import emit
        from attncc.backends.triton import aot
        from attncc.backends.triton.emit import Call

        call = Call(dtype, head_dim, value_dim or head_dim)
        files = emit.sources(self.static, call, aot.target(target), backend)
        wanted = "_backward" if backward else "_forward"
        for name, text in files.items():
            if name.endswith(wanted):
                return text
        _, reason = emit.unsupported(self.static, call, aot.target(target))
        raise UnsupportedError(
            f"the gluon backend has no such kernel: {reason}", hint="leave the backend to be chosen"
        )

    def tune(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        kernels: Sequence[str] | None = None,
        time_budget: float = 120.0,
        **params: object,
    ) -> Tuned:
        """Times the kernels' schedules on this call; later calls like it run with the quickest.

        kernels: some of "forward", "backward_kv", "backward_q", "gluon_forward", "gluon_backward";
        by default all that the call and its gradients run. time_budget: seconds, about.

        Trials run in another process, which a schedule that crashes or hangs does not outlive.
        Winners, whose results were compared with the default's and with the reference's, are kept
        for this GPU, program, dtype, head dims and lengths rounded up to powers of two, for other
        processes too; plans made before keep the schedules they have. Printed, the result is one
        line a kernel to paste. Raises UnsupportedError where there is no GPU.
        """
        if _autocasts(q):
            q, k, v = _autocast(q, k, v)
        bound = self._bound(q, k, v, self._given(params), None)
        with torch.autocast(q.device.type, enabled=False) if _autocasts(q) else nullcontext():
            found = registry.tune(bound, q, k, v, kernels, time_budget)
        self._compiled.forget()  # schedules chosen before
        return found

    @property
    def static(self) -> Plan:
        """What the passes found out, for any lengths and arguments."""
        return self._compiled.static

    def _placed(self, plan: CallPlan, order: Asked) -> CallPlan:
        orders = self._compiled.orders
        placed = Placed(orders, order, plan.binding)
        if not isinstance(order, str) or order != "auto":
            _ = placed.choice  # or an error
        return replace(plan, order=placed)

    # -- binding

    def _given(self, params: dict[str, object], plan: BoundPlan | None = None) -> dict[str, object]:
        """Arguments, and what functions captured for those that are not passed."""
        if plan is None:
            return {**self._captured(), **params}
        self._check_captured(plan, params)
        return params  # a plan has all of them

    def _captured(self) -> Mapping[str, object]:
        return {} if self._held is None else self._held()

    def _check_captured(self, plan: BoundPlan, params: Mapping[str, object]) -> None:
        """A plan that another Attention of this program made has what that one captured."""
        if plan.kept.get(MAKER) is self or plan.plan.program != self.program:
            return
        for name, value in self._captured().items():
            if name not in params and not _same(_value(plan.binding, name), value):
                raise ArgumentError(
                    f"plan has another {name} than this Attention captured",
                    hint=f"make a plan by this one, or pass {name}=...",
                )

    def _planned(self, binding: Binding, tile: tuple[int, int]) -> CallPlan:
        check_bounds(self.static, binding)
        return self._compiled.plans(binding, tile)

    def _calls_of(self, plan: BoundPlan) -> Recent[Ready]:
        """The same of calls with a plan, which keeps them."""
        found = plan.kept.get(self._compiled)
        if not isinstance(found, Recent):
            found = plan.kept[self._compiled] = Recent()
        return found

    def _bind_lengths(self, params: Mapping[str, object]) -> Binding:
        params = dict(params)
        sizes = {}
        for name in ("q_len", "kv_len", "batch", "heads", "kv_heads", "head_dim"):
            if name in params:
                sizes[name] = params.pop(name)
        for name in ("q_len", "kv_len"):
            if name not in sizes:
                raise ArgumentError(
                    f"a plan without tensors needs {name}",
                    hint="plan(q, k, v, ...) or plan(q_len=4096, kv_len=4096, ...)",
                )
        return bind_lengths(self.program, **sizes, arguments=params)  # type: ignore[arg-type]

    def _bound(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        params: Mapping[str, object],
        plan: BoundPlan | None,
    ) -> BoundPlan:
        if plan is None:
            return self._planned(bind(self.program, q, k, v, params), TILE)
        if plan.plan is not self.static and plan.plan.program != self.program:
            raise ArgumentError(
                f"plan is of {plan.plan.program.name}, expected one of {self.program.name}"
            )
        captured = capturing(plan.binding.device)
        made_in_graph = isinstance(plan, CallPlan) and plan.captured
        if made_in_graph and not captured:
            raise ArgumentError(
                "plan was made while a CUDA graph was captured, and has values in replays alone",
                hint="make another one outside of the capture",
            )
        again = captured and not made_in_graph  # what its tensors hold may be new in a replay
        if not params and not again:
            check_inputs(q, k, v)
            _check_same(plan, q, k)
            return plan
        kept = {p.name: _value(plan.binding, p.name) for p in self.program.params}
        binding = bind(self.program, q, k, v, {**kept, **params})
        _check_same(plan, q, k)
        _check_mask(plan, binding)
        order = plan.order if isinstance(plan, CallPlan) else None
        if again:
            return replace(self._planned(binding, plan.tile), order=order)
        check_bounds(self.static, binding)
        return CallPlan(plan.plan, binding, plan.tile, plan, captured=captured, order=order)

    def _check_lse(self, return_lse: bool) -> None:
        if return_lse and self.program.normalize is not Normalize.SOFTMAX:
            raise ArgumentError(
                f"return_lse: {self.program.name} has no lse, since it says "
                f"normalize = {self.program.normalize.value}"
            )


class _Compiled:
    """What Attentions of equal programs share: functions traced anew are not compiled anew."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.forget()

    def forget(self) -> None:
        """Drop what was planned and made ready."""
        self.calls: Recent[Ready] = Recent()
        """By all that binding looks at: a repeated call is neither checked nor planned again."""
        self.__dict__.pop("plans", None)

    @cached_property
    def static(self) -> Plan:
        begun = time.perf_counter()
        passes = settings().debug >= Debug.PASSES  # showing them costs more than they do
        plan = analyze(self.program, partial(tell, Debug.PASSES) if passes else None)
        spent = 1e3 * (time.perf_counter() - begun)
        tell(Debug.TIMES, f"{self.program.name}: analysed in {spent:.1f} ms")
        return plan

    @cached_property
    def plans(self) -> PlanCache:
        return PlanCache(self.static)

    @cached_property
    def orders(self) -> _Orders:
        return _Orders(self.static)


class _Orders(Orders):
    """Orders of tokens, and what runs the programs that they make."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._attentions: Recent[Attention] = Recent()

    def attention(self, program: Program) -> Attention:
        found = self._attentions.find(program) or Attention(program)
        self._attentions.keep(program, found)
        return found


_COMPILED: WeakValueDictionary[tuple[Program, str], _Compiled] = WeakValueDictionary()
_RECENT: deque[_Compiled] = deque(maxlen=8)
"""What functions were traced to last, whose Attentions may live for one call only."""


def _compiled(program: Program) -> _Compiled:
    """By text too, which errors show."""
    key = program, program.source
    found = _COMPILED.get(key)
    if found is None:
        found = _COMPILED[key] = _Compiled(program)
    return found


def _value(binding: Binding, name: str) -> object:
    return binding.tensors[name] if name in binding.tensors else binding.scalars[name]


MAKER = "maker"
"""By which a plan keeps the Attention that made it."""


def _same(had: object, got: object) -> bool:
    tensors = isinstance(had, Tensor) or isinstance(got, Tensor)
    return had is got if tensors else had == got


def _check_same(plan: BoundPlan, q: Tensor, k: Tensor) -> None:
    """The lengths and device of a call against its plan's."""
    binding = plan.binding
    here = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    names = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim")
    for name, had, got in zip(names, lengths(binding), here, strict=True):
        if had != got:
            raise ArgumentError(
                f"plan is for {name} {had}, but q, k and v have {name} {got}",
                hint="make a plan of these tensors: plan(q, k, v, ...)",
            )
    if binding.device != q.device:
        raise ArgumentError(f"plan is for {binding.device}, but q is on {q.device}")


def _check_mask(plan: BoundPlan, binding: Binding) -> None:
    """New arguments may change scores, not which pairs are kept."""
    scalars, tensors = mask_arguments(plan.plan)
    for name in (*scalars, *tensors):
        had, got = _value(plan.binding, name), _value(binding, name)
        if not _same(had, got):
            raise ArgumentError(
                f"plan was made with another {name}, which the mask reads",
                hint=f"leave {name} out, or make a plan of the new one",
            )


# -- autocast


def _autocasts(q: object) -> bool:
    if not isinstance(q, Tensor):
        return False
    if q.is_cuda:
        return torch.is_autocast_enabled("cuda")
    device = q.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """q, k, v in the autocast dtype; float64 stays."""
    dtype = torch.get_autocast_dtype(q.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype is not torch.float64 else x
        for x in (q, *others)
    )
