"""The orchestrator: runs and their iterations. It plans, hands out work, judges candidates, and holds no model."""
