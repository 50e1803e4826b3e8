"""What train_tiny is made of: documents by kind, tokenizer, packed batches, learning, export."""
