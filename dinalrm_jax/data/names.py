"""The names of the datasets, as commands and configurations write them; `data.sources.datasets` reads them."""

from typing import Literal

Dataset = Literal["hpdv3", "hpdv2", "imagereward", "genai_bench", "jsonl", "dinalrm", "agiqa3k"]
BenchmarkName = Literal["imagereward", "hpdv2", "hpdv3", "genai_bench", "agiqa3k"]  # those with a published test set
