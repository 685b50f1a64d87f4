"""A folded graph at run time: its prologue runs once a module, and a write is noticed.

Before each call ``FrozenCall`` looks whether a tensor that the prologue read was written (version
counter) or replaced (address): then the prologue runs again. Writes through ``tensor.data`` do not
move the version counter and go unseen: use ``copy_`` under no_grad. Where the numbers of a
permutation shaped the graph, other numbers are folded anew, once: their prologue differs, and the
compiled main graph serves them if it comes out the same. Where it does not, the graph runs as it
was captured.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from padst_compiler.frozen import Split

__all__ = ["FrozenCall", "Refold"]

Refold: TypeAlias = "Callable[[Sequence[Any]], tuple[Split, list[int]] | None]"
"""Folds the captured graph for other tensors: a split with the same main graph, and the positions
of the inputs whose numbers shaped it; None where another main graph comes out."""

MOST = 256  # sets of permutations that one compiled graph is folded for


class FrozenCall:
    """A compiled main graph with its prologue's results, kept up to date.

    Dynamo runs one compiled graph for every module of a class (the blocks of a transformer), so
    permutations and results are kept per module, by the identity of the first tensor of each kind.
    """

    def __init__(
        self,
        parts: Split,
        compiled: Callable[..., Any],
        original: Callable[..., Any],
        watched: Sequence[int],
        arguments: Sequence[Any],
        refold: Refold | None = None,
    ) -> None:
        """Remember the numbers that the graph was derived from.

        Args:
            parts: the split graph.
            compiled: runs ``parts.main``.
            original: the graph as it was captured, right for any numbers.
            watched: positions of the tensors whose numbers shaped the graph (permutations).
            arguments: the present tensors, in the order of the original placeholders.
            refold: None where other numbers are not folded for.
        """
        self._compiled, self._original, self._refold = compiled, original, refold
        self._main_inputs = list(parts.main_inputs)
        self._variants = [_Variant(parts, watched, arguments)]
        self._watched = list(watched)
        self._chosen: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._warned = False

    def __call__(self, *arguments: Any) -> Any:
        """Run on the original graph's inputs."""
        variant = self._variant(arguments)
        if variant is None:
            return self._run_original(arguments)
        derived = variant.derived(arguments)
        return self._compiled(*(arguments[i] for i in self._main_inputs), *derived)

    def _variant(self, arguments: Sequence[Any]) -> _Variant | None:
        """Return what was folded for the permutations in ``arguments``; None if nothing can be."""
        if not self._watched:
            return self._variants[0]
        key = arguments[self._watched[0]]
        seen, variant = self._chosen.get(key, (None, None))
        if seen is None or not seen.holds(_at(arguments, self._watched)):
            variant = self._find(arguments)
            self._chosen[key] = (_Seen(_at(arguments, self._watched)), variant)
        chosen: _Variant | None = variant
        return chosen

    def _find(self, arguments: Sequence[Any]) -> _Variant | None:
        for variant in self._variants:
            if variant.suits(arguments):
                return variant
        if self._refold is None or len(self._variants) >= MOST:
            return None
        try:
            found = self._refold(arguments)
        except Exception as error:  # as at compile time: anything can come out of a capture
            warnings.warn(f"Other permutations could not be folded ({error}).", stacklevel=4)
            return None
        if found is None:
            return None
        parts, watched = found
        self._variants.append(_Variant(parts, watched, arguments))
        self._watched += [i for i in watched if i not in self._watched]
        return self._variants[-1]

    def _run_original(self, arguments: Sequence[Any]) -> Any:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "A permutation that was folded at compile time has changed (a new state_dict?). "
                "The unfolded graph runs for it: right, but slower. Call torch.compile again on "
                "the model after torch.compiler.reset().",
                stacklevel=3,
            )
        return self._original(*arguments)


class _Variant:
    """What depends on the numbers of one set of permutations: which they are, and the prologue."""

    def __init__(self, parts: Split, watched: Sequence[int], arguments: Sequence[Any]) -> None:
        self._prologue: fx.GraphModule | None = parts.prologue
        self._inputs = list(parts.prologue_inputs)
        self._shaped_by = {i: arguments[i].detach().clone() for i in watched}
        self._derived: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def suits(self, arguments: Sequence[Any]) -> bool:
        """Whether the numbers are those that the graph was folded for."""
        return all(torch.equal(arguments[i], table) for i, table in self._shaped_by.items())

    def derived(self, arguments: Sequence[Any]) -> Sequence[Tensor]:
        """Return the prologue's results for the module that ``arguments`` belong to."""
        if self._prologue is None:
            return ()
        key = arguments[self._inputs[0]]
        seen, derived = self._derived.get(key, (None, ()))
        if seen is None or not seen.holds(_at(arguments, self._inputs)):
            now = _Seen(_at(arguments, self._inputs))
            with torch.no_grad():
                derived = self._prologue(*(arguments[i] for i in self._inputs))
            self._derived[key] = (now, derived)
        results: Sequence[Tensor] = derived
        return results


def _at(arguments: Sequence[Any], positions: Sequence[int]) -> list[Tensor]:
    return [arguments[position] for position in positions]


class _Seen:
    """Which tensors were seen, where their numbers lay and how often they had been written to."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [weakref.ref(t) for t in tensors]
        self._places = [t.data_ptr() for t in tensors]
        self._versions = [t._version for t in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, alive and unwritten since; asked in every call."""
        return (
            self._versions == [t._version for t in tensors]
            and self._places == [t.data_ptr() for t in tensors]
            and all(seen() is t for seen, t in zip(self._tensors, tensors, strict=True))
        )
