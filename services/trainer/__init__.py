"""The trainer: import, SFT, reward model and DPO, each one job, in a child process that can be killed and resumed."""
