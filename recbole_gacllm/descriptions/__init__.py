"""What the descriptions are: raw text, neighbours, prompts, convolution, store and encoding."""
