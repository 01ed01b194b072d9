"""Generation: prompts in, tokens out, over any engine."""
