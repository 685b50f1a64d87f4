"""Everything that is claimed of GPUs, in one run: correctness first, then times, then the goals.

    python benchmarks/gpu.py --csv gpu.csv --plots pictures      # 8 minutes on one GPU
    python benchmarks/gpu.py --only models --minutes 8
    python benchmarks/gpu.py --tiny                              # a dry run without a GPU

It is ``padst bench gpu``: what it does is in ``padst_compiler/gpu_benchmark.py``.
"""

from __future__ import annotations

import sys

from padst_compiler.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "gpu", *sys.argv[1:]]))
