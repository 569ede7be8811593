"""Benchmarks and resource gates of fusedopt: `python -m bench run | compare | plot | gates | gpu`."""
