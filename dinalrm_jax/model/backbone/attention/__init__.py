"""`softmax(q k^T / sqrt(d)) v`: one contract, a kernel a file.

A kernel takes query (B, N, heads, d), key and value (B, M, heads, d) of any N and M, and gives (B, N, heads, d) in the
values' dtype. None but "xla" holds the logits of all tokens, forward or backward; those that remember their output for
`remat="attention"` name it `SAVED`.
"""

from dinalrm_jax.model.backbone.attention.attend import attend, check_kernel, kernel_for

__all__ = ["attend", "check_kernel", "kernel_for"]
