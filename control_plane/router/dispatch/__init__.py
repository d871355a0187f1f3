"""The parts of RouterCore: admission, the fair queue, shares, placement, what is known of workers and requests."""
