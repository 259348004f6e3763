"""What devices can do, as their makers state it."""

# Dense bfloat16 peak of one device, FLOP/s, as its maker states it; for utilisation.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The stated bfloat16 peak of a device, FLOP/s; None for one that is not in the table, a CPU among them."""
    if device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device_kind]
    return next((peak for name, peak in PEAK_FLOPS.items() if name.startswith("NVIDIA") and name in device_kind), None)
