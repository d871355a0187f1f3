"""A model's text: tokens to text and back, special tokens, stop strings, the chat template."""
