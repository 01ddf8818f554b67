"""What is spoken on HTTP: OpenAI's routes for pictures and videos, and what watches over a server."""
