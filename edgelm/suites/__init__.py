"""Ready-made tests of a bundle, for pytest; docs/suites.md."""
