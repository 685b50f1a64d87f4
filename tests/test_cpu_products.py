from typing import Any

import pytest
import torch

from padst_compiler.cpu_products import products_of


@pytest.mark.parametrize(
    ("capabilities", "bf16", "fp16"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, ("amx",), ()),
        ({"architecture": "x86_64", "avx512_fp16": True}, (), ("avx512",)),
        ({"architecture": "aarch64"}, ("unknown",), ("unknown",)),
        (None, ("unknown",), ("unknown",)),  # a torch that does not tell
    ],
)
def test_what_a_cpu_multiplies(
    capabilities: dict[str, Any] | None,
    bf16: tuple[str, ...],
    fp16: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert products_of(torch.bfloat16) == bf16
    assert products_of(torch.float16) == fp16
