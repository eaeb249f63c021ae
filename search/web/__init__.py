"""`prune-search serve`: the service, its pages, its REST API and a client for it.

The service needs the extra `serve` (FastAPI, uvicorn); `client` needs only Python.
"""
