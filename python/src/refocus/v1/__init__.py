"""Messages of the API, generated from proto/refocus/v1 when the package is built."""
