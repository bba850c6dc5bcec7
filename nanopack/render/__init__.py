"""A conversation in, a document out: token ids, and the mask of those in the loss.

templates.py     what a chat template of ours is; chatml and llama3
hf_template.py   a tokenizer's own chat template (template="hf")
renderer.py      conversation -> Plan
document.py      Plan -> Document
"""

from nanopack.errors import TemplateError
from nanopack.render.document import Document, Plan
from nanopack.render.renderer import Renderer, missing_tokens
from nanopack.render.templates import Template, Turn

__all__ = ["Document", "Plan", "Renderer", "Template", "TemplateError", "Turn", "missing_tokens"]
