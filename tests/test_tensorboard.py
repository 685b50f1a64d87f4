"""Scalars for TensorBoard, through a writer that only remembers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import padst_compiler as padst


class Remember:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int | None]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        self.seen.append((tag, scalar_value, global_step))


def trained() -> tuple[nn.Module, padst.DynamicSparsity, padst.Exploration]:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 8))
    config = padst.SparseConfig("block:8", sparsity=0.75, permutation="learned")
    padst.sparsify(model, {"0": config, "2": config})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = padst.DynamicSparsity(model, optimizer, total_steps=20, update_every=2)
    explored = padst.Exploration(model, optimizer)
    for _ in range(6):
        model(torch.randn(4, 32)).square().mean().backward()
        optimizer.step()
    return model, training, explored


def test_a_training_is_written_at_its_step_and_a_report_as_it_is() -> None:
    model, training, explored = trained()
    one, two = Remember(), Remember()
    padst.TensorBoard(one)(training, explored=explored)
    padst.TensorBoard(two)(padst.report(model, training, explored), 6)
    assert one.seen == two.seen
    tags = {tag for tag, _, _ in one.seen}
    fields = ["sparsity", "nnz", "distance", "distance_modulo", "penalty", "gap", "churn"]
    fields += ["explored", "ablated", "soft_share", "requested"]
    assert tags == {f"padst/{layer}/{f}" for layer in ("0", "2") for f in fields} | {"padst/nnz"}
    assert {step for _, _, step in one.seen} == {6}
    assert all(isinstance(value, (int, float)) for _, value, _ in one.seen)


def test_another_prefix_and_step() -> None:
    _, training, _ = trained()
    writer = Remember()
    padst.TensorBoard(writer, prefix="run/sparse")(training, 99)
    assert all(tag.startswith("run/sparse/") and step == 99 for tag, _, step in writer.seen)
    assert not any("explored" in tag for tag, _, _ in writer.seen)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_the_real_writer_takes_it(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    _, training, _ = trained()
    with SummaryWriter(str(tmp_path)) as writer:
        padst.TensorBoard(writer)(training)
    assert any(tmp_path.iterdir())
