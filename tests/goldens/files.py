"""Which generated kernel files are kept as goldens, and how each is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attncc import frontend
from attncc.backends.triton import aot, emit
from attncc.ir.plan import Plan
from attncc.passes import analyze

HERE = Path(__file__).parent
EXAMPLES = HERE.parent.parent / "examples"

SINK = """
# A logit for each head that every row may attend to instead (gpt-oss).
attention learned_sink(window: int = 128, logit: float[heads] grad):
    mask = q_idx >= kv_idx and q_idx - kv_idx < window
    sink = logit[h]
"""
SIGMOID = """
# Weights of their own instead of a softmax over the row (arXiv 2409.04431).
attention sigmoid_causal(offset: float = -8.0):
    mask = q_idx >= kv_idx
    score = score + offset
    normalize = sigmoid
"""

SCATTERED = """
# Documents whose tokens may lie anywhere: tiles come from lists.
attention scattered_documents(doc: int[batch, kv_len], window: int = 1024):
    let same_document = doc[b, q_idx] == doc[b, kv_idx]
    mask = q_idx >= kv_idx and q_idx - kv_idx < window and same_document
"""


@dataclass(frozen=True)
class Golden:
    """One file: a program (an example's name, or text), a kernel file of it, and for which GPU."""

    program: str
    kernel: str = "forward"
    target: str = "sm_90"

    @property
    def stem(self) -> str:
        target = "" if self.target == "sm_90" else f"_{self.target}"
        return f"{self._parsed.name}_{self.kernel}{target}"

    @property
    def path(self) -> Path:
        """Ends in .txt, so that no tool takes it for a module of the project."""
        return HERE / f"{self.stem}.py.txt"

    def text(self) -> str:
        """The file as it is generated now."""
        spec = emit.spec(self.plan, "bf16", aot.target(self.target))
        return emit.sources(spec)[f"{spec.name}_{self.kernel}"]

    @property
    def plan(self) -> Plan:
        return analyze(self._parsed)

    @property
    def _parsed(self) -> frontend.Program:
        text = self.program
        if "\n" not in text:
            text = (EXAMPLES / f"{text}.attn").read_text()
        (program,) = frontend.parse(text)
        return program


GOLDENS = (
    Golden("full"),
    Golden("causal"),
    Golden("causal", target="sm_80"),
    Golden("causal", "backward"),
    Golden("sliding_window"),
    Golden("streaming"),
    Golden("prefix_lm"),
    Golden("packed"),
    Golden("packed", "backward"),
    Golden(SCATTERED),
    Golden(SCATTERED, "lists"),
    Golden("alibi"),
    Golden("softcap"),
    Golden("relative_bias", "backward"),
    Golden(SINK),
    Golden(SIGMOID),
)


def rewrite() -> Iterator[str]:
    """Writes every golden anew, removes those that are none; yields names of what changed."""
    kept = {golden.path for golden in GOLDENS}
    for path in sorted(HERE.glob("*.py.txt")):
        if path not in kept:
            path.unlink()
            yield f"removed {path.name}"
    for golden in GOLDENS:
        text = golden.text()
        if not golden.path.exists() or golden.path.read_text() != text:
            golden.path.write_text(text)
            yield f"wrote {golden.path.name}"
