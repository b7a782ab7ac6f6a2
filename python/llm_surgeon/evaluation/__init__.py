"""Quality of a model: perplexity and zero-shot tasks."""
