"""The reward service: proxy reward models and the fixed reference behind one scoring API."""
