"""StreamingLLM (arXiv 2309.17453) in two branches; examples/streaming.attn is the same in one pass.

Shows disjoint keys, each with a program of its own, which could also lie in two tensors.
Convention: the window counts the query's own key, and sinks in the window are the window's.
"""

import attncc

TEXT = """
attention recent(window: int):
    mask = 0 <= q_idx - kv_idx < window

attention first(window: int, sinks: int):
    mask = kv_idx < sinks and q_idx - kv_idx >= window
"""
RECENT, FIRST = (attncc.compile(TEXT, name=name) for name in ("recent", "first"))


def streaming(q, k, v, window=1024, sinks=4):
    """out and lse; the keys of `first` may be k[:, :, :sinks] and v[:, :, :sinks] alone."""
    recent = RECENT(q, k, v, window=window, return_lse=True)
    first = FIRST(q, k[:, :, :sinks], v[:, :, :sinks], window=window, sinks=sinks, return_lse=True)
    return attncc.merge([recent, first])
