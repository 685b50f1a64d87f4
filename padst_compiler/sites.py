"""Sites: every linear weight of a model, where it is, who shares it, and what stands in the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from padst_compiler.config import SparseConfig
from padst_compiler.layers import SparseLayer
from padst_compiler.obstacles import Found, find_weight, obstacle
from padst_compiler.ownership import SUFFIX, child_name, owned
from padst_compiler.parameter import matrix_shape
from padst_compiler.structures import Shape, Structure
from padst_compiler.tensors import storage_key, tensors_in
from padst_compiler.tracer import Trace, Use

__all__ = ["Site", "discover", "site_of_parameter"]


@dataclass
class Site:
    """One linear weight: what it is, and what is decided for it.

    ``kind`` is "linear", "conv1d" (Hugging Face's), "conv1x1", "conv2d" (of k x k, seen as
    ``(o, i * kh * kw)``) or "sparse" (a sparse layer already); where the code that reads the
    weight stays as it is, "mha" (a packed projection), "conv" (grouped, transposed, in one or three
    dimensions), or "functional" (anything else: a raw parameter in a product, a layer with a
    forward of its own, what stands below a weight norm).
    """

    name: str  # of the module; of the parameter where no linear module owns it
    kind: str
    weights: int
    shape: Shape | None = None
    names: tuple[str, ...] = ()  # with all aliases
    module: nn.Module | None = None  # that becomes sparse, or whose parameter does
    parameter: str = ""  # the weight's qualified name
    columns: tuple[int, ...] = ()  # the parameter's axes that are inputs, where its code stays
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
    exempt: bool = False  # an output head or the like, dense by default
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
    def attribute(self) -> str:
        """The weight's name in its module."""
        return self.parameter.rpartition(".")[2] or "weight"

    @property
    def layers(self) -> tuple[str, ...]:
        """The names that the site has, or gets, as a sparse layer."""
        if not self.columns:
            return self.names
        below = self.parameter.removeprefix(self.names[0]).removeprefix(".")
        return tuple(child_name(_join(name, below) if below else name) for name in self.names)

    @property
    def permuted_size(self) -> int:
        """The width of the side that the permutation acts on."""
        assert self.shape is not None
        return self.shape.in_features if self.side == "input" else self.shape.out_features


def discover(model: nn.Module, traced: Trace | None = None) -> list[Site]:
    """Return the sites of ``model`` in the order of its parameters, each once.

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
    # nn.MultiheadAttention reads the weight of its out_proj without calling it.
    read = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    sites = [s for m, names in aliases.items() for s in _sites_of(m, names, m in read)]
    if traced is not None:
        sites += _count_uses(model, sites, traced)
    _find_ties(model, sites)
    _find_holders(model, sites)
    order = {n: at for at, (n, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return sorted(sites, key=lambda site: order.get(site.parameter, len(order)))


def site_of_parameter(
    model: nn.Module, layers: Sequence[str], columns: Sequence[int]
) -> Site | None:
    """Return the site of a parameter that only a run would find; None where there is none.

    Args:
        model: holds it.
        layers: the names of the sparse layer that it becomes.
        columns: its axes that are inputs.
    """
    names = [layer.removesuffix(SUFFIX) for layer in layers]
    path, _, attribute = names[0].rpartition(".")
    owner = dict(model.named_modules(remove_duplicate=False)).get(path)
    if owner is None or owner._parameters.get(attribute) is None:
        return None
    return _site(names, Found("functional", owner, "", tuple(columns)), None)


def _sites_of(module: nn.Module, names: list[str], read: bool) -> Iterator[Site]:
    if isinstance(module, SparseLayer):
        yield _site(names, Found("sparse", module, "values"), module.shape)
    elif isinstance(module, nn.MultiheadAttention):
        for weight in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if module._parameters.get(weight) is not None:
                paths = [_join(name, weight) for name in names]
                yield _site(paths, Found("mha", module, "", (1,)), None)
    elif "weight" not in owned(module):
        found = find_weight(module, read)
        if found is not None and not owned(found.module):
            yield _site(names, found, found.shape)


def _site(names: list[str], found: Found, shape: Shape | None) -> Site:
    parameter = _join(names[0], found.below) if found.below else names[0]
    weight = found.module._parameters.get(parameter.rpartition(".")[2])
    if shape is None and weight is not None and found.columns:
        shape = matrix_shape(weight.shape, found.columns)
    size = shape.numel if shape is not None else 0 if weight is None else weight.numel()
    also = f"also named {', '.join(names[1:])}" if len(names) > 1 else ""
    site = Site(names[0], found.kind, size, shape, tuple(names), found.module, parameter)
    site.columns, site.note = found.columns, "; ".join(filter(None, [also, found.note]))
    site.obstacle = found.obstacle or obstacle(site.module, site.kind, site.attribute)
    return site


def _find_ties(model: nn.Module, sites: list[Site]) -> None:
    """Note who else holds a site's numbers: an embedding, another layer."""
    held: dict[tuple[int, int], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(storage_key(parameter), []).append(name)
    key_of = {name: key for key, names in held.items() for name in names}
    for site in sites:
        below = site.parameter.removeprefix(site.names[0]).removeprefix(".")
        own = {_join(name, below) if below else name for name in site.names}
        others = held.get(key_of[site.parameter], []) if site.parameter in key_of else []
        site.shared_with = tuple(name for name in others if name not in own)
        if site.shared_with and not site.obstacle:
            site.obstacle = f"its weight is also {', '.join(site.shared_with)}"


def _find_holders(model: nn.Module, sites: list[Site]) -> None:
    """Note who holds a parameter beside its module, in a list say: it would go on with that."""
    registries = ("_parameters", "_buffers", "_modules")
    held = {
        id(tensor): f"{type(module).__name__}.{key}"
        for module in model.modules()
        for key, value in vars(module).items()
        if key not in registries
        for tensor in tensors_in(value)
    }
    for site in sites:
        weight = None if site.module is None else site.module._parameters.get(site.attribute)
        if site.columns and not site.obstacle and id(weight) in held:
            site.obstacle = f"{held[id(weight)]} holds it too, and would go on with what it holds"


def _count_uses(model: nn.Module, sites: list[Site], traced: Trace) -> list[Site]:
    """Fill in what the trace saw; return the sites that only the trace found."""
    of_site = {name: use for use in traced.uses.values() for name in use.names}
    for site in sites:
        if (use := of_site.get(site.parameter)) is not None:
            _note(site, use)
    known = {site.parameter for site in sites}
    functional = []
    for use in traced.uses.values():
        if known.isdisjoint(use.names):
            functional.append(_note(_functional(model, use), use))
    return functional


def _note(site: Site, use: Use) -> Site:
    site.uses, site.tokens, site.flops = use.count, use.tokens, use.flops
    site.reads = use.reads
    return site


def _functional(model: nn.Module, use: Use) -> Site:
    """Return the site of a parameter that a run found in a product."""
    paths = [name.rpartition(".") for name in use.names]
    owner, attribute = model.get_submodule(paths[0][0]), paths[0][2]
    mine = [
        n
        for n, (path, _, last) in zip(use.names, paths, strict=True)
        if last == attribute and model.get_submodule(path) is owner
    ]
    columns, computed = use.columns(), ", ".join(use.ops)
    inside = matrix_shape(use.shape, columns or ())
    obstacle = ""
    if use.computed:
        obstacle = f"{type(owner).__name__} computes another matrix from it before {computed}"
    elif use.looked_up or isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        obstacle = "its rows are looked up too: an embedding"
    elif not use.met:
        obstacle = "it meets other parameters only: learned tokens, or a factor of a weight"
    elif columns is None:
        obstacle = f"{type(owner).__name__} uses it in {computed} along axes that are not clear"
    elif inside.out_features == 1:
        obstacle = "products sum over all of its axes"
    found = Found("functional", owner, "", columns or (), obstacle=obstacle)
    return _site(mine, found, inside if columns else None)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
