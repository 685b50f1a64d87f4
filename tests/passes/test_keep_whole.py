from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from padst_compiler.passes.keep_whole import KeepWhole
from padst_compiler.sparsify import sparsify
from padst_compiler.training import harden

Rewrite = Callable[..., Any]
SUM = "aten.add.Tensor"
VALUES, INDICES = torch.randn(6, 1, 8, 8), torch.arange(6, dtype=torch.int32)[:, None] % 2


def linear(x: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = torch.ops.padst.block_linear(x, VALUES, INDICES, None, 48)
    return y + bias


def kept(result: Any) -> list[str]:
    nodes = [n for n in result.graph.nodes if "force_stride_order" in str(n.target)]
    assert all(n.args[1] == [*n.meta["val"].stride()] for n in nodes)
    return [n.args[0].target.__name__.split(".")[0] for n in nodes]


PARTS: dict[str, Callable[[Tensor], object]] = {
    "unbind": lambda y: y.view(4, 3, 2, 8).permute(1, 2, 0, 3).unbind(0),
    "chunk": lambda y: y.chunk(3, dim=-1),
    "split": lambda y: y.split((16, 32), dim=-1),
    "slice": lambda y: y[:, 16:].relu(),
    "a sum that is read twice": lambda y: y.relu() * y.sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_read_in_parts_or_twice_is_kept_whole(rewrite: Rewrite, name: str) -> None:
    def run(x: Tensor, bias: Tensor) -> object:
        return PARTS[name](linear(x, bias))

    result = rewrite(KeepWhole(), run, torch.randn(4, 16), torch.randn(48))
    assert kept(result) == ["add"]


def test_a_residual_sum_is_kept_and_its_terms_are_not(rewrite: Rewrite) -> None:
    def run(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = residual.exp() + linear(x, bias)
        return y + y.mean(-1, keepdim=True)

    result = rewrite(KeepWhole(), run, torch.randn(4, 16), torch.randn(48), torch.randn(4, 48))
    assert kept(result) == ["add"]
    (node,) = [n for n in result.graph.nodes if "force_stride_order" in str(n.target)]
    assert [str(n.target) for n in node.args[0].all_input_nodes] == ["aten.exp.default", SUM]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, bias: linear(x, bias).relu(),  # read once
        lambda x, bias: (x.view(4, 2, 8)[:, INDICES[:2, 0].long()], bias),  # an input
        lambda x, bias: (x.exp().chunk(2, dim=-1), bias),  # no kernel
        lambda x, bias: torch.ops.padst.block_linear(x, VALUES, INDICES, None, 48).chunk(3, -1),
        lambda x, bias: (linear(x, bias) @ torch.ones(48, 48)).chunk(3, -1),  # another operator
    ],
    ids=["once", "an input", "no kernel", "bare", "product"],
)
def test_all_else_is_left_alone(rewrite: Rewrite, function: Callable[..., Any]) -> None:
    result = rewrite(KeepWhole(), function, torch.randn(4, 16), torch.randn(48))
    assert result.before == result.after


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("what", ["gelu", "layer_norm"])
def test_what_is_read_through_a_table_is_kept_whole(
    rewrite: Rewrite, what: str, view: bool
) -> None:
    table = torch.tensor([1, 0, 1])

    def run(x: Tensor) -> Tensor:
        y = nn.functional.gelu(x) if what == "gelu" else nn.functional.layer_norm(x, (16,))
        y = y.view(4, 2, 8).transpose(0, 1) if view else y
        return y.index_select(0, table)

    (node,) = [
        n
        for n in rewrite(KeepWhole(), run, torch.randn(4, 16)).graph.nodes
        if "force_stride_order" in str(n.target)
    ]
    source = node.args[0]
    assert "gelu" in str(source.target) or "native_layer_norm" in str(source.args[0].target)


def test_symbolic_strides_are_left_alone(rewrite: Rewrite) -> None:
    def run(x: Tensor, bias: Tensor) -> Any:
        return linear(x, bias).chunk(3, dim=-1)

    x = torch.randn(2, 5, 16)
    assert kept(rewrite(KeepWhole(), run, x[0], torch.randn(48), dynamic=True)) == ["add"]
    assert kept(rewrite(KeepWhole(), run, x, torch.randn(48), dynamic=True)) == []


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(64), nn.Linear(64, 192)
        self.proj = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).view(2, -1, 3, 4, 16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        result: Tensor = x + self.norm(x)
        return result


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_packed_projection_is_not_copied(dynamic: bool) -> None:
    model, x = Attention().eval(), torch.randn(2, 9, 64)
    harden(sparsify(model, structure="block:16", sparsity=0.5, permutation="random"))
    options: dict[str, Any] = {"verify": "strict", "kernels": "sparse"}
    fast = torch.compile(model, backend="padst", options=options, dynamic=dynamic)
    with torch.no_grad():
        y, (code, *_) = run_and_get_code(fast, x)
        torch.testing.assert_close(y, model(x))
        longer = torch.randn(2, 11, 64)
        torch.testing.assert_close(fast(longer), model(longer))
    call = code[code.index("def call(") :]
    assert dynamic or "reinterpret_tensor" in call[call.index("flash_attention") :]
