"""A server with OpenAI's HTTP interface; needs the extra `serve`."""
