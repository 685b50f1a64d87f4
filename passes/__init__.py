"""Graph to graph: fold permutations away, then choose how every structured operator runs.

The order is meaning. A reader comes before a writer: what a reader absorbs needs no proof of a way.
"""

from padst_compiler.passes.absorb_into_reader import AbsorbIntoReader
from padst_compiler.passes.absorb_into_writer import AbsorbIntoWriter
from padst_compiler.passes.cancel_inverse import CancelInverse
from padst_compiler.passes.choose_formulation import ChooseFormulation
from padst_compiler.passes.drop_identity import DropIdentity
from padst_compiler.passes.drop_watch import DropWatch
from padst_compiler.rewrite import Pass

__all__ = ["FOLDS", "ChooseFormulation", "DropWatch"]

FOLDS: tuple[Pass, ...] = (
    CancelInverse(),
    DropIdentity(),
    AbsorbIntoReader(),
    AbsorbIntoWriter(),
)
