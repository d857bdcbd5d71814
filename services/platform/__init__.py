"""Plumbing every service shares: settings, logging, metrics, auth, HTTP, artifact store, job queue.

`services.platform` imports `services.contracts` and nothing else of ours.
"""
