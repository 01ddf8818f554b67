"""The server: requests of many clients in one queue, before an engine that is kept alive."""
