"""KV memory: what a token holds (`schema`), who owns which column (`allocator`), and the bytes (`arena`)."""
