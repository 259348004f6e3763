"""Mutants of data."""

from benchmarks.mutants import Mutant

MUTANTS: list[Mutant] = []
