"""One rule an operator; what has none, and is not pointwise by its tag, fixes what it touches."""

from padst_compiler.passes.folding.rules import (
    attention,
    channels,
    movement,
    parts,
    pointwise,
    products,
    reductions,
)

__all__ = ["RULES"]

RULES = (
    pointwise.RULES
    | movement.RULES
    | parts.RULES
    | products.RULES
    | attention.RULES
    | channels.RULES
    | reductions.RULES
)
