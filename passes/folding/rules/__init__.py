"""One rule an operator; what has none, and is not pointwise by its tag, fixes what it touches."""

from padst_compiler.passes.folding.rules import (
    attention,
    channels,
    joins,
    movement,
    parts,
    pointwise,
    products,
    reductions,
    regions,
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
    | joins.RULES
    | regions.RULES
)
