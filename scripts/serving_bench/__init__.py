"""What serving is measured with: workloads, driver, engines, figures, tables. See scripts/bench_serving.py."""
