import torch

from padst_compiler.kernel_ops import IN_MAP
from padst_compiler.kernels import CANDIDATES, PLAIN, PORTABLE, install
from padst_compiler.kernels.registry import COMPILED, GPU
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import STRUCTURES

OFFERED = {
    "block_linear": "micro_kernel bf16_pairs bf16_zipped triton bmm_token_major bmm_feature_major",
    "block_linear_dx": "micro_kernel bf16_pairs triton bmm_scatter",
    "block_linear_dw": "micro_kernel bf16_pairs triton bmm",
    "nm_linear": "micro_kernel feature_kernel semi_structured triton_narrow triton embedding_bag",
    "diagonal_linear": "micro_kernel triton_sorted triton embedding_bag",
    "diagonal_linear_dx": "micro_kernel triton",
    "fan_in_linear": "micro_kernel feature_kernel triton_narrow triton embedding_bag",
    "nm_linear_dx": "feature_kernel triton",
    "nm_linear_dw": "micro_kernel feature_kernel triton",
    "fan_in_linear_dx": "feature_kernel triton",
    "fan_in_linear_dw": "feature_kernel triton",
    "diagonal_linear_dw": "micro_kernel triton",
}


def test_every_operator_has_the_formulations_that_were_timed_and_dense_last() -> None:
    for ops in (LINEAR, LINEAR_DX, LINEAR_DW):
        for kind in STRUCTURES:
            op = ops[kind.name]
            *sparse, dense = [way.name for way in CANDIDATES[op]]
            assert sparse == OFFERED.get(op.name().removeprefix("padst::"), "").split()
            assert dense == "dense"


def test_plain_ways_are_those_that_need_no_compiler() -> None:
    made = {
        "micro_kernel",
        "feature_kernel",
        "bf16_pairs",
        "bf16_zipped",
        "semi_structured",
        "triton",
        "triton_narrow",
        "triton_sorted",
    }
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
    on_cpu, on_gpu = ({op for m in way for op in m.LOWERINGS} for way in (COMPILED, GPU))
    assert on_cpu | on_gpu <= set(lowerings)
    for op in IN_MAP:
        name = op.name().removeprefix("padst::")
        turned = "_dx" in name and name.startswith(("fan_in", "nm"))
        inverse, sums = name.endswith("_into"), "sums" in name
        assert (op in on_cpu) is (not inverse and (name.startswith("block") or sums or turned))
        made = not sums and not name.startswith(("block_pairs", "unstructured"))
        assert (op in on_gpu) is made
    assert torch.ops.padst.permute.default not in on_cpu | on_gpu


def test_a_gpu_has_a_kernel_for_every_structure_forward_and_backward() -> None:
    on_gpu = {op for module in GPU for op in module.LOWERINGS}
    for kind in STRUCTURES:
        ops = {ways[kind.name] for ways in (LINEAR, LINEAR_DX, LINEAR_DW)}
        assert ops <= on_gpu or (kind.name == "unstructured" and not ops & on_gpu)
