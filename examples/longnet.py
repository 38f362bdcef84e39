"""LongNet (arXiv 2307.02486) in branches; examples/longnet.attn is the same in one pass.

Shows one program called with other numbers, and rows without keys, which weigh nothing in a merge.
Convention: of a rate r, head h keeps tokens h % r of each segment; causal.
"""

import attncc

BRANCH = attncc.compile("""
attention branch(width: int, rate: int):
    let segment = q_idx // width == kv_idx // width and q_idx >= kv_idx
    mask = segment and q_idx % rate == h % rate and kv_idx % rate == h % rate
""")


def longnet(q, k, v, branches=((512, 1), (1024, 2), (2048, 4), (4096, 8))):
    """out and lse over (segment, rate) branches; a key counts once in each that holds it."""
    return attncc.merge(
        BRANCH(q, k, v, width=width, rate=rate, return_lse=True) for width, rate in branches
    )
