"""Small wrong changes to the code, each of which a test must notice; `python -m benchmarks.mutants`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One wrong change.

    Attributes:
        name: what is wrong with it, in words.
        path: the file, from the repository's root.
        old: a text that stands there once.
        new: what replaces it.
        tests: pytest's arguments: the tests that should notice, as few and quick as there are.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str
