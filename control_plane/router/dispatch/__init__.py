"""The parts of RouterCore: what a request passes through, what is known of it and of workers, and the rules."""
