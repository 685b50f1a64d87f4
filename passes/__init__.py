"""Graph to graph: fold permutations away, choose how every structured operator runs.

The order is meaning. The folds run again after the choice: a site chosen dense absorbs every map.
"""

from padst_compiler.contest import Prefer
from padst_compiler.formulation import Candidates
from padst_compiler.passes.cancel_inverse import CancelInverse
from padst_compiler.passes.choose_formulation import ChooseFormulation
from padst_compiler.passes.drop_identity import DropIdentity
from padst_compiler.passes.drop_watch import DropWatch
from padst_compiler.passes.fold_permutations import FoldPermutations
from padst_compiler.passes.fuse_mlp import FuseMlp
from padst_compiler.passes.invert_maps import InvertMaps
from padst_compiler.passes.keep_strides import KeepStrides
from padst_compiler.passes.lower_maps import LowerMaps
from padst_compiler.passes.lower_weights import LowerWeights
from padst_compiler.passes.open_attention import OpenAttention
from padst_compiler.passes.recognise_maps import RecogniseMaps
from padst_compiler.passes.take_sparse_gradient import TakeSparseGradient
from padst_compiler.passes.use_sparse_operator import UseSparseOperator
from padst_compiler.rewrite import Pass

__all__ = ["FOLDS", "KeepStrides", "inference_passes", "training_passes"]
FOLDS: tuple[Pass, ...] = (CancelInverse(), DropIdentity(), FoldPermutations())


def inference_passes(candidates: Candidates, *, prefer: Prefer, fold: bool) -> tuple[Pass, ...]:
    """Return the passes for a graph whose Parameters are frozen."""
    folds, written = (FOLDS, (RecogniseMaps(),)) if fold else ((), ())
    chosen = (ChooseFormulation(candidates, prefer), *folds, FuseMlp(), LowerMaps(), InvertMaps())
    weights = (OpenAttention(), UseSparseOperator(), LowerWeights())
    return (DropWatch(), *weights, *written, *folds, *chosen)


def training_passes(candidates: Candidates, *, prefer: Prefer) -> tuple[Pass, ...]:
    """Return the passes for a joint graph, in which no number is known."""
    weights = (UseSparseOperator(), TakeSparseGradient(), LowerWeights(), CancelInverse())
    return (DropWatch(), *weights, ChooseFormulation(candidates, prefer), LowerMaps(), InvertMaps())
