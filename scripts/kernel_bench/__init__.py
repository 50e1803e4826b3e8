"""What scripts/bench_kernels.py and scripts/rocm_gate.py run: named workloads of every kernel, and their times."""
