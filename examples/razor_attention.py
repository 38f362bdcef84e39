"""RazorAttention (arXiv 2407.15891): what most heads drop is one column, their mean.

Shows a column after the keys, whose log-weight counts the keys it stands for.
Convention: a prompt is cut once, to its first `sinks` and last `recent`; q are the tokens after it.
"""

import attncc

RAZOR = attncc.compile("""
attention razor(retrieval: bool[heads], tokens: int, dropped: int, sinks: int):
    let causal = kv_idx <= q_idx + (tokens - q_len)
    let kept = kv_idx < sinks or kv_idx >= sinks + dropped
    let column = kv_idx == tokens and dropped > 0
    mask = where(retrieval[h], causal, causal and kept or column)
    score = where(kv_idx < tokens, score, score + log(float(dropped)))
""")


def razor(q, k, v, retrieval, recent, sinks=4):
    """k and v hold the prompt and then q's tokens; retrieval [heads]: which see all of them."""
    tokens = k.shape[2]
    dropped = max(0, tokens - q.shape[2] - sinks - recent)
    means = (x[:, :, sinks:][:, :, :dropped].sum(2, True) / max(dropped, 1) for x in (k, v))
    k, v = attncc.append_columns(k, v, *means)
    return RAZOR(q, k, v, retrieval=retrieval, tokens=tokens, dropped=dropped, sinks=sinks)
