"""The wire format, against PyTorch's safetensors, and against whatever else may arrive."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from benchmarks.fuzz import mutated
from dinalrm_jax.server import protocol
from dinalrm_jax.server.protocol import Limits, RequestError
from tests.conftest import TINY
from tests.server.serving import inputs

LIMITS = Limits.of(TINY, max_rows=4)


def torch_request(rows=1, dtype=torch.float32, **changed):
    """What a PyTorch client sends, channels first."""
    latents, prompt = inputs(rows)
    tensors = {
        "latents": torch.from_numpy(latents).permute(0, 3, 1, 2).to(dtype).contiguous(),
        "prompt_embeds": torch.from_numpy(prompt.prompt_embeds).to(dtype),
        "pooled_prompt_embeds": torch.from_numpy(prompt.pooled_prompt_embeds).to(dtype),
        "u": torch.full((rows,), 0.4),
        "seeds": torch.arange(rows) - 5,
    } | changed
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_requests_of_pytorch(dtype):
    tensors = torch_request(3, dtype)
    parsed = protocol.parse(save(tensors), LIMITS)
    np.testing.assert_array_equal(parsed.latents.astype(np.float32), tensors["latents"].permute(0, 2, 3, 1).float())
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        np.testing.assert_array_equal(getattr(parsed.prompt, name).astype(np.float32), tensors[name].float())
    np.testing.assert_array_equal(parsed.seeds, [-5, -4, -3])
    assert protocol.parse(save(torch_request(seeds=None)), LIMITS).seeds is None


def test_serialize_is_read_by_pytorch():
    latents, prompt = inputs(2, dtype=ml_dtypes.bfloat16)
    u = np.broadcast_to(np.float32(0.3), 2)  # strided, as the latents are
    tensors = load(protocol.serialize(latents, prompt, u, [7, -(2**63)]))
    np.testing.assert_array_equal(tensors["u"], u)
    np.testing.assert_array_equal(tensors["latents"].permute(0, 2, 3, 1).float(), latents.astype(np.float32))
    assert tensors["prompt_embeds"].dtype == torch.bfloat16
    assert tensors["seeds"].tolist() == [7, -(2**63)]


BAD = {
    "latents without rows": (
        {"latents": torch.zeros(16, 8, 12)},
        r"latents must be \(B, 16, h, w\), got \(16, 8, 12\)",
    ),
    "channels last": ({"latents": torch.zeros(1, 8, 12, 16)}, "8 does not fit"),
    "8 channels": ({"latents": torch.zeros(1, 8, 8, 12)}, "latents must be .* for this model"),
    "odd height": ({"latents": torch.zeros(1, 16, 7, 12)}, "latents' h is 7, expected a multiple of 2 up to 24"),
    "too wide": ({"latents": torch.zeros(1, 16, 8, 26)}, "latents' w is 26"),
    "no height": ({"latents": torch.zeros(1, 16, 0, 12)}, "latents' h is 0"),
    "no tokens": ({"prompt_embeds": torch.zeros(1, 0, 24)}, "the prompt has 0 tokens, 1 to 1024"),
    "too many tokens": ({"prompt_embeds": torch.zeros(1, 1025, 24)}, "the prompt has 1025 tokens"),
    "wrong width": ({"prompt_embeds": torch.zeros(1, 5, 23)}, r"prompt_embeds must be \(B, S, 24\).*23 does not fit"),
    "wrong pooled width": ({"pooled_prompt_embeds": torch.zeros(1, 24)}, "pooled_prompt_embeds must be"),
    "rows differ": ({"u": torch.zeros(2)}, r"u is \(2,\), but B is 1 in another tensor"),
    "no rows": ({name: tensor[:0] for name, tensor in torch_request().items()}, "0 rows in one request, 1 to 4"),
    "too many rows": (torch_request(5), "5 rows in one request"),
    "integer latents": (
        {"latents": torch.zeros(1, 16, 8, 12, dtype=torch.int32)},
        "latents must be F32 or F16 or BF16",
    ),
    "float seeds": ({"seeds": torch.zeros(1)}, "seeds must be I64, got F32"),
    "half u": ({"u": torch.zeros(1, dtype=torch.float16)}, "u must be F32, got F16"),
    "u above 1": ({"u": torch.tensor([1.1])}, r"u must lie in \[0, 1\]"),
    "u below 0": ({"u": torch.tensor([-0.1])}, r"u must lie in \[0, 1\]"),
    "u is NaN": ({"u": torch.tensor([float("nan")])}, r"u must lie in \[0, 1\]"),
    "missing": ({"pooled_prompt_embeds": None}, "pooled_prompt_embeds is missing"),
    "extra": ({"prompt": torch.zeros(1)}, "'prompt' is not a tensor of this protocol"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tensors_are_refused(name):
    changed, message = BAD[name]
    with pytest.raises(RequestError, match=message) as error:
        protocol.parse(save(torch_request(**changed)), LIMITS)
    assert error.value.status == 400


def raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


GOOD = save(torch_request())
END = 8 + int.from_bytes(GOOD[:8], "little")
SHIFTED = json.loads(GOOD[8:END])
SHIFTED["u"]["data_offsets"] = SHIFTED["latents"]["data_offsets"]
BAD_BYTES = {
    "empty": b"",
    "garbage": b"\x93NUMPY" * 100,
    "pickle": pickle.dumps({"latents": [1.0]}),
    "truncated": GOOD[:-1],
    "trailing bytes": GOOD + b"\0",
    "header only": GOOD[:END],
    "a header of 10^12 bytes": (10**12).to_bytes(8, "little") + GOOD[8:],
    "a header of 2^64 - 1 bytes": b"\xff" * 8 + GOOD[8:],
    "a header that is no object": raw(b"[1, 2]"),
    "entries that are no objects": raw(b'{"latents": 1, "prompt_embeds": null, "pooled_prompt_embeds": [], "u": "x"}'),
    "deep nesting": raw(b"[" * 9000),
    "a tensor twice": raw(b'{"u": {}, ' + GOOD[9:END], GOOD[END:]),
    "tensors that overlap": raw(json.dumps(SHIFTED).encode(), GOOD[END:]),
    "a huge shape": raw(GOOD[8:END].replace(b"[1,5,24]", b"[1,99999999999999999999,24]"), GOOD[END:]),
    "a negative shape": raw(GOOD[8:END].replace(b"[1,5,24]", b"[1,-5,24]"), GOOD[END:]),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_bytes_are_refused(name):
    with pytest.raises(RequestError) as error:
        protocol.parse(BAD_BYTES[name], LIMITS)
    assert error.value.status == 400
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "pooled_prompt_embeds"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused(name, value, dtype):
    tensors = torch_request(2, dtype)
    tensors[name].view(2, -1)[1, 3] = value
    with pytest.raises(RequestError, match=rf"{name} holds NaN or infinity in rows \[1\]") as error:
        protocol.parse(save(tensors), LIMITS)
    assert error.value.status == 422


def test_any_bytes_give_a_request_or_a_request_error():
    """Mutations of a good body: nothing but RequestError comes out, and what is taken is well-formed."""
    rng = np.random.default_rng(0)
    taken = 0
    for _ in range(3000):
        body = mutated(GOOD, rng)
        try:
            parsed = protocol.parse(body, LIMITS)
        except RequestError:
            continue
        taken += 1
        assert len(parsed.latents) == len(parsed.prompt.prompt_embeds) == len(parsed.u)
        assert np.isfinite(parsed.latents).all()
    assert taken > 50  # of those that changed numbers only
