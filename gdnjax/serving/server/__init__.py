"""The HTTP server: OpenAI's endpoints over an AsyncLLM. `make_app` is the application, `host` runs it on a socket."""
