"""Figures are regenerated, not typed: the README's table is what bench/figures says."""

from bench.readme import README, refreshed


def test_the_readme_shows_the_committed_figures() -> None:
    text = README.read_text()
    assert refreshed(text) == text, "run: python -m bench.readme"
