"""Layers that a GPU benchmark times: made once, launched in every way, checked against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from padst_compiler import backend
from padst_compiler.config import SparseConfig
from padst_compiler.explanation import summarise
from padst_compiler.fold import Folded
from padst_compiler.gpu_cases import Case
from padst_compiler.layers import SparseLayer, sparse_layers
from padst_compiler.sparsify import sparsify

__all__ = [
    "DTYPES",
    "Layers",
    "compiled",
    "only",
    "precision",
    "product",
    "way",
]

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}
Call = Callable[[], Any]
Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Allow tf32 in products for ``"tf32"`` and for nothing else; then all is as it was."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@dataclass
class Layers:
    """Dense and sparse layers on a device, kept to be used again.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        kept: what was made for the present layer, tokens and type.
        models: the sparse layers, of all tokens.
    """

    device: str
    kept: dict[Any, Any] = field(default_factory=dict)
    models: dict[Any, nn.Sequential] = field(default_factory=dict)
    _key: Any = None

    def dense(self, case: Case) -> tuple[nn.Linear, Tensor]:
        """Return a dense layer and tokens, seeded."""
        self._turn_to(case)
        inputs, outputs = case.layer

        def make() -> tuple[nn.Linear, Tensor]:
            return self.placed(_linear(inputs, outputs), case), self.drawn(case, inputs, 1)

        found: tuple[nn.Linear, Tensor] = self.once("dense", make)
        return found

    def sparse(self, case: Case, permutation: str = "none", side: str = "auto") -> nn.Sequential:
        """Return a model of one sparse layer.

        Raises:
            ValueError: the structure does not fit.
        """
        key = (case.layer, case.structure, case.sparsity, case.dtype, permutation, side)
        if key not in self.models:
            config = SparseConfig(
                case.structure, sparsity=case.sparsity, permutation=permutation, side=side
            )
            model = nn.Sequential(_linear(*case.layer))
            sparsify(model, config, filter_fn=lambda site: True)
            self.models[key] = self.placed(model, case)
        return self.models[key]

    def mlps(self, case: Case) -> tuple[nn.Sequential, nn.Sequential]:
        """Return an MLP whose first layer is the case's, dense and sparse.

        Raises:
            ValueError: the structure does not fit.
        """
        inputs, hidden = case.layer
        dense = nn.Sequential(_linear(inputs, hidden), nn.GELU(), _linear(hidden, inputs))
        sparse = copy.deepcopy(dense)
        config = SparseConfig(case.structure, sparsity=case.sparsity, permutation="none")
        sparsify(sparse, config, filter_fn=lambda site: True)
        return self.placed(dense, case), self.placed(sparse, case)

    def placed(self, model: Model, case: Case) -> Model:
        """Return a model in eval mode, on the device and in the case's type."""
        return model.to(self.device, DTYPES[case.dtype]).eval()

    def drawn(self, case: Case, features: int, seed: int) -> Tensor:
        """Return random features of the case's tokens, in its type."""
        seeded = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(case.tokens, features, generator=seeded, device=self.device)
        return drawn.to(DTYPES[case.dtype])

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """Return what was made under this name for the present shape, or make it.

        What fails once, fails again at once: a search for the fastest kernel takes half a minute.
        """
        if name not in self.kept:
            try:
                self.kept[name] = make()
            except Exception as failure:
                self.kept[name] = failure
        if isinstance(self.kept[name], Exception):
            raise self.kept[name]
        return self.kept[name]

    def _turn_to(self, case: Case) -> None:
        key = (case.layer, case.tokens, case.dtype)
        if key != self._key:
            self.kept.clear()
            self._key = key


def product(
    layer: SparseLayer, x: Tensor, *maps: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """Launch the kernel of a layer on tokens; ``maps`` are ``in_map`` and ``into``."""
    op = getattr(torch.ops.padst, f"{layer.structure.name}_linear").default
    given = (x, layer.values, layer.indices, bias, layer.shape.out_features)
    return backend.gpu_eager.launch(op, *given, *maps)


def compiled(
    model: nn.Module, x: Tensor, **options: Any
) -> tuple[Callable[[Tensor], Any], Callable[[], Any]]:
    """Return a model that runs through ``padst``, and a call of its compiled graph on ``x`` alone.

    Args:
        model: one graph.
        x: its input; the model runs on it once.
        options: ours and Inductor's.
    """
    graphs: list[Callable[[], Any]] = []

    def through(graph: fx.GraphModule, arguments: Sequence[Any]) -> Callable[..., Any]:
        run = backend.padst(graph, arguments, options=options)
        graphs.append(lambda: run(*arguments))
        return run

    ours = torch.compile(model, backend=through, dynamic=False)
    ours(x)
    return ours, graphs[-1]


def way(model: nn.Module, x: Any) -> str:
    """Return how the compiler runs the layers of a model, each way once, and how many are fused."""
    settings, graphs = backend.Settings(verify=False), list[Folded]()

    def record(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(backend.fold_dynamo(graph, inputs, settings))
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=record, dynamic=False)(x)
    found = summarise(graphs)
    names = list(dict.fromkeys(kernel for _, kernel, _ in found.kernels))
    fused = sum((name, state) == ("fuse_mlp", "fired") for name, _, state, _ in found.passes)
    return " ".join([*names, *([f"({fused} fused)"] if fused else [])])


def _linear(inputs: int, outputs: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Linear(inputs, outputs)


def only(model: nn.Module) -> SparseLayer:
    """Return the one sparse layer of a model."""
    (layer,) = sparse_layers(model).values()
    return layer
