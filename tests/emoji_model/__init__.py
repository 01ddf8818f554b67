"""The demo model: what it is trained on, its networks, the training, and what it draws. The card is README.md."""

from pathlib import Path

MODEL = Path(__file__).with_name("model")
