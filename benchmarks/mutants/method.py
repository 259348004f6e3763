"""Mutants of method."""

from benchmarks.mutants import Mutant

MUTANTS: list[Mutant] = []
