"""What an optimiser remembers moves with the weights it belongs to."""

import pytest
import torch
from torch import nn

from padst_compiler.memory import Memory


def trained(shape: tuple[int, ...]) -> tuple[nn.Parameter, torch.optim.Adam]:
    values = nn.Parameter(torch.randn(shape))
    optimizer = torch.optim.Adam([values], lr=0.1)
    values.grad = torch.randn(shape)
    optimizer.step()
    return values, optimizer


def test_forgetting_zeroes_whole_units() -> None:
    values, optimizer = trained((2, 3, 4))
    changed = torch.tensor([[True, False, False], [False, False, True]])
    Memory(optimizer).forget(values, changed)
    state = optimizer.state[values]
    for tensor in (values, values.grad, state["exp_avg"], state["exp_avg_sq"]):
        assert tensor is not None
        assert torch.equal(tensor.eq(0).all(dim=2), changed)


@pytest.mark.parametrize("keep_state", [False, True])
def test_moving_follows_the_source(keep_state: bool) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        values, optimizer = trained((3, 4))
        source = torch.randperm(12, generator=generator)
        source[torch.rand(12, generator=generator) < 0.3] = -1
        state = optimizer.state[values]
        assert values.grad is not None
        tensors = {"values": values.detach(), "grad": values.grad, "avg": state["exp_avg"]}
        before = {name: tensor.flatten().tolist() for name, tensor in tensors.items()}
        addresses = [tensor.data_ptr() for tensor in tensors.values()]
        Memory(optimizer, keep_state).move(values, source)
        assert addresses == [tensor.data_ptr() for tensor in tensors.values()]
        for name, tensor in tensors.items():
            for number, origin in zip(tensor.flatten().tolist(), source.tolist(), strict=True):
                if origin >= 0:
                    assert number == before[name][origin]
                else:
                    assert number == 0.0 or (keep_state and name == "avg")


def test_shrinking_keeps_the_object_and_slices_the_state() -> None:
    values, optimizer = trained((2, 3))
    before, average = values.detach().clone(), optimizer.state[values]["exp_avg"].clone()
    Memory(optimizer).shrink(values, torch.tensor([[1], [5]]), (2, 1))
    assert values.grad is None and values.shape == (2, 1)
    assert values.flatten().tolist() == before.flatten()[[1, 5]].tolist()
    assert torch.equal(optimizer.state[values]["exp_avg"], average.flatten()[[1, 5]].view(2, 1))
    assert optimizer.param_groups[0]["params"][0] is values


def test_a_graph_that_is_still_alive_does_not_hinder_the_next_backward() -> None:
    values = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([values], lr=0.1)
    loss = (values * 2).sum()
    loss.backward()
    Memory(optimizer).shrink(values, torch.tensor([0, 3]), (2,))
    (values * 3).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [3.0, 3.0] and float(loss) == 8.0


def test_memory_of_another_shape_is_given_up() -> None:
    values = nn.Parameter(torch.randn(4, 6))
    optimizer = torch.optim.Adafactor([values], lr=0.1)
    values.grad = torch.randn(4, 6)
    optimizer.step()
    Memory(optimizer).shrink(values, torch.arange(12), (4, 3))
    assert values not in optimizer.state
    values.grad = torch.randn(4, 3)
    optimizer.step()


def test_dropping_leaves_the_group() -> None:
    values, optimizer = trained((2, 2))
    Memory(optimizer).drop(values)
    assert optimizer.param_groups[0]["params"] == [] and values not in optimizer.state
