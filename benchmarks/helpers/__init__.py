"""What several benchmarks share: models and rows, processes, memory, links, and what a result says of its machine."""
