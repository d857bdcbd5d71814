"""The dashboard: pages in the browser over the orchestrator's own services, served under `/ui/`."""
