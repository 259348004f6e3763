"""Judges that are not the reward: what they say of decoded images, a policy was not tuned for.

A judge is a pure function of (params, pixels (B, H, W, 3) in [0, 1], token ids (B, T)) -> (B,), jitted and
differentiable in the pixels; `judges.clip.Judge` holds one with its weights.
"""

from typing import Literal

JudgeName = Literal["clip", "pickscore", "hpsv2", "aesthetic"]
