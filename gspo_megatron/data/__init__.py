"""The input of a run: tokenizers, generated tasks, prompt files, the order of prompts, packing into micro-batches."""
