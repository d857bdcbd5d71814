"""What crosses a wire or a disk: conversations, rollouts, scores, pairs, checkpoints, jobs, problems.

Nothing here does I/O and nothing here imports torch. `services.contracts` imports nothing else of ours.
"""
