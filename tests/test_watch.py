"""The operators behind a recorder, called as the graph calls them."""

import torch

from padst_compiler.structures import FanIn, Shape
from padst_compiler.watch import FINITE, POISONED, wipe


def room(groups: int, kept: int, width: int, top: int) -> tuple[torch.Tensor, ...]:
    lists = torch.zeros(groups, width, dtype=torch.int32), torch.empty(groups, width)
    rest = torch.empty(groups, kept), torch.empty(top)
    wipe(*lists, *rest)
    return *lists, *rest, torch.zeros((), dtype=torch.int32)


def test_observing_keeps_the_best_of_an_explicit_gradient() -> None:
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        slots = FanIn().select(torch.rand(4, 9, generator=generator), 3)
        slots[seed % 4] = -1  # an ablated neuron keeps nothing
        buffers = room(4, 3, 5, 7)
        candidates, gains, active, top, status = buffers
        grad, x = torch.randn(6, 4, generator=generator), torch.randn(6, 9, generator=generator)
        armed = torch.ones((), dtype=torch.bool)
        torch.ops.padst.observe(*buffers, armed, grad, x, slots, "fan_in")
        dense = (grad.t() @ x).abs()
        mask = FanIn().mask(slots.clamp_min(0), Shape(4, 9))
        mask[seed % 4] = False
        torch.testing.assert_close(top, dense.flatten().sort(descending=True).values[:7])
        for row in range(4):
            others = dense[row][~mask[row]].sort(descending=True).values[:5]
            torch.testing.assert_close(gains[row], others)
            torch.testing.assert_close(dense[row][candidates[row].long()], others)
            kept = slots[row] >= 0
            torch.testing.assert_close(active[row][kept], dense[row][slots[row][kept].long()])
            assert not bool(active[row][~kept].any())
        assert int(status) == FINITE


def test_nothing_happens_while_disarmed_and_nothing_is_kept_of_a_nan() -> None:
    buffers = room(2, 1, 1, 0)
    slots, x = torch.zeros(2, 1, dtype=torch.int32), torch.ones(3, 4)
    grad = torch.ones(3, 2)
    torch.ops.padst.observe(*buffers, torch.tensor(False), grad, x, slots, "fan_in")
    assert int(buffers[-1]) == 0
    grad[0, 0] = torch.nan
    torch.ops.padst.observe(*buffers, torch.tensor(True), grad, x, slots, "fan_in")
    assert int(buffers[-1]) == POISONED and bool(buffers[1].isneginf().all())
