"""The OpenAI HTTP API over a model: `app.create_app` makes it, `process.serve` runs it."""
