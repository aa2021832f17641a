"""Everything that runs a model: sessions with pinned options, evaluation, benchmarks."""
