"""KV memory: what a token holds (`schema`), who owns which column (`allocator`), which block is in it already
(`prefix_cache`, by the names of `block_hash`), and the bytes (`arena`)."""
