"""Write what ``report`` finds to TensorBoard, or to anything else with ``add_scalar``."""

from __future__ import annotations

from typing import Protocol

from padst_compiler.exploration import Exploration
from padst_compiler.reporting import Report, describe_layers
from padst_compiler.training import DynamicSparsity

__all__ = ["TensorBoard", "Writer"]


class Writer(Protocol):
    """What ``torch.utils.tensorboard.SummaryWriter`` has, among others."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> object:
        """Take one number."""


class TensorBoard:
    """Write one scalar per layer and number: ``padst/<layer>/<field>``.

    The fields are those of ``LayerReport``; what is not known is not written. It writes when it is
    called, which is best after an update: a soft permutation is decoded at every call.

    Args:
        writer: has ``add_scalar(tag, value, step)``; TensorBoard itself is not imported.
        prefix: the first part of every tag.

    Example:
        >>> from torch import nn
        >>> import padst_compiler as padst
        >>> class Print:
        ...     def add_scalar(self, tag, scalar_value, global_step=None):
        ...         if tag.endswith("sparsity"):
        ...             print(tag, scalar_value, global_step)
        >>> model = padst.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
        >>> TensorBoard(Print())(padst.report(model), 7)
        padst/0/sparsity 0.5 7
        padst/2/sparsity 0.5 7
    """

    def __init__(self, writer: Writer, prefix: str = "padst") -> None:
        """Keep the writer; nothing is written yet."""
        self._writer, self._prefix = writer, prefix

    def __call__(
        self,
        source: DynamicSparsity | Report,
        step: int | None = None,
        explored: Exploration | None = None,
    ) -> None:
        """Write every number of ``source``.

        Args:
            source: the controller of a training, or a report.
            step: of the numbers; by default the step of ``source``.
            explored: adds the in-time over-parameterisation rate to those of a controller.
        """
        if isinstance(source, DynamicSparsity):
            source = describe_layers(source.layers, source, explored)
        at = source.step if step is None else step
        for tag, value in source.numbers().items():
            self._writer.add_scalar(f"{self._prefix}/{tag}", value, at)
