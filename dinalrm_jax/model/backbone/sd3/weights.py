"""diffusers' `SD3Transformer2DModel` weights <-> ours.

Our parameters carry diffusers' names and PyTorch's layout, so only the patch embedding differs.
"""

import numpy as np

from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.tables import Row, Table


def table(config: SD3Config, prefix: str = "") -> Table:
    """The table for a transformer of this geometry; `prefix` stands before each of our names."""
    p, channels = config.patch_size, config.in_channels
    size, half = config.pos_embed_max_size, config.inner_dim // 2

    def patch_matrix(kernel: np.ndarray) -> np.ndarray:
        return kernel.transpose(0, 2, 3, 1).reshape(kernel.shape[0], -1)  # OIHW -> (O, H W I)

    def patch_kernel(matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(-1, p, p, channels).transpose(0, 3, 1, 2)

    def split_table(table: np.ndarray) -> np.ndarray:
        if table.shape != (1, size * size, 2 * half):
            raise ValueError(f"position table {table.shape}, expected {(1, size * size, 2 * half)}")
        grid = table.reshape(size, size, 2 * half)
        by_column, by_row = grid[0, :, :half], grid[:, 0, half:]
        if not ((grid[..., :half] == by_column).all() and (grid[..., half:] == by_row[:, None]).all()):
            raise ValueError("not a sin-cos table: its left half must depend on the column only, its right on the row")
        return np.stack([by_column, by_row])

    def join_table(tables: np.ndarray) -> np.ndarray:
        by_column, by_row = tables
        halves = np.broadcast_arrays(by_column[None], by_row[:, None])
        return np.concatenate(halves, axis=-1).reshape(1, size * size, 2 * half)

    return (
        Row("pos_embed.pos_embed", prefix + "pos_embed.pos_embed", split_table, join_table),
        Row("pos_embed.proj.weight", prefix + "pos_embed.proj.weight", patch_matrix, patch_kernel),
        Row("{}", prefix + "{}"),
    )


def unused_by_truncation(num_blocks: int) -> str:
    """Pattern of the diffusers names that a model of the first `num_blocks` blocks leaves alone."""
    kept = "|".join(str(i) for i in range(num_blocks))
    return rf"(norm_out|proj_out)\..+|transformer_blocks\.(?!(?:{kept})\.)\d+\..+"
