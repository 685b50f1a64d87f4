"""Growth methods: how masks move while a model trains. One file each; ``METHODS`` names them."""

from __future__ import annotations

from padst_compiler.methods.base import Job, Method, NonFiniteGradientWarning
from padst_compiler.methods.dynadiag import DynaDiag
from padst_compiler.methods.gmp import GMP
from padst_compiler.methods.mest import Mest
from padst_compiler.methods.rigl import RigL
from padst_compiler.methods.set import SET
from padst_compiler.methods.srigl import SRigL
from padst_compiler.methods.static import Static

__all__ = ["GMP", "METHODS", "SET", "DynaDiag", "Job", "Mest", "Method", "NonFiniteGradientWarning"]
__all__ += ["RigL", "SRigL", "Static"]

METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (RigL, SRigL, SET, Mest, GMP, DynaDiag, Static)
}
