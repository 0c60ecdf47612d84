"""The suites: latency, accuracy, and the report of both."""
