"""Sites: every linear weight of a model, where it is, who shares it, and what stands in the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from padst_compiler.config import SparseConfig
from padst_compiler.layers import SparseLayer
from padst_compiler.obstacles import obstacle
from padst_compiler.structures import Shape, Structure
from padst_compiler.tensors import storage_key
from padst_compiler.tracer import Trace

__all__ = ["Site", "discover"]


@dataclass
class Site:
    """One linear weight: what it is, and what is decided for it.

    ``kind`` is "linear", "conv1d" (Hugging Face's), "conv1x1", "conv2d" (of k x k, seen as
    ``(o, i * kh * kw)``), "mha" (a packed projection),
    "functional" (a raw parameter in a product) or "sparse" (a sparse layer already).
    """

    name: str  # of the module; of the parameter where no linear module owns it
    kind: str
    weights: int
    shape: Shape | None = None
    names: tuple[str, ...] = ()  # with all aliases
    module: nn.Module | None = None
    parameter: str = ""  # the weight's qualified name
    shared_with: tuple[str, ...] = ()  # other names of the same numbers
    obstacle: str = ""  # why it cannot become sparse; empty where it can
    note: str = ""
    # what the trace saw
    uses: int = 0
    tokens: int = 0
    flops: int = 0
    reads: tuple[str, ...] = ()  # the tensors that it was applied to, one word each
    # what the plan decides
    decision: str = "dense"
    reason: str = ""
    requested: bool = False
    refused: bool = False  # requested, but not possible
    config: SparseConfig | None = None
    structure: Structure | None = None
    kept: int = 0
    sparsity: float = 0.0  # asked for
    actual_sparsity: float = 0.0  # reached
    permutation: str = "none"
    side: str = "input"
    shares: str = ""  # the site whose permutation it uses too

    @property
    def label(self) -> str:
        """The name to print; the model itself is "(root)"."""
        return self.name or "(root)"

    @property
    def permuted_size(self) -> int:
        """The width of the side that the permutation acts on."""
        assert self.shape is not None
        return self.shape.in_features if self.side == "input" else self.shape.out_features


def discover(model: nn.Module, traced: Trace | None = None) -> list[Site]:
    """Return the sites of ``model`` in the order of its modules, each once.

    Args:
        model: any module.
        traced: a run of it; adds counts, and parameters in products outside linear modules.

    Raises:
        ValueError: a lazy module does not know its sizes yet.

    Example:
        >>> [(s.name, str(s.shape)) for s in discover(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))]
        [('0', '8x4')]
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"Expected initialised parameters. Got {name!r} of a lazy module. "
                "Run the model once on a batch first."
            )
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(module, []).append(name)
    sites = [site for module, names in aliases.items() for site in _sites_of(module, names)]
    _find_ties(model, sites)
    _find_readers(model, sites)
    return sites if traced is None else [*sites, *_count_uses(model, sites, traced)]


def _sites_of(module: nn.Module, names: list[str]) -> Iterator[Site]:
    if isinstance(module, nn.MultiheadAttention):
        packed = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        for weight in packed:
            held = module._parameters.get(weight)
            if held is not None:
                paths = tuple(_join(name, weight) for name in names)
                shape = Shape(*held.shape)
                why = "nn.MultiheadAttention reads its packed projection itself"
                yield Site(paths[0], "mha", shape.numel, shape, paths, None, paths[0], obstacle=why)
        return
    found = _kind_of(module)
    if found is None:
        return
    kind, shape = found
    yield Site(
        names[0],
        kind,
        shape.numel,
        shape,
        tuple(names),
        module,
        _join(names[0], "values" if kind == "sparse" else "weight"),
        obstacle=obstacle(module, kind),
        note=f"also named {', '.join(names[1:])}" if len(names) > 1 else "",
    )


def _kind_of(module: nn.Module) -> tuple[str, Shape] | None:
    if isinstance(module, SparseLayer):
        return "sparse", module.shape
    if isinstance(module, nn.Linear):
        return "linear", Shape(module.out_features, module.in_features)
    weight = module._parameters.get("weight")
    # Known by name, so that transformers need not be installed.
    if type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2:
        inputs, outputs = weight.shape
        if getattr(module, "nf", None) == outputs and getattr(module, "nx", inputs) == inputs:
            return "conv1d", Shape(outputs, inputs)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        point, kernel = set(module.kernel_size) == {1}, module.kernel_size
        patch = module.in_channels // module.groups * math.prod(kernel)
        if point or isinstance(module, nn.Conv2d):
            return "conv1x1" if point else "conv2d", Shape(module.out_channels, patch, kernel)
    return None


def _find_ties(model: nn.Module, sites: list[Site]) -> None:
    """Note who else holds a site's numbers: an embedding, another layer."""
    held: dict[tuple[int, int], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(storage_key(parameter), []).append(name)
    key_of = {name: key for key, names in held.items() for name in names}
    for site in sites:
        last = site.parameter.rpartition(".")[2]
        own = {_join(name, last) for name in site.names} | set(site.names)
        others = held.get(key_of[site.parameter], []) if site.parameter in key_of else []
        site.shared_with = tuple(name for name in others if name not in own)
        if site.shared_with and not site.obstacle:
            site.obstacle = f"its weight is also {', '.join(site.shared_with)}"


def _find_readers(model: nn.Module, sites: list[Site]) -> None:
    """Note modules that read a child's weight without calling the child."""
    attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    fast = {id(child) for m in encoders for child in (m.linear1, m.linear2)}
    for site in sites:
        if id(site.module) in attention and not site.obstacle:
            site.obstacle = "nn.MultiheadAttention reads its weight without calling it"
        if id(site.module) in fast:
            off = "torch.backends.mha.set_fastpath_enabled(False)"
            hint = f"dense in its encoder's eval fast path; {off} avoids it"
            site.note = "; ".join(filter(None, [site.note, hint]))


def _count_uses(model: nn.Module, sites: list[Site], traced: Trace) -> list[Site]:
    """Fill in what the trace saw; return the sites that only the trace found."""
    of_site = {name: use for use in traced.uses.values() for name in use.names}
    for site in sites:
        use = of_site.get(site.parameter)
        if use is not None:
            site.uses, site.tokens, site.flops = use.count, use.tokens, use.flops
            site.reads = use.reads
    known = {site.parameter for site in sites}
    functional = []
    for name, use in traced.uses.items():
        if known.isdisjoint(use.names):
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            functional.append(
                Site(
                    name,
                    "functional",
                    use.weights,
                    Shape(*use.shape) if len(use.shape) == 2 else None,
                    use.names,
                    parameter=name,
                    shared_with=use.names[1:],
                    obstacle=f"{owner} uses it in {', '.join(use.ops)} outside a linear module",
                    uses=use.count,
                    tokens=use.tokens,
                    flops=use.flops,
                )
            )
    return functional


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
