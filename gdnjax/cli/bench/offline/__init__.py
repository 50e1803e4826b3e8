"""What gdnjax bench engine, throughput and latency share: flags, sizes, sections, engines, the record, the run."""
