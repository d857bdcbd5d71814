"""The generator: the policy behind an OpenAI-compatible gateway that supervises vLLM and swaps proven weights in."""
