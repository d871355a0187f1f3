"""From a client's bytes or fields to requests that can be served as they stand."""
