"""Mutants of server."""

from benchmarks.mutants import Mutant

MUTANTS: list[Mutant] = []
