"""The first half hour on a GPU, as a table of parts: `make gpu-hour`, or `python -m benchmarks.gpu_hour`."""
