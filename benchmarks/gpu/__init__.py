"""Everything for the first hour with a GPU, as one command of nine minutes: `python -m benchmarks.gpu`."""
