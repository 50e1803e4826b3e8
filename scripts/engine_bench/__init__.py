"""What bench_engine is made of."""
