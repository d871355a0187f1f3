"""What images are to a model, in numbers: how many placeholders one makes, where they stand, and what names it.

Routers import this, so nothing here imports torch, transformers or an image library. No pixel is looked at: towers run
in `encode_worker`.
"""
