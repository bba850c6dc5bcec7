"""The files that ship with nanopack; README.md lists their sources and licences."""

from importlib import resources

CONVERSATIONS = str(resources.files(__name__) / "conversations.jsonl")
"""Path of 2,486 chats."""
