"""Cost accounting and presentation of results."""
