"""`gemma-edge serve`: an HTTP server with the routes of OpenAI's API, over the library."""
