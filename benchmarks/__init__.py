"""Benchmarks: `make bench` runs all, `python -m benchmarks NAME` some. Each prints one JSON object a figure."""
