"""The ops of the hybrid model, one folder each: `api.py` is the contract, `reference.py` the definition in XLA."""
