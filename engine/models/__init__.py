"""Models: what a checkpoint folder says (`info`, torch-free), how it gets there and into memory (`checkpoint`), and the
little that model families do differently (`family`). No model code of our own: the layers are transformers'."""
