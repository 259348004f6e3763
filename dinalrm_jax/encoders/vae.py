"""diffusers' `AutoencoderKL` in Flax NNX, with its attribute names; images and latents are channels last."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.layers import Conv2d, GroupNorm, Linear

SAME = ((1, 1), (1, 1))  # padding of a 3 x 3 convolution that keeps the size
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Fields of diffusers' `AutoencoderKL` config; the defaults are Stable Diffusion 3's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    mid_block_add_attention: bool = True

    def __post_init__(self):
        odd = [width for width in self.block_out_channels if width % self.norm_num_groups]
        if odd or not self.block_out_channels:
            raise ConfigError(
                f"block_out_channels {self.block_out_channels} must be multiples of norm_num_groups "
                f"{self.norm_num_groups}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels along a side of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderKL(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Conv2d(2 * channels, 2 * channels, 1, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(channels, channels, 1, rngs=rngs) if config.use_post_quant_conv else None

    def posterior(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of `q(z | image)`.

        Args:
            images: (B, H, W, 3) in [-1, 1], sides multiples of `config.downsampling`.

        Returns:
            Two arrays (B, H/8, W/8, C) of the unscaled latent z, float32.
        """
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))

    def encode(self, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Scaled latents `(z - shift) * scale`, float32.

        Args:
            images: as for `posterior`.
            noise: (B, H/8, W/8, C) standard normal, for `z = mean + std noise`; None for the mode.
        """
        mean, std = self.posterior(images)
        z = mean if noise is None else mean + std * noise
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """(B, H/8, W/8, C) scaled latents -> (B, H, W, 3) images, in [-1, 1] up to what the decoder overshoots."""
        z = latents / self.config.scaling_factor + self.config.shift_factor
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z)


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=SAME, rngs=rngs)
        self.down_blocks = nnx.List(
            DownBlock(width_in, width, config, last=i == len(widths) - 1, rngs=rngs)
            for i, (width_in, width) in enumerate(zip((widths[0], *widths), widths))
        )
        self.mid_block = MidBlock(widths[-1], config, rngs=rngs)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=SAME, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=SAME, rngs=rngs)
        self.mid_block = MidBlock(widths[0], config, rngs=rngs)
        self.up_blocks = nnx.List(
            UpBlock(width_in, width, config, last=i == len(widths) - 1, rngs=rngs)
            for i, (width_in, width) in enumerate(zip((widths[0], *widths), widths))
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=SAME, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class DownBlock(nnx.Module):
    def __init__(self, width_in: int, width: int, config: VAEConfig, *, last: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            ResnetBlock(width_in if i == 0 else width, width, config.norm_num_groups, rngs=rngs)
            for i in range(config.layers_per_block)
        )
        self.downsamplers = nnx.List([] if last else [Downsample(width, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    def __init__(self, width_in: int, width: int, config: VAEConfig, *, last: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            ResnetBlock(width_in if i == 0 else width, width, config.norm_num_groups, rngs=rngs)
            for i in range(config.layers_per_block + 1)
        )
        self.upsamplers = nnx.List([] if last else [Upsample(width, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nnx.Module):
    def __init__(self, width: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(ResnetBlock(width, width, config.norm_num_groups, rngs=rngs) for _ in range(2))
        attends = config.mid_block_add_attention
        self.attentions = nnx.List([SpatialAttention(width, config.norm_num_groups, rngs=rngs)] if attends else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = self.resnets
        for layer in (first, *self.attentions, second):
            x = layer(x)
        return x


class ResnetBlock(nnx.Module):
    def __init__(self, width_in: int, width: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(groups, width_in, eps=EPS)
        self.conv1 = Conv2d(width_in, width, 3, padding=SAME, rngs=rngs)
        self.norm2 = GroupNorm(groups, width, eps=EPS)
        self.conv2 = Conv2d(width, width, 3, padding=SAME, rngs=rngs)
        self.conv_shortcut = None if width_in == width else Conv2d(width_in, width, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nnx.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(groups, width, eps=EPS)
        self.to_q = Linear(width, width, rngs=rngs)
        self.to_k = Linear(width, width, rngs=rngs)
        self.to_v = Linear(width, width, rngs=rngs)
        self.to_out = nnx.List([Linear(width, width, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = self.group_norm(x).reshape(len(x), -1, 1, x.shape[-1])  # one head
        out = jax.nn.dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).reshape(x.shape)


class Downsample(nnx.Module):
    """Stride 2, padded at the bottom and the right only."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = Conv2d(width, width, 3, stride=2, padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = Conv2d(width, width, 3, padding=SAME, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))
