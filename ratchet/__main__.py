"""`python -m ratchet` is `ratchet`."""

from ratchet.cli.main import run

if __name__ == "__main__":
    run()
