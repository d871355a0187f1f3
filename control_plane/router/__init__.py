"""The router: owns every request from its first byte to its one ending (DESIGN section 1)."""
