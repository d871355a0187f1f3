"""One module for each way to turn an image into placeholders, each the arithmetic of one processor of transformers.

A module reads a `VisionFolder` and gives a `LayoutRule`. What a folder asks for that the module does not do is refused
when the folder is read, never guessed.
"""
