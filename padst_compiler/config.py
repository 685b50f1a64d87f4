"""What is asked for: one frozen config, or a mapping from site names to configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from padst_compiler.distribution import DISTRIBUTIONS
from padst_compiler.relaxations.spelling import parse as parse_permutation
from padst_compiler.structure_text import describe, parse_structure
from padst_compiler.structures import Diagonal, Structure
from padst_compiler.text import suggest

__all__ = ["ConfigMap", "SparseConfig", "describe", "parse_structure"]

VERSION = 1
_CHOICES = {
    "init": ("random", "magnitude"),
    "side": ("auto", "input", "output"),
    "distribution": tuple(DISTRIBUTIONS),
}


@dataclass(frozen=True)
class SparseConfig:
    """What a layer becomes.

    ``structure`` may be given as text and is a ``Structure`` afterwards (``family`` has its type).

    Args:
        structure: the family of masks, as ``parse_structure`` reads it.
        sparsity: fraction of zeros, ``0 <= sparsity < 1``; a structure's own sizes (2:4) win.
        permutation: "none", "random" (fixed), "learned" (full logits, low rank for wide sides), or
            a form of ``relaxations``: "sinkhorn", "gumbel", "autoshuffle", "low_rank",
            "low_rank:16", "clos", "clos:2", "blockwise", "blockwise:64".
        side: where the permutation acts: "input", "output", or "auto" for the narrower one.
        distribution: "uniform" or "erk", over all layers with this same config.
        seed: of the random masks and permutations; together with a layer's name it decides them.
        force_permutation: learn a permutation even where the structure leaves it nothing to learn.
        init: "random" draws the mask and rescales the dense weights under it; "magnitude" keeps the
            largest units of a trained model as they are, and finds the permutation ("learned" or
            "magnitude") that keeps most.
        start_sparsity: where method "gmp" starts, 0 with all units; None for ``sparsity`` at once.
        soft: store all units and choose softly among them (DynaDiag); structure "dynadiag" is short
            for "diagonal" with ``soft=True``.
        share: let layers of this config that read the same tensor (q, k, v; gate, up), and permute
            it on their input side, learn one permutation together; needs ``example_inputs``.
        version: of this format, in checkpoints.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value that it cannot have.

    Example:
        >>> SparseConfig("nm:2:4").structure
        NM(m=4, n=2)
    """

    structure: Structure | str = "block"
    sparsity: float = 0.9
    permutation: str = "learned"
    side: str = "auto"
    distribution: str = "uniform"
    seed: int = 0
    force_permutation: bool = False
    init: str = "random"
    start_sparsity: float | None = None
    soft: bool = False
    share: bool = False
    version: int = VERSION

    def __post_init__(self) -> None:
        """Check every field; parse the structure."""
        if self.structure == "dynadiag":
            object.__setattr__(self, "structure", "diagonal")
            object.__setattr__(self, "soft", True)
        object.__setattr__(self, "structure", parse_structure(self.structure))
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)):
            raise TypeError(
                f"Expected a number as sparsity. Got {self.sparsity!r}. Use for instance 0.9."
            )
        if not 0.0 <= self.sparsity < 1.0:  # NaN fails too
            raise ValueError(
                f"Expected 0 <= sparsity < 1. Got {self.sparsity}. "
                "Sparsity is the fraction of zeros: use 0.9 for 90 %."
            )
        object.__setattr__(self, "sparsity", float(self.sparsity))
        parse_permutation(self.permutation)
        for field in ("force_permutation", "share"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(
                    f"Expected True or False as {field}. Got {getattr(self, field)!r}. Use True."
                )
        for field, known in _CHOICES.items():
            value = getattr(self, field)
            if value not in known:
                raise ValueError(
                    f"Expected {field} {', '.join(known[:-1])} or {known[-1]}. Got {value!r}. "
                    f"{suggest(str(value), known)}"
                )
        self._check_start()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"Expected an int as seed. Got {self.seed!r}. Use for instance 0.")
        if self.version != VERSION:
            raise ValueError(
                f"Expected config version {VERSION}. Got {self.version!r}. "
                "Use the release of padst_compiler that wrote it, or write it again with this one."
            )

    def _check_start(self) -> None:
        """Check ``init``, ``start_sparsity`` and ``soft`` against the rest."""
        start = self.start_sparsity
        if start is not None and not 0.0 <= start <= self.sparsity:
            raise ValueError(
                f"Expected 0 <= start_sparsity <= sparsity = {self.sparsity}. Got {start}. "
                "Use 0.0 to start with all units."
            )
        if self.permutation == "magnitude" and self.init != "magnitude":
            raise ValueError(
                "Expected init 'magnitude' with permutation 'magnitude'. "
                f"Got init {self.init!r}. Set init='magnitude', on a trained model."
            )
        if self.soft and (self.family != Diagonal() or start is not None):
            raise ValueError(
                f"Expected structure 'diagonal' without start_sparsity for soft=True. "
                f"Got {self.structure} and {start}. Use structure='dynadiag'."
            )
        if self.init == "magnitude" and (self.soft or start is not None):
            raise ValueError(
                "Expected init 'random' with soft=True or start_sparsity. Got 'magnitude'. "
                "These start from all units: leave init out."
            )

    @property
    def family(self) -> Structure:
        """The structure, parsed."""
        assert isinstance(self.structure, Structure)
        return self.structure

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON, the structure as text."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"structure": describe(self.family)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SparseConfig:
        """Return the config that ``to_dict`` wrote.

        Args:
            fields: names and values; what is left out has its default.

        Raises:
            ValueError: a name is not a field's, or a value is not allowed.

        Example:
            >>> SparseConfig.from_dict(SparseConfig(sparsity=0.5).to_dict()).sparsity
            0.5
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(
                    f"Expected only fields of a config. Got {name!r}. {suggest(str(name), known)}"
                )
        return cls(**fields)


# Keys are qualified names of sites, names of modules around them, or "re:<regex>" for a full match;
# None leaves dense (``policy.find_config`` has the precedence).
ConfigMap: TypeAlias = SparseConfig | Mapping[str, SparseConfig | None]
