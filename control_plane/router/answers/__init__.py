"""From what the core says of a request to what its client reads: choices, streams, the two dialects of answers."""
