"""What an API key is made of, for servers that read keys and clients that send them. Not here: whose they are."""


def is_key(text: str) -> bool:
    """What every client can put into a header, and every protocol carries alike."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text
