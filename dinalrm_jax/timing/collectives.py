"""What the devices of a mesh send each other, read in a compiled program."""

import dataclasses
import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction: its kind, the bytes of its result, how many devices take part together, what it carries."""

    kind: str
    result_bytes: int
    group: int
    dtypes: tuple[str, ...] = ("f32",)

    @property
    def sent_bytes(self) -> float:
        """What each device sends in a ring (a permute sends its operand as it is)."""
        share = (self.group - 1) / self.group
        times = {
            "all-reduce": 2 * share,
            "all-gather": share,
            "reduce-scatter": self.group * share,
            "collective-permute": 1.0,
            "all-to-all": share,
        }
        return self.result_bytes * times[self.kind]


def collectives(hlo: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program's text; one in a loop's body counts once."""
    found = []
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match is None:
            continue
        shapes, kind, start = match.groups()
        results = [
            (dtype, math.prod(map(int, filter(None, dims.split(",")))) * BYTES[dtype])
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
            if dtype in BYTES
        ]
        if start and kind == "all-gather":  # operands, then results
            results = results[len(results) // 2 :]
        elif start and kind == "collective-permute":  # operand, result, contexts
            results = results[1:2]
        dtypes = tuple(sorted({dtype for dtype, _ in results}))
        found.append(Collective(kind, sum(size for _, size in results), _group(line, devices), dtypes))
    return found


def _group(line: str, devices: int) -> int:
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    return devices
