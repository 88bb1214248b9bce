"""What a run reads and how it is cut into micro-batches: tokenizers, generated tasks, prompt files, packing."""
