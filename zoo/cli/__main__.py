"""`python -m zoo.cli`, for `accelerate launch --module zoo.cli fit ...`."""

from zoo.cli import app

if __name__ == "__main__":
    app()
