"""How a device runs one operator: formulations that Inductor compiles well, and kernels of ours."""

from padst_compiler.kernels import gpu_eager
from padst_compiler.kernels.registry import CANDIDATES, DENSE, PLAIN, PORTABLE, install

__all__ = ["CANDIDATES", "DENSE", "PLAIN", "PORTABLE", "gpu_eager", "install"]
