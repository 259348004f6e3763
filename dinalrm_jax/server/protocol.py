"""The reward server's wire format, protocol v1: safetensors in, JSON out.

A request is one safetensors blob, images channels first as PyTorch has them:

    latents               (B, 16, h, w)   clean and scaled; float32, float16 or bfloat16, as are the embeddings
    prompt_embeds         (B, S, 4096)
    pooled_prompt_embeds  (B, 2048)
    u                     (B,)            noise levels in [0, 1], float32
    seeds                 (B,)            int64; optional, without it the noise is new in every request

and the answer `{"protocol_version": "1", "raw_scores": [B numbers], ...}`, or
`{"protocol_version": "1", "error": {"code", "message", "request_id"}}` with an HTTP status of 400 or more.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from multidict import MultiMapping
from safetensors.numpy import save

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.config import RewardModelConfig

VERSION = "1"
VERSION_HEADER = "x-drm-protocol-version"
CONTENT_TYPE = "application/octet-stream"
FLOATS = ("F32", "F16", "BF16")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64}
MAX_HEADER_BYTES = 16384  # five tensors take some 400
Body = bytes | bytearray | memoryview
MAX_MESSAGE = 900  # it lands in the trainer's log


class RequestError(Exception):
    """A request that is answered with an error.

    The message may quote the request; what would not print as it is (line ends, control characters) is escaped.

    Attributes:
        status: of HTTP.
        code: a word for programs.
    """

    def __init__(self, status: int, code: str, message: str):
        super().__init__(printable(message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " ..."))
        self.status, self.code = status, code


def printable(text: str) -> str:
    """A text that came from outside, as one line of a log or an answer."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Latent height and width, and text tokens, of a row; written 64x64x333."""

    height: int
    width: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.tokens}"

    @classmethod
    def parse(cls, text: str) -> "RowShape":
        """Raises ConfigError unless `text` is three positive numbers."""
        try:
            shape = cls(*map(int, text.split("x")))
        except (TypeError, ValueError):
            shape = None
        if shape is None or min(dataclasses.astuple(shape)) < 1:
            raise ConfigError(
                f"a shape to warm up is LATENT_HEIGHTxLATENT_WIDTHxTOKENS, for instance 64x64x333; got {text!r}"
            )
        return shape


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """B rows to score: latents (B, h, w, 16), channels last; B prompts; levels (B,); seeds (B,) or None."""

    latents: np.ndarray
    prompt: PromptEmbeds
    u: np.ndarray
    seeds: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may hold: the model's widths, and sizes up to these."""

    channels: int
    width: int
    pooled_width: int
    patch_size: int
    max_rows: int
    max_side: int = 192
    max_tokens: int = 1024
    tokens: int | None = None  # the only number, of a model with an empty prompt of its own

    @classmethod
    def of(cls, config: RewardModelConfig, max_rows: int) -> "Limits":
        """Of a model; a side also ends where its position table does."""
        spec = config.transformer.latents
        sides = min(cls.max_side, spec.largest_side)
        return cls(
            spec.channels, spec.text_width, spec.pooled_width, spec.patch, max_rows, sides, tokens=config.only_tokens
        )

    @property
    def largest(self) -> RowShape:
        """The largest row that is taken at all."""
        return RowShape(self.max_side, self.max_side, self.max_tokens)

    def row_bytes(self, shape: RowShape) -> int:
        """Of a row's tensors, in float32, in a request."""
        latents = self.channels * shape.height * shape.width
        return 4 * (latents + self.width * shape.tokens + self.pooled_width + 1) + 8

    def body_bytes(self, shape: RowShape) -> int:
        """Of the largest request of a shape."""
        return 8 + MAX_HEADER_BYTES + self.max_rows * self.row_bytes(shape)

    def problems(self, height: int, width: int, tokens: int) -> list[str]:
        """What is wrong with latents and prompt of these sizes."""
        out = []
        for side, size in (("h", height), ("w", width)):
            if not 1 <= size <= self.max_side or size % self.patch_size:
                out.append(f"latents' {side} is {size}, expected a multiple of {self.patch_size} up to {self.max_side}")
        if not 1 <= tokens <= self.max_tokens:
            out.append(f"the prompt has {tokens} tokens, 1 to {self.max_tokens} are taken")
        elif self.tokens is not None and tokens != self.tokens:
            out.append(f"the prompt has {tokens} tokens, this model takes {self.tokens}, as its own empty prompt has")
        return out


def parse(body: Body, limits: Limits) -> ScoreRequest:
    """The rows of a request's body, checked; the arrays are views of it.

    Raises:
        RequestError: 400 for what is not such a blob, 422 for numbers that are not finite.
    """
    header, start = _header(body)
    _check_tensors(header, limits)
    tensors = _views(body, header, start)
    for name in ("latents", "prompt_embeds", "pooled_prompt_embeds"):
        _check_finite(name, tensors[name])
    u = tensors["u"]
    if not ((u >= 0) & (u <= 1)).all():  # NaN included
        raise _bad(f"u must lie in [0, 1] (0 clean, 1 pure noise), got {u.tolist()}")
    prompt = PromptEmbeds(tensors["prompt_embeds"], tensors["pooled_prompt_embeds"])
    return ScoreRequest(tensors["latents"].transpose(0, 2, 3, 1), prompt, u, tensors.get("seeds"))


def serialize(latents: np.ndarray, prompt: PromptEmbeds, u: np.ndarray, seeds: np.ndarray | None) -> bytes:
    """The inverse of `parse`: a request's body from channels-last latents."""
    tensors = {
        "latents": np.asarray(latents).transpose(0, 3, 1, 2),
        "prompt_embeds": prompt.prompt_embeds,
        "pooled_prompt_embeds": prompt.pooled_prompt_embeds,
        "u": np.asarray(u, np.float32),
    }
    if seeds is not None:
        tensors["seeds"] = np.asarray(seeds, np.int64)
    # safetensors writes the memory of a strided array as if it were contiguous.
    return save({name: np.ascontiguousarray(array) for name, array in tensors.items()})


def check_headers(headers: MultiMapping[str]) -> None:
    """Raises RequestError 400 unless a request's headers announce this protocol, each of them once."""
    found = _only(headers, VERSION_HEADER)
    if found != VERSION:
        said = f"the request says {found[:50]!r}" if found is not None else "the request does not say"
        raise _bad(f"this server speaks protocol version {VERSION!r} (header {VERSION_HEADER}); {said}", "bad_protocol")
    if (encoding := _only(headers, "content-encoding")) not in (None, "identity"):
        raise _bad(f"content-encoding {encoding[:50]!r} is not taken; send the blob as it is", "bad_protocol")
    content = (_only(headers, "content-type") or "").split(";")[0].strip().lower()
    if content != CONTENT_TYPE:
        raise _bad(f"content-type must be {CONTENT_TYPE}, a safetensors blob; got {content[:50]!r}", "bad_protocol")


def _only(headers: MultiMapping[str], name: str) -> str | None:
    """A header's value; a second one, which another reader might go by, is refused."""
    values = headers.getall(name, [])
    if len(values) > 1:
        raise _bad(f"the header {name} stands {len(values)} times in the request; send it once", "bad_protocol")
    return values[0] if values else None


def _bad(message: str, code: str = "bad_request") -> RequestError:
    return RequestError(400, code, message)


def _header(body: Body) -> tuple[dict[str, object], int]:
    """The blob's table of tensors, and where the table ends."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > min(MAX_HEADER_BYTES, len(body) - 8):
        raise _bad(
            f"the body is not a safetensors blob: {len(body)} bytes, a header of {length} announced "
            f"(at most {MAX_HEADER_BYTES} here)"
        )
    try:
        header = json.loads(bytes(body[8 : 8 + length]), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(f"the body is not a safetensors blob: {error}") from None
    if not isinstance(header, dict):
        raise _bad("the body is not a safetensors blob: its header is no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _without_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:50]!r} stands twice in the header")
        found[name] = value
    return found


def _check_tensors(header: Mapping[str, Any], limits: Limits) -> None:
    """Raises RequestError, listing everything that is wrong, unless names, dtypes and shapes are right."""
    wanted = {
        "latents": (FLOATS, ("B", limits.channels, "h", "w")),
        "prompt_embeds": (FLOATS, ("B", "S", limits.width)),
        "pooled_prompt_embeds": (FLOATS, ("B", limits.pooled_width)),
        "u": (("F32",), ("B",)),
        "seeds": (("I64",), ("B",)),
    }
    problems = [f"{name} is missing" for name in wanted if name not in header and name != "seeds"]
    problems += [f"{name[:50]!r} is not a tensor of this protocol" for name in header if name not in wanted]
    sizes: dict[str, int] = {}
    for name in [name for name in wanted if name in header]:
        entry, (dtypes, axes) = header[name], wanted[name]
        shape = entry.get("shape") if isinstance(entry, dict) else None
        expected = f"({', '.join(map(str, axes))})"
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            problems.append(f"{name} has no shape")
        elif len(shape) != len(axes):
            problems.append(f"{name} must be {expected}, got {tuple(shape)}")
        elif wrong := [size for axis, size in zip(axes, shape) if isinstance(axis, int) and axis != size]:
            problems.append(f"{name} must be {expected} for this model, got {tuple(shape)}: {wrong[0]} does not fit")
        else:
            for axis, size in zip(axes, shape):
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    problems.append(f"{name} is {tuple(shape)}, but {axis} is {sizes[axis]} in another tensor")
        if isinstance(entry, dict) and entry.get("dtype") not in dtypes:
            problems.append(f"{name} must be {' or '.join(dtypes)}, got {str(entry.get('dtype'))[:20]}")
    rows, some = sizes.get("B", 1), limits.patch_size
    if not 1 <= rows <= limits.max_rows:
        problems.append(f"{rows} rows in one request, 1 to {limits.max_rows} are taken")
    problems += limits.problems(sizes.get("h", some), sizes.get("w", some), sizes.get("S", 1))
    if problems:
        raise _bad("; ".join(problems))


def _views(body: Body, header: Mapping[str, Any], start: int) -> dict[str, np.ndarray]:
    """The tensors without a copy: one behind another, without gaps, to the body's last byte, as the format demands.

    (safetensors' own reader copies; hundreds of bodies of several MB may wait here.)
    """
    tensors, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        dtype, count = np.dtype(DTYPES[entry["dtype"]]), math.prod(entry["shape"])
        end = position + count * dtype.itemsize
        if entry.get("data_offsets") != [position, end] or start + end > len(body):
            raise _bad(
                f"the body is not a whole safetensors blob: {name} should lie at bytes {position} to {end} of "
                f"{len(body) - start}, its header says {str(entry.get('data_offsets'))[:50]}"
            )
        tensors[name] = np.frombuffer(body, dtype, count, start + position).reshape(entry["shape"])
        position = end
    if start + position != len(body):
        raise _bad(f"the body is not a whole safetensors blob: {len(body) - start - position} bytes follow its tensors")
    return tensors


def _begin(entry: Mapping) -> int:
    match entry.get("data_offsets"):
        case [int(begin), int()]:
            return begin
    return 0


def _check_finite(name: str, array: np.ndarray) -> None:
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        rows = np.flatnonzero(~finite).tolist()
        raise RequestError(422, "non_finite", f"{name} holds NaN or infinity in rows {rows}; nothing was scored")


def read_api_key(variable: str | None) -> str | None:
    """The key that `--api-key-env` names; None where it names none.

    Raises:
        ConfigError: the variable is empty or not set.
    """
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise ConfigError(f"--api-key-env names {variable}, which is empty or not set")
    return key
