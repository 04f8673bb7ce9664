"""`fp8 serve`: the engine over HTTP, in OpenAI's words.

    command.py        the command line
    server.py         uvicorn: logs, and how the server leaves
    guard.py          before every handler: key, size, type, draining; after it: a line in the log
    app.py            the routes
    schema.py         what may be sent
    answers.py        what is sent back
    async_engine.py   the thread that owns the engine
    metrics.py        what Prometheus reads
    door.py           what all of these share

It needs fastapi and uvicorn (`pip install 'fp8[serve]'`), and nothing imports those before they are wanted.
"""
