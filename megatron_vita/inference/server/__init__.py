"""OpenAI's chat completions over HTTP: one thread runs the engine, the rest is asyncio."""
