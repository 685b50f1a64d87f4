"""What ``torch.compile(model, backend="padst", options=...)`` takes beside Inductor's options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from padst_compiler import compat
from padst_compiler.contest import Prefer

__all__ = ["Settings"]

_CHOICES: dict[str, tuple[object, ...]] = {
    "fold": ("safe", "off"),
    "verify": (True, False, "strict"),
    "kernels": ("auto", "dense", "sparse", "timed"),
    "codegen": ("inductor", "plain", "off"),
}
_OURS = sorted([*_CHOICES, "trace"])


@dataclass(frozen=True)
class Settings:
    """Our own compile options.

    Args:
        fold: "safe" folds what is proved; "off" leaves every permutation a gather.
        verify: compare the folded graph with the captured one in float64, and fall back to the
            captured one where something fails; "strict" raises instead.
        kernels: "sparse" or "dense" everywhere, "auto" by the cost model, or "timed": every
            formulation is verified and timed here, once. What times takes the word's place.
        codegen: "plain" generates no code: a graph runs node by node, in the ways that plain
            PyTorch is fast in. "off" does so with the ways that are chosen for Inductor.
        trace: a folder for the graph before and after every pass.

    Example:
        >>> Settings.parse({"fold": "off", "max_autotune": True})[1]
        {'max_autotune': True}
    """

    fold: str = "safe"
    verify: bool | str = True
    kernels: Prefer = "auto"
    codegen: str = "inductor"
    trace: str | None = None

    @classmethod
    def parse(
        cls, options: Mapping[str, Any] | None, mode: str | None = None
    ) -> tuple[Settings, dict[str, Any]]:
        """Split ``options`` into ours and Inductor's.

        Args:
            options: of ``torch.compile``.
            mode: its mode; those of "max-autotune" time kernels unless ``options`` say otherwise.

        Raises:
            ValueError: an unknown option or value.
        """
        ours: dict[str, Any] = {}
        theirs: dict[str, Any] = {}
        for key, value in (options or {}).items():
            if key in _CHOICES:
                if value not in _CHOICES[key]:
                    raise ValueError(
                        f"Expected option {key!r} to be one of {_CHOICES[key]}. Got {value!r}. "
                        "Leave it out for the default."
                    )
                ours[key] = value
            elif key == "trace":
                ours[key] = _folder(value)
            elif key.replace("-", "_") in compat.inductor_option_names():
                theirs[key.replace("-", "_")] = value
            else:
                raise ValueError(
                    f"Expected an option of {_OURS} or one of Inductor's. Got {key!r}. "
                    "See torch._inductor.list_options()."
                )
        generates = ours.get("codegen", "inductor") == "inductor"
        if ours.get("kernels") == "timed" and not generates:
            raise ValueError(
                "Expected generated code, which alone can be timed. Got 'kernels': 'timed' and "
                f"'codegen': {ours['codegen']!r}. Leave one of them out."
            )
        if generates and (mode or "").startswith("max-autotune"):
            ours.setdefault("kernels", "timed")
        return cls(**ours), theirs


def _folder(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(
            f"Expected option 'trace' to be the path of a folder. Got {value!r}. "
            "Leave it out to write nothing."
        )
    return str(os.fspath(value))
