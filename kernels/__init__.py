"""How a device runs one operator: formulations that Inductor compiles well, and kernels of ours."""

from padst_compiler.kernels.gpu_eager import run as on_gpu
from padst_compiler.kernels.registry import CANDIDATES, DENSE, PLAIN, PORTABLE, install

__all__ = ["CANDIDATES", "DENSE", "PLAIN", "PORTABLE", "install", "on_gpu"]
