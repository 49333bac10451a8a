"""What a model is asked: prompts, their targets, and where they come from."""
