"""Where the parameters of an SD3 transformer lie on a mesh."""

from jax.sharding import PartitionSpec as P

from dinalrm_jax.devices.sharding import WHOLE, Rules

# A matrix is (out, in). Into a split computation: heads and hidden units over `tensor`; out of it:
# the contracted axis over `tensor`.
INTO = r"to_[qkv]|add_[qkv]_proj|net\.0\.proj"
OUT_OF = r"to_out\.0|to_add_out|net\.2"
RULES: Rules = (
    (rf".*\.(?:{INTO})\.weight", P("tensor", "fsdp")),
    (rf".*\.(?:{INTO})\.bias", P("tensor")),
    (rf".*\.(?:{INTO})\.lora_A", P(None, "fsdp")),
    (rf".*\.(?:{INTO})\.lora_B", P("tensor", None)),
    (rf".*\.(?:{OUT_OF})\.weight", P("fsdp", "tensor")),
    (rf".*\.(?:{OUT_OF})\.lora_A", P(None, "tensor")),
    (rf".*\.(?:{OUT_OF})\.lora_B", P("fsdp", None)),
    # Modulations and embedders are used whole by every device.
    (r"(?:.*\.)?(?:linear|linear_[12]|context_embedder|proj|proj_out)\.weight", P("fsdp", None)),
    (r".*\.bias", WHOLE),
    (r".*\.norm_\w+\.weight|.*\.pos_embed", WHOLE),
)
