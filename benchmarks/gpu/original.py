"""`dinalrm_jax/timing/reference.py` with PyTorch's attention pinned to cuDNN's kernel; the same arguments and lines."""

import pathlib
import runpy
import sys

import torch

import dinalrm_jax

if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} has no CUDA device here")
    for kernel in ("flash", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    script = pathlib.Path(dinalrm_jax.__file__).parent / "timing" / "reference.py"
    runpy.run_path(str(script), run_name="__main__")
