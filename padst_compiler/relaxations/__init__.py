"""Parametrisations of a permutation that is learned: one file each.

``n`` features; ``M (n, n)`` is the soft permutation, ``y = x M^T``. What each costs, with T tokens:

    sinkhorn     n^2 logits                 2 T n^2          the reference
    gumbel       n^2 logits                 2 T n^2          the same, with noise while training
    autoshuffle  n^2 magnitudes             2 T n^2          AutoShuffleNet's
    low_rank     2 n m                      2 T n^2          never holds an (n, n) matrix
    clos         about k n^1.5              2 k T n^1.5      k factors, each block-diagonal
    blockwise    n b                        2 T n b          moves within blocks of b only
"""

from padst_compiler.permutation import SoftPermutation
from padst_compiler.relaxations.autoshuffle import AutoShufflePermutation
from padst_compiler.relaxations.blockwise import BlockwisePermutation
from padst_compiler.relaxations.clos import ClosPermutation
from padst_compiler.relaxations.gumbel import GumbelPermutation
from padst_compiler.relaxations.low_rank import LowRankPermutation
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation

__all__ = ["RELAXATIONS"]

RELAXATIONS: tuple[type[SoftPermutation], ...] = (
    SinkhornPermutation,
    GumbelPermutation,
    AutoShufflePermutation,
    LowRankPermutation,
    ClosPermutation,
    BlockwisePermutation,
)
