"""Compile what Inductor generated for a GPU ahead of time: no GPU is needed, nothing runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["compiled"]

DRIVER = "triton_helpers.set_driver_to_gpu()"


def compiled(name: str, source: str, architecture: int = 90) -> dict[str, Any]:
    """Return what a kernel takes: registers, stack and shared memory in bytes, its PTX.

    Args:
        name: of the kernel.
        source: as Inductor generated it.
        architecture: 90 for Hopper.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")
        path.write_text(source.replace(DRIVER, ""))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner: Any = getattr(module, name)
        meta, config = tuner.triton_meta, tuner.configs[0]
        types = dict(meta["signature"])
        constants = dict(meta.get("constants", {}))
        missing = {key for key, kind in types.items() if kind == "constexpr"} - set(constants)
        constants |= {key: config.kwargs[key] for key in missing}
        kernel = triton.compile(
            ASTSource(tuner.fn, types, constexprs=constants, attrs=meta["configs"][0]),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        call = [str(tool), "--dump-resource-usage", str(binary)]
        said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": int(kernel.metadata.shared),
        "matrix": "wgmma" in kernel.asm["ptx"],
    }
