"""A small model of your own on GSM8K: from raw questions and answers to an iteration."""
