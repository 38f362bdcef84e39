"""The rows of the peers' table: each pattern as a program, and as FlexAttention's mods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attncc import frontend
from attncc.bench.problem import Mod, Mods, Problem
from attncc.errors import ArgumentError
from attncc.inputs import Lengths

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Pattern:
    """One attention variant, said twice."""

    title: str
    program: str
    mods: Callable[[Arguments], Mods]
    arguments: Callable[[Lengths, torch.device], dict[str, Any]] = lambda shape, device: {}

    def problem(self, shape: Lengths, device: torch.device, dtype: torch.dtype) -> Problem:
        """A call of it with random inputs."""
        program = frontend.load(self.program)
        given = self.arguments(shape, device)
        names = {param.name for param in program.params}
        arguments = {name: value for name, value in given.items() if name in names}
        return Problem(program, shape, arguments, device, dtype, written=self.mods(given))


@dataclass(frozen=True)
class Row:
    """A pattern of PATTERNS, by its title, so that rows travel to other processes."""

    title: str
    shape: Lengths
    group: str

    def problem(self, device: torch.device, dtype: torch.dtype) -> Problem:
        return PATTERNS[self.title].problem(self.shape, device, dtype)

    def shaped(self, shape: Lengths) -> Row:
        return replace(self, shape=shape)


# -- arguments


def document_starts(length: int, count: int, seed: int) -> Tensor:
    """Where random documents begin; the first at 0."""
    rng = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(length - 1, generator=rng)[: count - 1] + 1
    return torch.cat([torch.zeros(1, dtype=torch.int64), cuts.sort().values])


def documents(seed: int, count: int = 12) -> Callable[[Lengths, torch.device], dict[str, Any]]:
    """doc[i], the document of token i, and start[d], where document d begins."""

    def make(shape: Lengths, device: torch.device) -> dict[str, Any]:
        start = document_starts(shape.kv_len, count, seed)
        is_start = torch.zeros(shape.kv_len, dtype=torch.int32).index_fill_(0, start, 1)
        doc = is_start.cumsum(0, dtype=torch.int32) - 1
        return {"doc": doc.to(device), "start": start.to(device, torch.int32)}

    return make


def slopes(shape: Lengths, device: torch.device) -> dict[str, Any]:
    head = torch.arange(1, shape.heads + 1, device=device)
    return {"slope": torch.exp2(-8.0 * head / shape.heads)}


def bias_table(shape: Lengths, device: torch.device) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(2)
    return {"bias": torch.randn(shape.heads, 2 * shape.kv_len, generator=rng).to(device)}


def quarter(shape: Lengths, device: torch.device) -> dict[str, Any]:
    return {"prefix": shape.kv_len // 4}


# -- patterns


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _masked(mask: Mod) -> Callable[[Arguments], Mods]:
    return lambda a: (mask, None)


def _same(a: Arguments) -> Mod:
    doc = a["doc"]
    return lambda q, k: doc[q] == doc[k]


def _program(mask: str, score: str = "", params: str = "") -> str:
    lines = [f"attention row({params}):", f"    mask = {mask}"]
    return "\n".join(lines + [f"    score = {score}"] * bool(score)) + "\n"


DOC = "doc: int[kv_len] sorted"
CAUSAL = "q_idx >= kv_idx"
SAME = "doc[q_idx] == doc[kv_idx]"

FULL = Pattern("full", _program("true"), lambda a: (None, None))
CAUSAL_ROW = Pattern("causal", _program(CAUSAL), _masked(_causal))
WINDOW = Pattern(
    "causal, window 1024",
    _program(f"{CAUSAL} and q_idx - kv_idx < 1024"),
    _masked(lambda b, h, q, k: (q >= k) & (q - k < 1024)),
)
SINKS = Pattern(
    "4 sinks + window 1024",
    _program(f"{CAUSAL} and (q_idx - kv_idx < 1024 or kv_idx < 4)"),
    _masked(lambda b, h, q, k: (q >= k) & ((q - k < 1024) | (k < 4))),
)


def _causal_documents(a: Arguments) -> Mods:
    same = _same(a)
    return lambda b, h, q, k: (q >= k) & same(q, k), None


DOCUMENTS = Pattern(
    "causal documents, 12",
    _program(f"{CAUSAL} and {SAME}", params=DOC),
    _causal_documents,
    documents(seed=0),
)


def _prefix(a: Arguments) -> Mods:
    prefix = a["prefix"]
    return lambda b, h, q, k: (q >= k) | (k < prefix), None


PREFIX = Pattern(
    "prefix-LM, N/4",
    _program(f"{CAUSAL} or kv_idx < prefix", params="prefix: int"),
    _prefix,
    quarter,
)
DILATED = Pattern(
    "causal, window 4096, every 4th key",
    _program(f"{CAUSAL} and q_idx - kv_idx < 4096 and (q_idx - kv_idx) % 4 == 0"),
    _masked(lambda b, h, q, k: (q >= k) & (q - k < 4096) & ((q - k) % 4 == 0)),
)


def _alibi(a: Arguments) -> Mods:
    slope = a["slope"]
    return _causal, lambda s, b, h, q, k: s + slope[h] * (k - q)


ALIBI = Pattern(
    "ALiBi, causal",
    _program(CAUSAL, "score + slope[h] * (kv_idx - q_idx)", "slope: float[heads]"),
    _alibi,
    slopes,
)
SOFTCAP = Pattern(
    "softcap 30, causal",
    _program(CAUSAL, "30.0 * tanh(score / 30.0)"),
    lambda a: (_causal, lambda s, b, h, q, k: 30.0 * torch.tanh(s / 30.0)),
)


def _relative(a: Arguments) -> Mods:
    bias = a["bias"]
    length = bias.shape[1] // 2
    return None, lambda s, b, h, q, k: s + bias[h, q - k + length]


RELATIVE = Pattern(
    "relative bias table [H, 2N]",
    _program("true", "score + bias[h, q_idx - kv_idx + kv_len]", "bias: float[heads, span]"),
    _relative,
    bias_table,
)

# -- the masks of LongCA-bench


def _full_document(a: Arguments) -> Mods:
    same = _same(a)
    return lambda b, h, q, k: same(q, k), None


def _share_question(a: Arguments) -> Mods:
    doc, same = a["doc"], _same(a)
    return lambda b, h, q, k: ((doc[q] != 0) & (doc[k] == 0)) | ((q >= k) & same(q, k)), None


def _causal_blockwise(a: Arguments) -> Mods:
    doc, same = a["doc"], _same(a)
    last = doc[-1]
    return lambda b, h, q, k: ((doc[q] == last) & (doc[k] != last)) | ((q >= k) & same(q, k)), None


def _prefix_document(a: Arguments) -> Mods:
    doc, start, same = a["doc"], a["start"], _same(a)
    return lambda b, h, q, k: same(q, k) & ((q >= k) | (k - start[doc[k]] <= 512)), None


def _global_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((q - k).abs() <= 1024) | (q < 2048) | (k < 2048)


def _block_causal(a: Arguments) -> Mods:
    same = _same(a)
    return lambda b, h, q, k: same(q, k) & (k < (q // 2048 + 1) * 2048), None


DOCS = documents(seed=1)
LONGCA = (
    Pattern(
        "causal_document", _program(f"{CAUSAL} and {SAME}", params=DOC), _causal_documents, DOCS
    ),
    Pattern("full_document", _program(SAME, params=DOC), _full_document, DOCS),
    Pattern(
        "share_question",
        _program(f"(doc[q_idx] != 0 and doc[kv_idx] == 0) or ({CAUSAL} and {SAME})", params=DOC),
        _share_question,
        DOCS,
    ),
    Pattern(
        "causal_blockwise",
        _program(
            "(doc[q_idx] == doc[kv_len - 1] and doc[kv_idx] != doc[kv_len - 1])"
            f" or ({CAUSAL} and {SAME})",
            params=DOC,
        ),
        _causal_blockwise,
        DOCS,
    ),
    Pattern(
        "prefix_lm_document",
        _program(
            f"{SAME} and ({CAUSAL} or kv_idx - start[doc[kv_idx]] <= 512)",
            params=f"{DOC}, start: int[documents]",
        ),
        _prefix_document,
        DOCS,
    ),
    Pattern(
        "global_sliding_window",
        _program("abs(q_idx - kv_idx) <= 1024 or q_idx < 2048 or kv_idx < 2048"),
        _masked(_global_window),
    ),
    Pattern(
        "block_causal_document",
        _program(f"{SAME} and kv_idx < (q_idx // 2048 + 1) * 2048", params=DOC),
        _block_causal,
        DOCS,
    ),
    Pattern(
        "sliding_window_causal",
        _program(f"{CAUSAL} and q_idx - kv_idx <= 1024"),
        _masked(lambda b, h, q, k: (q >= k) & (q - k <= 1024)),
    ),
)


def square(batch: int, heads: int, kv_heads: int, length: int, head_dim: int) -> Lengths:
    """As many queries as keys."""
    return Lengths(batch, heads, kv_heads, length, length, head_dim)


D128 = square(2, 16, 16, 8192, 128)
D64 = square(4, 16, 16, 8192, 64)
D256 = square(1, 16, 16, 8192, 256)
D192 = square(1, 16, 16, 8192, 192)
LONG = square(1, 64, 8, 32768, 128)

MAIN = (FULL, CAUSAL_ROW, WINDOW, SINKS, DOCUMENTS, PREFIX, DILATED, ALIBI, SOFTCAP, RELATIVE)
PATTERNS = {pattern.title: pattern for pattern in (*MAIN, *LONGCA)}
ROWS = (
    *(Row(pattern.title, D128, "main") for pattern in MAIN),
    *(Row(pattern.title, D64, "d64") for pattern in (FULL, CAUSAL_ROW, ALIBI)),
    *(Row(p.title, shape, "wide") for shape in (D256, D192) for p in (FULL, CAUSAL_ROW)),
    *(Row(pattern.title, LONG, "longca") for pattern in LONGCA),
)
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS))


def chosen(words: Sequence[str]) -> list[Row]:
    """The rows of the groups named, and those whose title or shape holds a word; all for none."""
    found = [row for row in ROWS if not words or any(_is_meant(row, word) for word in words)]
    if not found:
        raise ArgumentError(
            f"no row is {' or '.join(map(repr, words))}",
            hint=f"groups are {', '.join(GROUPS)}; words of titles and shapes do too",
        )
    return found


def _is_meant(row: Row, word: str) -> bool:
    return word == row.group or word in f"{row.title}, {row.shape}"
