"""Delta Attention (arXiv 2505.11254): a sparse output, and what every gamma-th row of it lacks.

Shows one program at several sets of rows: of dense ones, which begin at `first`, `step` apart.
Convention: sinks and a window are sparse; the last N % gamma + max(128, gamma) rows are dense.
"""

import attncc

TEXT = """
attention sparse(window: int, sinks: int):
    mask = q_idx >= kv_idx and (q_idx - kv_idx < window or kv_idx < sinks)
attention dense(first: int, step: int):
    mask = kv_idx <= first + step * q_idx
"""
SPARSE, DENSE = (attncc.compile(TEXT, name=name) for name in ("sparse", "dense"))


def delta(q, k, v, gamma=64, window=1024, sinks=4):
    n = q.shape[2]
    tail = max(0, n - n % gamma - max(128, gamma))
    out = SPARSE(q, k, v, window=window, sinks=sinks)
    lack = DENSE(q[:, :, ::gamma], k, v, first=0, step=gamma) - out[:, :, ::gamma]
    out = out + lack.repeat_interleave(gamma, 2)[:, :, :n]
    out[:, :, tail:] = DENSE(q[:, :, tail:], k, v, first=tail, step=1)
    return out
