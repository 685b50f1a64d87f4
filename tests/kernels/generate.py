"""Generate code for an H200 that is not there, in a process of its own.

``python -m tests.kernels.generate [CASE ...]`` prints JSON: the code of each case, static and with
a symbolic number of tokens, and what some of it takes when compiled; with ``--tuned`` the code for
every choice that Inductor would time. Triton must not be in its interpreter here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import padst_compiler as padst
from padst_compiler.kernel_ops import BLOCK_MLP, INTO, MAPPED
from padst_compiler.kernels import install, triton_turned
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure

from .ahead import compiled
from .fake_h200 import code_of, code_of_model, h200, tuned
from .interpreted import kernels_of
from .stored import weights

TOKENS, INPUTS, OUTPUTS, SIDE = 21, 64, 96, 16
SHAPE, TURNED = Shape(OUTPUTS, INPUTS), Shape(INPUTS, OUTPUTS)
SPARSITY = 0.6

STRUCTURES: dict[str, Structure] = {
    "block": Block(SIDE),
    "fan_in": FanIn(),
    "nm": NM(16),
    "diagonal": Diagonal(),
}
linear, dx, dw = (ops["block"] for ops in (LINEAR, LINEAR_DX, LINEAR_DW))
into = INTO[MAPPED[linear]]


def stored(name: str, dtype: torch.dtype, shape: Shape = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, indices and the dense weight in float64 of a structure."""
    return weights(STRUCTURES[name], shape, dtype, SPARSITY)


def given(needs: tuple[str, ...], dtype: torch.dtype, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Return inputs by name; ``v.block`` and ``i.block`` are values and indices, w.block dense."""
    made: dict[str, Tensor] = {
        "x": torch.randn(tokens, INPUTS).to(dtype),
        "three": torch.randn(3, tokens, INPUTS).to(dtype),
        "grad": torch.randn(tokens, OUTPUTS).to(dtype),
        "bias": torch.randn(OUTPUTS).to(dtype),
        "residual": torch.randn(tokens, OUTPUTS).to(dtype),
        "in_map": torch.randperm(INPUTS),
        "into": torch.randperm(OUTPUTS),
    }
    for name in STRUCTURES:
        if f"v.{name}" in needs or f"i.{name}" in needs:
            values, indices, dense = stored(name, dtype)
            made |= {f"v.{name}": values, f"i.{name}": indices, f"w.{name}": dense}
            made["i.narrow"] = indices.to(torch.uint8)
    if "v.second" in needs:
        values, indices, dense = stored("block", dtype, TURNED)
        made |= {"v.second": values, "i.second": indices, "w.second": dense}
    return made


class Case(NamedTuple):
    """A graph of operators: what is traced, its inputs by name, and its result in float64."""

    run: Callable[..., Tensor]
    needs: tuple[str, ...]
    expected: Callable[[dict[str, Tensor]], Tensor]


BLOCK = ("v.block", "i.block")


def _mapped(made: dict[str, Tensor], name: str = "block") -> Tensor:
    y = made["x"][:, made["in_map"]] @ made[f"w.{name}"].t()
    return torch.zeros_like(y).index_copy(1, made["into"], y) + made["bias"]


def _dense(made: dict[str, Tensor], name: str = "block", x: str = "x") -> Tensor:
    return made[x] @ made[f"w.{name}"].t()


def _packed(made: dict[str, Tensor], name: str = "block") -> Tensor:
    full = made["grad"].t() @ made["x"]
    return STRUCTURES[name].pack(full, made[f"i.{name}"])


CASES: dict[str, Case] = {
    "epilogue": Case(
        lambda x, v, i, b, r: F.gelu(linear(x, v, i, None, OUTPUTS) + b) + r,
        ("x", *BLOCK, "bias", "residual"),
        lambda made: F.gelu(_dense(made) + made["bias"]) + made["residual"],
    ),
    "prologue": Case(
        lambda x, v, i, b: linear(x * 2.0, v, i, None, OUTPUTS) + b,
        ("x", *BLOCK, "bias"),
        lambda made: 2.0 * _dense(made) + made["bias"],
    ),
    "three": Case(
        lambda x, v, i: linear(x, v, i, None, OUTPUTS).relu(),
        ("three", *BLOCK),
        lambda made: _dense(made, x="three").relu(),
    ),
    "maps": Case(
        lambda x, v, i, m, to, b: into(x, v, i, OUTPUTS, m, to) + b,
        ("x", *BLOCK, "in_map", "into", "bias"),
        _mapped,
    ),
    "mlp": Case(
        lambda x, v, i, b, v2, i2: BLOCK_MLP(
            x, v, i, b, v2, i2, OUTPUTS, INPUTS, "gelu", None, None
        ),
        ("x", *BLOCK, "bias", "v.second", "i.second"),
        lambda made: F.gelu(_dense(made) + made["bias"]) @ made["w.second"].t(),
    ),
    "dx": Case(
        lambda g, v, i: dx(g, v, i, INPUTS),
        ("grad", *BLOCK),
        lambda made: made["grad"] @ made["w.block"],
    ),
    "dw": Case(lambda g, x, i: dw(g, x, i, [SIDE, SIDE]), ("grad", "x", "i.block"), _packed),
}


def _of(name: str) -> dict[str, Case]:
    forward, to_x, to_w = (ops[name] for ops in (LINEAR, LINEAR_DX, LINEAR_DW))
    unit = [INPUTS] if name == "diagonal" else []
    stored_as = (f"v.{name}", f"i.{name}")
    return {
        name: Case(
            lambda x, v, i, b: forward(x, v, i, None, OUTPUTS) + b,
            ("x", *stored_as, "bias"),
            lambda made: _dense(made, name) + made["bias"],
        ),
        f"{name}_dx": Case(
            lambda g, v, i: to_x(g, v, i, INPUTS),
            ("grad", *stored_as),
            lambda made: made["grad"] @ made[f"w.{name}"],
        ),
        f"{name}_dw": Case(
            lambda g, x, i: to_w(g, x, i, unit),
            ("grad", "x", f"i.{name}"),
            lambda made: _packed(made, name),
        ),
    }


for _name in ("fan_in", "nm", "diagonal"):
    CASES |= _of(_name)
CASES["narrow"] = Case(
    lambda x, v, i: LINEAR["nm"](x, v, i, None, OUTPUTS),
    ("x", "v.nm", "i.narrow"),
    lambda made: _dense(made, "nm"),
)

CASES["turned"] = Case(
    lambda x, v, i, b: LINEAR["fan_in"](x, v, i, None, OUTPUTS).relu() + b,
    ("x", "v.fan_in", "i.fan_in", "bias"),
    lambda made: _dense(made, "fan_in").relu() + made["bias"],
)
CASES["turned_maps"] = Case(
    lambda x, v, i, m, to, b: INTO[MAPPED[LINEAR["fan_in"]]](x, v, i, OUTPUTS, m, to) + b,
    ("x", "v.fan_in", "i.fan_in", "in_map", "into", "bias"),
    lambda made: _mapped(made, "fan_in"),
)


class Layer(nn.Module):
    """A layer of a transformer: four linear layers, two norms, attention."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        packed = self.qkv(self.norm1(x)).view(images, tokens, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.proj(y)
        result: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return result


MODELS = {
    f"{permutation}-{images}": (permutation, images)
    for permutation in ("none", "random")
    for images in (1, 64)
}
"""The layer without and with maps, for 100 tokens an image."""


def transformer(permutation: str) -> nn.Module:
    """Return the layer with blocks of 64."""
    torch.manual_seed(0)
    model = Layer().eval()
    config = padst.SparseConfig(structure="block:64", sparsity=0.75, permutation=permutation)
    padst.sparsify(model, config, filter_fn=lambda site: True)
    return padst.harden(model)


AHEAD = [
    f"{case}-bfloat16-static"
    for case in (
        "epilogue",
        "three",
        "maps",
        "mlp",
        "dx",
        "dw",
        "fan_in",
        "nm",
        "narrow",
        "diagonal",
        "turned",
        "turned_maps",
    )
]
"""What is compiled ahead of time as well."""

MANY = 70  # tokens: tiles of 128
KINDS = ("float32-static", "bfloat16-static", "float32-dynamic")


TUNED = {f"{case}-float32": MANY for case in ("epilogue", "maps", "dx")}
TUNED |= {"dx-bfloat16": MANY, "epilogue-bfloat16-few": TOKENS, "maps-float32-dynamic": MANY}
"""What has several choices, and for how many tokens."""


def _fakes(name: str, dtype: str, tokens: int) -> Callable[[], list[Tensor]]:
    needs = CASES[name].needs
    made = given(needs, getattr(torch, dtype), tokens)
    real = [made[need] for need in needs]
    return lambda: [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in real]


def _tuned(key: str, tokens: int) -> dict[str, Any]:
    """Return the code by the choice that is the fastest, what would be timed, and what it takes."""
    case, dtype, *_ = key.split("-")
    fakes, codes = _fakes(case, dtype, tokens), list[str]()
    while True:
        with tuned(fastest=len(codes)) as timed:
            codes.append(code_of(CASES[case].run, fakes, dynamic=key.endswith("dynamic")))
        if len(codes) >= len(timed.sources):
            takes = compiled(timed.name, timed.sources[-1])  # the largest tile
            return {"code": codes, **asdict(timed), "takes": takes}


def main(names: list[str]) -> None:
    """Print the code of the cases named, or of all."""
    install()
    if names == ["--tuned"]:
        with h200():
            print(json.dumps({key: _tuned(key, tokens) for key, tokens in TUNED.items()}))
        return
    found: dict[str, str] = {}
    with h200():
        for name in names or list(CASES):
            function = CASES[name].run
            for kind in KINDS:
                dtype, size = kind.split("-")
                fakes = _fakes(name, dtype, TOKENS)
                # A layer so small is never predicted to gain by a copy of x.
                pays = triton_turned.pays
                does = (lambda *_: True) if name.startswith("turned") else pays
                with mock.patch.object(triton_turned, "pays", does):
                    code = code_of(function, fakes, dynamic=size == "dynamic")
                found[f"{name}-{kind}"] = code
        for key, (permutation, images) in () if names else MODELS.items():
            found[key] = code_of_model(transformer(permutation), torch.zeros(images, 100, 256))
    ahead = {
        key: compiled(name, source)
        for key in AHEAD
        for name, source in kernels_of(found.get(key, "")).items()
        if "_tem_" in name
    }
    print(json.dumps({"code": found, "ahead": ahead}))


if __name__ == "__main__":
    main(sys.argv[1:])
