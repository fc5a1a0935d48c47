"""Time and memory on a GPU: `python -m benchmarks.gpu`. One file for each section of the report."""
