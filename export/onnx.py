"""ONNX: a folded graph in standard operators, checked in onnxruntime before the file appears.

Block layers run as a gather of feature rows and one batched MatMul, the fastest standard form in
onnxruntime; the other structures as dense products (no standard form of theirs beats dense there).
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["OPSET", "ExportReport", "FoldedModule", "quiet", "write_onnx"]

OPSET = 21


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        nodes: operator type to count.
        size: bytes of the file.
        opset: of the standard domain.
        ir_version: of the file.
        difference: largest absolute difference to PyTorch in onnxruntime, over the batches checked.
        batches: the batch sizes that were checked.
    """

    path: Path
    nodes: dict[str, int]
    size: int
    opset: int
    ir_version: int
    difference: float
    batches: tuple[int, ...]

    @property
    def gathers(self) -> int:
        """Gather nodes in the file, those of block layers and embeddings among them."""
        return self.nodes.get("Gather", 0)

    def __str__(self) -> str:
        """One paragraph."""
        nodes = ", ".join(f"{count} {kind}" for kind, count in sorted(self.nodes.items()))
        return (
            f"{self.path}: {self.size / 1e6:.2f} MB, opset {self.opset}, IR {self.ir_version}, "
            f"largest difference to PyTorch {self.difference:.1e} (batch {self.batches}); {nodes}"
        )


class FoldedModule(nn.Module):
    """A main graph with everything that was frozen as constants: a function of the inputs only."""

    def __init__(self, main: fx.GraphModule, constants: dict[int, Tensor], total: int) -> None:
        """Bind ``constants`` (by position among the ``total`` placeholders of ``main``)."""
        super().__init__()
        self.main = main
        self._names = {position: f"constant_{position}" for position in constants}
        for position, name in self._names.items():
            self.register_buffer(name, constants[position].detach().contiguous())
        self._total = total

    def forward(self, *inputs: Any) -> Any:
        """Run the main graph."""
        feed = iter(inputs)
        arguments = [
            getattr(self, self._names[i]) if i in self._names else next(feed)
            for i in range(self._total)
        ]
        results = self.main(*arguments)
        single = isinstance(results, tuple | list) and len(results) == 1
        return results[0] if single else tuple(results)


def write_onnx(
    folded: FoldedModule,
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool,
    tolerance: float,
) -> ExportReport:
    """Export, check in onnxruntime, then put the file in its place.

    Args:
        folded: takes ``inputs`` and returns a tensor or a tuple of tensors.
        reference: the model in PyTorch, on the same inputs.
        inputs: example tensors; with ``dynamic_batch`` their first axis is the batch.
        path: where the file goes; an old file stays if anything fails.
        dynamic_batch: leave the first axis of every input free.
        tolerance: largest difference allowed, relative to the largest output.

    Raises:
        ImportError: the ``[onnx]`` extra is not installed.
        RuntimeError: onnxruntime disagrees with PyTorch.
    """
    onnx, runtime = _requirements()
    path = Path(path)
    example = tuple(_at_least_two(t) if dynamic_batch else t for t in inputs)
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch", min=1)
        shapes = (tuple({0: batch} for _ in example),)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            folded, example, dynamo=True, dynamic_shapes=shapes, opset_version=OPSET, verbose=False
        )
    assert program is not None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        program.save(str(draft))
        model = onnx.load(str(draft))
        onnx.checker.check_model(str(draft))
        session = runtime.InferenceSession(str(draft), providers=["CPUExecutionProvider"])
        checks = [tuple(inputs)]
        if dynamic_batch:
            checks += [tuple(_with_batch(t, size) for t in inputs) for size in (1, 3)]
        difference = max(_difference(session, reference, case, tolerance) for case in checks)
        del session
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    return ExportReport(
        path=path,
        nodes=dict(Counter(node.op_type for node in model.graph.node)),
        size=path.stat().st_size,
        opset=next(o.version for o in model.opset_import if o.domain == ""),
        ir_version=model.ir_version,
        difference=difference,
        batches=tuple(int(case[0].shape[0]) if case[0].dim() else 1 for case in checks),
    )


def _requirements() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise ImportError(
            f"Expected onnx, onnxscript and onnxruntime. Got: {error}. "
            'Install them with pip install "padst-compiler[onnx]".'
        ) from error
    return onnx, onnxruntime


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the exporter's own deprecation notes, and its remarks that torchvision is missing."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    log.addFilter(_drop)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.removeFilter(_drop)


def _drop(record: logging.LogRecord) -> bool:
    return "torchvision" not in record.getMessage()


def _difference(
    session: Any, reference: Callable[..., Any], inputs: tuple[Tensor, ...], tolerance: float
) -> float:
    names = [i.name for i in session.get_inputs()]
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
    results = [torch.from_numpy(r) for r in session.run(None, feed)]
    with torch.no_grad():
        expected = [
            t for t in torch.utils._pytree.tree_leaves(reference(*inputs)) if isinstance(t, Tensor)
        ]
    worst = 0.0
    for one, two in zip(expected, results, strict=True):
        difference = float((one.cpu().double() - two.double()).abs().max()) if one.numel() else 0.0
        scale = float(one.abs().max()) if one.numel() else 0.0
        if not difference <= tolerance * max(scale, 1.0):
            raise RuntimeError(
                f"Expected onnxruntime to agree with PyTorch within {tolerance:.0e}. Got a "
                f"difference of {difference:.2e} on outputs up to {scale:.2e}. No file was "
                "written; pass a larger tolerance for a half-precision model, or report the model."
            )
        worst = max(worst, difference)
    return worst


def _at_least_two(tensor: Tensor) -> Tensor:
    """Return a batch of two or more: torch.export would make a batch of one a constant."""
    return tensor if tensor.shape[0] > 1 else tensor.repeat(2, *([1] * (tensor.dim() - 1)))


def _with_batch(tensor: Tensor, size: int) -> Tensor:
    repeats = -(-size // tensor.shape[0])
    return tensor.repeat(repeats, *([1] * (tensor.dim() - 1)))[:size]
