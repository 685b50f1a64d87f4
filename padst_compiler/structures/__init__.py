"""Structures: one file each; each owns its masks, its storage, its reference and its symmetry.

Legend: ``o`` outputs, ``i`` inputs, ``t`` tokens, ``k`` kept per group; ``w: (o, i)``, ``x: (t,
i)``; ``y = S (P x) = x[:, perm] @ S.T``. Sparsity is the fraction of zeros.
"""

from padst_compiler.structures.base import ElementStructure, Structure, unit_of
from padst_compiler.structures.block import Block
from padst_compiler.structures.diagonal import Diagonal
from padst_compiler.structures.fan_in import FanIn
from padst_compiler.structures.nm import NM
from padst_compiler.structures.shape import Shape
from padst_compiler.structures.unstructured import Unstructured

__all__ = [
    "NM",
    "STRUCTURES",
    "Block",
    "Diagonal",
    "ElementStructure",
    "FanIn",
    "Shape",
    "Structure",
    "Unstructured",
    "unit_of",
]

STRUCTURES: tuple[type[Structure], ...] = (Block, NM, Diagonal, FanIn, Unstructured)
