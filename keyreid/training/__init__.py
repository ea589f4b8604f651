"""The DeepSpeed engine, the loop, and checkpoints."""
