"""Random numbers that are a function of a counter: no state, so nothing travels when a request moves.

The uniform of (seed, choice, position) is the same on every worker, torch version and machine. Each input is folded in
by one round of splitmix64 (Steele, Lea and Flood, 2014), whose output passes BigCrush for consecutive counters.
"""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    state = 0
    for counter in (seed, choice, position):
        state = _splitmix64(state ^ counter)
    return (state >> 11) * 2.0**-53


def _splitmix64(state: int) -> int:
    state = (state + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
