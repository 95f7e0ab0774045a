"""What runs inside an engine, where its logits are."""
