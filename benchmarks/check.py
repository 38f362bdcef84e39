"""One numerics case: outputs and gradients of a backend beside the dense interpreter's."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attncc.backends import cpu, dense, epilogue
from attncc.binding import Binding, bind
from attncc.ir.expr import TensorParam
from attncc.ir.ops import Kind
from attncc.ir.program import Normalize, Program
from attncc.numeric import index_bits
from attncc.passes import analyze
from attncc.tiles import BoundPlan
from benchmarks.cases import Case, programs

Values = dict[str, Tensor]
Attend = Callable[[Binding, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

Q_SCALE = 4.0
"""At unit scale a missing score derivative moves dq and dk by 7e-3 only."""

FACTOR = 2.0
"""flash-attention's convention: at most twice the error of the math path in the same dtype."""

NORMS = {
    torch.bfloat16: (2e-2, 6e-2),
    torch.float16: (3e-3, 1e-2),
    torch.float32: (2e-5, 2e-4),
    torch.float64: (1e-9, 1e-8),
}
"""Largest relative error by norms, of outputs and of gradients; that of the math path if it is
more, as where a sum cancels."""

LEAST = {torch.float32: 64, torch.float64: 256}
"""Roundings of the largest value that are allowed anyway: the result's own, or that of the sums
that cancel in `dout . v - delta`, where the math path may be exact."""

SCALARS = {"window": 100, "block": 64, "prefix": 200, "cap": 15.0}
SMALL_SCALARS = {"window": 13, "sinks": 3, "block": 8, "prefix": 20, "stride": 3, "cap": 5.0}


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share."""

    backend: str
    device: str
    small: bool = False
    seed: int = 0


def check(task: tuple[Case, Setting]) -> dict[str, Any]:
    """The case's errors by name, and what is wrong with them."""
    case, setting = task
    begun = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    call = _Call.made(case, setting)
    with _poisoned_memory():
        found = call.run(call.backend(), None)
    again = [call.run(call.backend(), None) for _ in range(2 if case.deterministic else 0)]
    exact = call.run(_dense(call.program, torch.float64), torch.float64)
    rough = call.run(_dense(call.program, call.dtype), call.dtype)
    errors, problems = {}, []
    for name in exact:
        values = found[name], exact[name], rough[name]
        errors[name], problem = _compared(name, call.dtype, *values)
        problems += problem
    for name in exact if again else ():
        if not _same_bits(again[0][name], again[1][name]):
            problems.append(f"{name} differs from run to run")
    if case.layout == "far":
        del call, found, again
        torch.cuda.empty_cache()
    seconds = round(time.monotonic() - begun, 2)
    return {"case": case.record(), "errors": errors, "problems": problems, "seconds": seconds}


@dataclass(frozen=True)
class _Call:
    case: Case
    setting: Setting
    program: Program
    dtype: torch.dtype
    inputs: Values
    binding: Binding

    @staticmethod
    def made(case: Case, setting: Setting) -> _Call:
        program, dtype = programs()[case.program], getattr(torch, case.dtype)
        rng = torch.Generator().manual_seed(setting.seed + 1000 * case.number)
        q_shape = case.batch, case.heads, case.q_len, case.head_dim
        k_shape = case.batch, case.kv_heads, case.kv_len, case.head_dim
        shapes = {"q": q_shape, "k": k_shape, "v": (*k_shape[:3], case.value_dim)}
        inputs = {
            name: _placed(torch.randn(shape, generator=rng), case.layout, dtype, setting.device)
            for name, shape in shapes.items()
        }
        inputs["q"].mul_(Q_SCALE)
        arguments = _arguments(program, case, setting, rng)
        return _Call(
            case, setting, program, dtype, inputs, bind(program, **inputs, arguments=arguments)
        )

    def backend(self) -> Attend:
        return _by_cpu(self.program) if self.setting.backend == "cpu" else _by_triton(self)

    def run(self, attend: Attend, dtype: torch.dtype | None) -> Values:
        """Outputs and gradients by name; dtype: what everything is converted to first."""
        grads = {t.name: self.binding.tensors[t.name] for t in self.program.tensors if t.grad}
        leaves = {name: _leaf(x, dtype) for name, x in (self.inputs | grads).items()}
        captured = {name: leaves[name] for name in grads}
        binding = replace(self.binding, tensors={**self.binding.tensors, **captured})
        out, lse = attend(binding, leaves["q"], leaves["k"], leaves["v"])
        values = {"out": out.detach()} | ({} if lse is None else {"lse": lse.detach()})
        loss = self._loss(out, lse)
        if not loss.requires_grad:
            return values
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), found, strict=True):
            values[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
        return values

    def _loss(self, out: Tensor, lse: Tensor | None) -> Tensor:
        rng = torch.Generator().manual_seed(self.setting.seed + 1)
        wide = torch.promote_types(out.dtype, torch.float32)
        dout = torch.randn(out.shape, generator=rng).to(self.dtype).to(out.device, wide)
        loss = (out.to(wide) * dout).sum()
        if lse is not None:
            dlse = torch.randn(lse.shape, generator=rng).to(out.device, wide)
            loss = loss + (torch.where(lse.isfinite(), lse, 0.0) * dlse).sum()
        return loss


# -- backends


def _dense(program: Program, dtype: torch.dtype) -> Attend:
    return lambda binding, q, k, v: dense.attention(program, binding, q, k, v, dtype)


def _by_cpu(program: Program) -> Attend:
    plan = analyze(program)

    def attend(binding: Binding, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        bound = BoundPlan(plan, binding, cpu.TILE)
        return epilogue.finished(bound, partial(cpu.attention, bound))(q, k, v)

    return attend


def _by_triton(call: _Call) -> Attend:
    from attncc.backends.gluon import launch, launch_backward
    from attncc.backends.triton import autograd
    from attncc.backends.triton.launch import Run, scale_of

    plan = analyze(call.program)

    def attend(binding: Binding, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        chosen = call.case.descriptors and call.case.number % 4 and call.setting.device == "cuda"
        forward = launch.forward if chosen and not launch.unsupported(q, v) else None
        given = plan, q, v, call.case.deterministic
        serves = chosen and not launch_backward.unsupported(*given)
        backward = launch_backward.backward if serves else None
        run = Run(
            BoundPlan(plan, binding, (64, 64)),
            scale_of(plan, binding),
            wide=index_bits(plan, binding) == 64,
            deterministic=call.case.deterministic,
            descriptors=None if call.case.descriptors else False,
            forward=forward,
            backward=backward,
            programs=5 if call.case.number % 2 else None,  # so that each has many tiles of work
        )
        out, lse = epilogue.finished(run.bound, partial(autograd.attention, run))(q, k, v)
        return out, lse if call.program.normalize is Normalize.SOFTMAX else None

    return attend


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Everything that torch.empty and its kin return is NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


# -- inputs


def _leaf(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In its own layout, NaN all around it, or converted."""
    return (x if dtype is None else x.to(dtype)).detach().requires_grad_()


def _placed(values: Tensor, layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """A [B, H, N, D] tensor of these values, in memory that is NaN wherever it is not read."""
    batch, heads, length, columns = values.shape
    nan = {"fill_value": math.nan, "dtype": dtype, "device": device}
    match layout:
        case "contiguous":
            place = torch.full((values.numel() + 4096,), **nan)[: values.numel()].view(values.shape)
        case "rows_first":
            place = torch.full((batch, length + 9, heads, columns), **nan)
            place = place[:, :length].transpose(1, 2)
        case "padded":
            place = torch.full((batch, heads, length + 7, columns + 8), **nan)
            place = place[:, :, :length, :columns]
        case "unaligned":
            place = torch.full((batch, heads, length + 3, columns + 3), **nan)
            place = place[:, :, 1 : length + 1, 1 : columns + 1]
        case "strided":
            place = torch.full((batch, heads, length + 2, 2 * columns), **nan)
            place = place[:, :, :length, ::2]
        case "far":
            strides = 2**31, length * columns, columns, 1
            place = torch.full((2**31 * (batch - 1) + heads * length * columns,), **nan)
            place = place.as_strided(values.shape, strides)
        case _:
            raise ValueError(layout)
    return place.copy_(values)


def _arguments(
    program: Program, case: Case, setting: Setting, rng: torch.Generator
) -> dict[str, Any]:
    known = SMALL_SCALARS if setting.small else SCALARS
    scalars = {p.name: known.get(p.name, p.default) for p in program.scalars}
    return scalars | {p.name: _captured(p, case, setting, rng) for p in program.tensors}


def _captured(param: TensorParam, case: Case, setting: Setting, rng: torch.Generator) -> Tensor:
    sizes = {"batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads}
    sizes |= {"q_len": case.q_len, "kv_len": case.kv_len, "span": max(case.q_len + case.kv_len, 8)}
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in param.dims]
    match param.kind:
        case Kind.INT if param.sorted:
            starts = torch.rand(shape, generator=rng) < 8 / max(case.kv_len, 1)
            return starts.to(torch.int32).cumsum(-1, dtype=torch.int32).to(setting.device)
        case Kind.INT:
            top = 8 if "kv_len" in param.dims else case.kv_len + 1
            return torch.randint(0, top, shape, generator=rng).to(setting.device)
        case Kind.BOOL:
            return (torch.rand(shape, generator=rng) < 0.7).to(setting.device)
        case Kind.FLOAT:
            return _floats(param, shape, case, setting, rng)


def _floats(
    param: TensorParam, shape: list[int], case: Case, setting: Setting, rng: torch.Generator
) -> Tensor:
    """Normal numbers, NaN beyond every axis and, in a table of pairs, above the diagonal."""
    values = torch.randn(shape, generator=rng) * 0.5
    if "q_len" in param.dims and "kv_len" in param.dims:
        queries, keys = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
        values = values.masked_fill(keys > queries, math.nan)
    own = case.captured == "own" or case.dtype == "float64"
    dtype = getattr(torch, case.dtype) if own else torch.float32
    place = torch.full([n + 3 for n in shape], math.nan, dtype=dtype, device=setting.device)
    return place[tuple(slice(1, n + 1) for n in shape)].copy_(values)


# -- errors


def _compared(
    name: str, dtype: torch.dtype, found: Tensor, exact: Tensor, rough: Tensor
) -> tuple[dict[str, float], list[str]]:
    """The error's size, its bound and its norm; and sentences that say what is wrong."""
    outer, gradient = NORMS[dtype]
    own = found.dtype if name == "lse" else dtype
    least = LEAST.get(own, 1) * torch.finfo(own).eps
    found, exact, rough = found.double(), exact.double(), rough.double()
    finite = exact.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite], exact[~finite]):
        wrong = int((found.isfinite() != finite).sum())
        return {"error": math.inf}, [
            f"{name} is not finite where it should be, or the other way: {wrong}"
        ]
    if not finite.any():
        return {"error": 0.0}, []
    found, exact, rough = found[finite], exact[finite], rough[finite]
    size = float(exact.abs().max())
    error, path = float((found - exact).abs().max()), float((rough - exact).abs().max())
    bound = FACTOR * path + least * max(size, 1.0)
    scale = exact.norm() + 1e-3 * math.sqrt(exact.numel())
    norm, path_norm = (float((x - exact).norm() / scale) for x in (found, rough))
    allowed = max(gradient if name.startswith("d") else outer, path_norm)
    numbers = {"error": error, "bound": bound, "path": path, "norm": norm, "size": size}
    problems = []
    if not error <= bound:
        problems.append(f"{name} is off by {error:.3g}, allowed {bound:.3g}, of {size:.3g}")
    if not norm <= allowed:
        problems.append(f"{name} is off by {norm:.3g} in norm, allowed {allowed:.3g}")
    return numbers, problems


def _same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.isnan(), two.isnan()) and torch.equal(one.nan_to_num(), two.nan_to_num())
