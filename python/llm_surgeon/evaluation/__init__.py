"""How good a model is: perplexity and zero-shot tasks."""
