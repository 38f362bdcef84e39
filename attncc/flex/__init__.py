"""attncc behind FlexAttention's names: change the import, and keep the rest."""

from torch.nn.attention.flex_attention import (
    AuxOutput,
    AuxRequest,
    and_masks,
    noop_mask,
    or_masks,
)

from attncc.flex.attention import flex_attention
from attncc.flex.block_mask import BlockMask, create_block_mask, create_mask, from_block_mask

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "from_block_mask",
    "noop_mask",
    "or_masks",
]
