import torch

from padst_compiler.kernel_ops import IN_MAP
from padst_compiler.kernels import CANDIDATES, PLAIN, PORTABLE, install
from padst_compiler.kernels.registry import COMPILED
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import STRUCTURES

OFFERED = {
    "block_linear": "micro_kernel bf16_pairs bf16_zipped bmm_token_major bmm_feature_major",
    "block_linear_dx": "micro_kernel bf16_pairs bmm_scatter",
    "block_linear_dw": "micro_kernel bf16_pairs bmm",
    "nm_linear": "micro_kernel feature_kernel embedding_bag",
    "diagonal_linear": "micro_kernel embedding_bag",
    "diagonal_linear_dx": "micro_kernel",
    "fan_in_linear": "micro_kernel feature_kernel embedding_bag",
    "nm_linear_dx": "feature_kernel",
    "nm_linear_dw": "micro_kernel feature_kernel",
    "fan_in_linear_dx": "feature_kernel",
    "fan_in_linear_dw": "feature_kernel",
    "diagonal_linear_dw": "micro_kernel",
}


def test_every_operator_has_the_formulations_that_were_timed_and_dense_last() -> None:
    for ops in (LINEAR, LINEAR_DX, LINEAR_DW):
        for kind in STRUCTURES:
            op = ops[kind.name]
            *sparse, dense = [way.name for way in CANDIDATES[op]]
            assert sparse == OFFERED.get(op.name().removeprefix("padst::"), "").split()
            assert dense == "dense"


def test_plain_ways_are_those_that_need_no_compiler() -> None:
    made = {"micro_kernel", "feature_kernel", "bf16_pairs", "bf16_zipped"}
    for op, ways in CANDIDATES.items():
        plain = [way.name for way in PLAIN[op]]
        assert [way.name for way in ways if way.name not in made] == plain


def test_what_leaves_as_onnx_is_standard_operators() -> None:
    for op, ways in PORTABLE.items():
        names = [way.name for way in ways]
        assert names == (["gather_matmul"] if op is LINEAR["block"] else []) + ["dense"]


def test_inductor_lowers_every_operator_that_takes_maps_and_has_a_kernel() -> None:
    from torch._inductor.lowering import lowerings

    install()
    known = {op for module in COMPILED for op in module.LOWERINGS}
    assert known <= set(lowerings)
    for op in IN_MAP:
        name = op.name().removeprefix("padst::")
        turned = "_dx" in name and name.startswith(("fan_in", "nm"))
        assert (op in known) is (name.startswith("block") or "sums" in name or turned)
    assert torch.ops.padst.permute.default not in known
